"""The native CPU backend: its memory plan and loading."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from truffula.errors import ConfigError, KernelError, MissingDependency
from truffula.kernels.adapters import AdapterLayout, layout_of
from truffula.kernels.backend import MemoryLimit, MemoryPlan, PullWeight
from truffula.kernels.cpu.arena import ArenaPlan, plan_arena
from truffula.kernels.cpu.executable import CpuExecutable, as_kernel_errors
from truffula.kernels.cpu.formats import BF16, BLOCK_KINDS, F32, LANES, NAMES, PLANNED_RANK, WeightOptions, panel_bytes
from truffula.kernels.cpu.lowering import Lowering
from truffula.kernels.cpu.weights import Rounding, load_one, load_weights, packed_bytes, planned_formats, roles
from truffula.kernels.host import free_memory
from truffula.kernels.inputs import Capacity, SampleInputs, StepInputs
from truffula.kernels.installation import installation
from truffula.kernels.program import Attention, Linear, Program
from truffula.kernels.validate import validate

DTYPES: tuple[str, ...] = ("bfloat16", "float32")
_X_ROWS = 16  # kXRows of kernels.h: rows as products read them have memory to a multiple of it
_SAMPLER_BYTES = 58
"""Per id of the vocabulary and thread, at most (sampler.h)."""


class CpuBackend:
    """``isa`` names an instruction set of ``instruction_sets()``, or is ``auto``, the first of them.

    ``quantize`` q8_0 rounds float matrices at load. ``exact``: blocks of quantised files are dequantised, instead of
    multiplied in int8.
    """

    name = "cpu"
    device = "cpu"
    dtypes = DTYPES

    def __init__(
        self, threads: int | None = None, isa: str = "auto", *, quantize: str = "none", exact: bool = False
    ) -> None:
        sets = instruction_sets()
        if isa not in ("auto", *sets):
            raise ConfigError(f"cpu_isa is {isa!r}; this machine has {', '.join(('auto', *sets))}.", param="cpu_isa")
        if quantize not in ("none", "q8_0"):
            raise ConfigError(f"quantize is {quantize!r}; it must be none or q8_0.", param="quantize")
        self._quantize, self._exact = quantize, exact
        self.block_kinds = frozenset() if exact else frozenset(BLOCK_KINDS)
        self._threads = threads or 1
        self.isa = sets[0] if isa == "auto" else isa

    def free_memory(self) -> MemoryLimit:
        return free_memory()

    def _weight_options(self, dtype: str) -> WeightOptions:
        return WeightOptions(dtype, self._quantize, blocks=not self._exact)

    def plan(
        self,
        program: Program,
        dtype: str,
        capacity: Capacity,
        stored_types: Mapping[str, str] = MappingProxyType({}),
    ) -> MemoryPlan:
        """Weights as they are packed; the activations of a full step; KV blocks with their padding."""
        formats = planned_formats(program, self._weight_options(dtype), stored_types)
        by_format: dict[str, int] = {}
        for decl, role in zip(program.weights, roles(program), strict=True):
            held = NAMES[formats.get(decl.id, F32)] if role.kind != "vector" else "vectors"
            by_format[held] = by_format.get(held, 0) + packed_bytes(decl, role, formats.get(decl.id, F32))
        arena = plan_arena(program, capacity, reuse=True)
        logits = 4 * capacity.max_logit_rows * program.vocab_size
        return MemoryPlan(
            weight_bytes=sum(by_format.values()),
            weight_formats=by_format,
            arena_bytes=max(0, 4 * arena.floats - logits) + self._scratch_bytes(program, capacity),
            logits_bytes=2 * logits,
            kv_block_bytes=tuple(
                sum(
                    _kv_block_bytes(op, dtype, capacity.block_size)
                    for op in program.ops
                    if isinstance(op, Attention) and op.group == group.id
                )
                for group in program.kv_groups
            ),
            state_bytes=capacity.max_seqs * program.state_bytes(2 if dtype == "bfloat16" else 4),
        )

    def _scratch_bytes(self, program: Program, capacity: Capacity) -> int:
        """The most scratch memory of a step: x converted for products (8 bits, or bfloat16 pairs), adapters' products
        with A up to the planned rank, and per thread that of attention and of the sampler.
        """
        widest = max((program.weights[op.weight].shape[1] for op in program.ops if isinstance(op, Linear)), default=0)
        rows = 72 * -(-widest // 32) * -(-capacity.max_tokens // _X_ROWS) * _X_ROWS if self._converts() else 0
        attention = max(
            (_attention_scratch(op, capacity) for op in program.ops if isinstance(op, Attention)), default=0
        )
        products = 4 * PLANNED_RANK * max(capacity.max_tokens, capacity.max_logit_rows) if program.sites else 0
        return rows + products + self._threads * (attention + _SAMPLER_BYTES * program.vocab_size)

    def _converts(self) -> bool:
        return bool(self.block_kinds) or self._quantize != "none" or self.isa in ("avx512bf16", "amx")

    def adapter_layout(self, program: Program) -> AdapterLayout:
        return layout_of(program, "panels")

    def faster_dtype(self) -> tuple[str, str]:
        return "bfloat16", "a step reads half as many bytes as in float32"

    def load(
        self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, *, debug: bool = False
    ) -> CpuExecutable:
        """Validate, pull and pack every weight, make the native op list.

        Raises:
            KernelError: The program is wrong, a weight does not have its declared shape, or the dtype is not served.
        """
        validate(program)
        if dtype not in DTYPES:
            raise KernelError(f"dtype {dtype!r} is not supported; use {' or '.join(DTYPES)}.", param="dtype")
        inputs = StepInputs.allocate(capacity, len(program.kv_groups))
        arena = plan_arena(program, capacity, reuse=not debug)
        with as_kernel_errors():
            native = self._native(program, dtype, pull, capacity, arena, debug)
            layout = self.adapter_layout(program)
            for site, place in enumerate(layout.places):
                if place is not None:
                    native.add_site(site=site, op=place.op, first=place.first, outputs=place.outputs)
            native.seal(
                inputs, arena_floats=arena.floats, logits_buffer=program.result.buffer, vocab=program.output.width
            )
        return CpuExecutable(
            native, program, layout, inputs, SampleInputs.allocate(capacity, program.vocab_size), arena, debug=debug
        )

    def rounding(self, program: Program, pull: PullWeight) -> Rounding:
        """The error of ``quantize`` on ``program``'s weights; holds one of them at a time.

        Raises:
            KernelError: A weight cannot be rounded; ``load`` raises it too.
        """
        capacity = Capacity(
            max_tokens=1, max_seqs=1, max_logit_rows=1, max_segments=1, num_blocks=2, block_size=1, max_blocks_per_seq=1
        )
        found = Rounding()
        with as_kernel_errors():
            for decl, role in zip(program.weights, roles(program), strict=True):
                native = _library().Executable(self.isa, self._threads, capacity, F32, 1, False)
                load_one(native, decl, role, self._weight_options("float32"), pull, found)
        return found

    def _native(
        self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, arena: ArenaPlan, debug: bool
    ) -> Any:
        """A native executable with buffers, weights and ops, not yet sealed."""
        kv_format = BF16 if dtype == "bfloat16" else F32
        native = _library().Executable(self.isa, self._threads, capacity, kv_format, len(program.kv_groups), debug)
        _add_buffers(native, program, dtype, arena)
        vectors = load_weights(native, program, self._weight_options(dtype), pull)
        lowering = Lowering(native, program, dtype, vectors)
        for op in program.ops:
            lowering.add(op)
        return native


def instruction_sets() -> tuple[str, ...]:
    """The compiled instruction sets that this machine can run, the fastest of its kind of processor first.

    Raises:
        MissingDependency: The native module was not built, or can't be loaded.
    """
    return tuple(_library().table_names())


def available() -> bool:
    """Whether the native module can be loaded."""
    return not why_unavailable()


def why_unavailable() -> str:
    """Why the native module can't be loaded and what to do; empty when it can."""
    try:
        _library()
    except MissingDependency as error:
        return error.message.removesuffix(".")
    return ""


def _library() -> Any:
    name = "truffula.kernels.cpu._native"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        reason = (
            "truffula was installed without its native CPU kernels, because no C++20 compiler (such as g++) was found "
            "or compiling failed"
            if absent
            else f"truffula's native CPU kernels cannot be loaded ({error})"
        )
        raise MissingDependency(
            f"{reason}; with a compiler, compile them with: {installation().compile_again()}.",
            param="backend",
        ) from error


def _add_buffers(native: Any, program: Program, dtype: str, arena: ArenaPlan) -> None:
    for buffer, offset, stride in zip(program.buffers, arena.offsets, arena.strides, strict=True):
        native.add_buffer(
            offset=offset, stride=stride, logit_rows=buffer.rows == "R",
            rounded=dtype == "bfloat16" and buffer.dtype == "model",
        )  # fmt: skip


def _attention_scratch(op: Attention, capacity: Capacity) -> int:
    """Bytes per thread, as kernels.h counts them (``attention_scratch``)."""
    rows = max(op.heads // op.kv_heads, 24)
    lanes = -(-capacity.block_size // LANES) * LANES
    scores = lanes * max(1, 512 // capacity.block_size) + op.dim_k
    return 4 * rows * (scores + 2 * (-(-op.dim_v // LANES) * LANES + 2))


def _kv_block_bytes(op: Attention, dtype: str, block_size: int) -> int:
    fmt = BF16 if dtype == "bfloat16" else F32
    lanes, value_width = -(-block_size // LANES), -(-op.dim_v // LANES) * LANES
    keys = op.kv_heads * lanes * panel_bytes(fmt, op.dim_k)
    values = op.kv_heads * block_size * value_width * (4 if fmt == F32 else 2)
    return keys + values
