"""The torch backend: its memory plan and loading."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import MappingProxyType

import torch

from truffula.errors import ConfigError, KernelError
from truffula.kernels.adapters import AdapterLayout, layout_of
from truffula.kernels.arena import plan_arena
from truffula.kernels.backend import MemoryLimit, MemoryPlan, PullWeight
from truffula.kernels.host import free_memory
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Linear, Program
from truffula.kernels.reference.executable import ReferenceExecutable
from truffula.kernels.reference.weights import DTYPES, load_weights
from truffula.kernels.validate import validate


class ReferenceBackend:
    """Plain torch, op by op, on any device of torch: the specification that other backends are tested against.

    ``threads`` sets torch's own thread count for the process; None leaves it. On another device than the CPU
    it is slow: every op is a launch of its own, and each step's inputs are copied there.

    Raises:
        ConfigError: torch has no such device here.
    """

    name = "reference"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    block_kinds: frozenset[str] = frozenset()

    def __init__(self, threads: int | None = None, device: str = "cpu") -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = usable_device(device)
        self.device = str(self._device)
        self.isa = torch.backends.cpu.get_cpu_capability() if self._device.type == "cpu" else ""

    def free_memory(self) -> MemoryLimit:
        """Free memory of the device: of the host for the CPU, else as torch reports it.

        Raises:
            ConfigError: torch does not report it for this device.
        """
        if self._device.type == "cpu":
            return free_memory()
        report = getattr(torch.get_device_module(self._device), "mem_get_info", None)
        if report is None:
            raise ConfigError(
                f"torch does not say how much memory is free on {str(self._device)!r}: set the limit with --memory.",
                param="memory",
            )
        free, _ = report(self._device)
        return MemoryLimit(int(free), f"free on {self._device}")

    def plan(
        self,
        program: Program,
        dtype: str,
        capacity: Capacity,
        stored_types: Mapping[str, str] = MappingProxyType({}),
    ) -> MemoryPlan:
        """Weights count once, mapped or converted: source pages are released while a weight is converted."""
        del stored_types
        width = self._served(dtype).itemsize
        weights = sum(
            math.prod(d.shape) * (4 if d.dtype == "float32" or d.uses & {"vector", "conv"} else width)
            for d in program.weights
        )
        widest = max((program.weights[op.weight].shape[0] for op in program.ops if isinstance(op, Linear)), default=0)
        logits = 4 * capacity.max_logit_rows * program.vocab_size
        buffers = max(0, 4 * plan_arena(program, capacity, reuse=True).floats - logits)  # at most: as if in float32
        return MemoryPlan(
            weight_bytes=weights,
            arena_bytes=buffers + 2 * 4 * capacity.max_tokens * widest,  # the float32 product and its epilogue
            logits_bytes=2 * logits,
            kv_block_bytes=tuple(
                sum(plane.width for plane in group.planes) * capacity.block_size * width for group in program.kv_groups
            ),
            state_bytes=program.state_bytes(width),
            kv_at_load=self._device.type != "cpu",
        )

    def adapter_layout(self, program: Program) -> AdapterLayout:
        return layout_of(program, "float32")

    def faster_dtype(self) -> tuple[str, str]:
        """A few products are timed in each, which costs about 50 ms."""
        float32, bfloat16 = self._seconds("float32"), self._seconds("bfloat16")
        name, other, ratio = "bfloat16", "float32", float32 / bfloat16
        if ratio < 1.0:
            name, other, ratio = other, name, 1 / ratio
        return name, f"its matrix products are {ratio:.1f} times as fast as {other}'s on this machine"

    @torch.inference_mode()
    def _seconds(self, dtype: str) -> float:
        """The best of a few rounds of a decode step's and a prefill chunk's product."""
        total = 0.0
        for rows, repeats in ((8, 8), (64, 1)):
            x = torch.ones(rows, 1024, dtype=self._served(dtype), device=self._device)
            weights = [torch.ones(1024, 1024, dtype=x.dtype, device=self._device) for _ in range(4)]
            rounds = []
            for _ in range(3):
                start = time.perf_counter()
                for weight in weights * repeats:
                    y = torch.nn.functional.linear(x, weight)
                y[0, 0].item()  # waits for an asynchronous device
                rounds.append(time.perf_counter() - start)
            total += min(rounds)
        return total

    def load(
        self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, *, debug: bool = False
    ) -> ReferenceExecutable:
        """Validate, pull every weight, make the executable.

        Raises:
            KernelError: The program is wrong, a weight does not have its declared shape, or the dtype is not served.
        """
        validate(program)
        served = self._served(dtype)
        with torch.inference_mode():
            weights = load_weights(program, served, pull, self._device)
            layout = self.adapter_layout(program)
            return ReferenceExecutable(program, layout, served, weights, capacity, self._device, debug=debug)

    def _served(self, name: str) -> torch.dtype:
        if name not in self.dtypes:
            raise KernelError(f"dtype {name!r} is not supported; use {' or '.join(self.dtypes)}.", param="dtype")
        return DTYPES[name]


def usable_device(name: str) -> torch.device:
    """The device that torch calls ``name``.

    Raises:
        ConfigError: torch does not know the name, or can't compute there.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"device is {name!r}, which torch {torch.__version__} cannot use here: {why}. Use cpu, or install a build "
            "of torch for that device.",
            param="device",
        ) from error
    if device.type == "meta":
        raise ConfigError("device is 'meta', which holds no numbers; use cpu, cuda or another device.", param="device")
    return device
