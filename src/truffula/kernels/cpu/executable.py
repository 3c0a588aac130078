"""A loaded program on the native backend: ``Executable`` around the C++ one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.errors import KernelError
from truffula.kernels.adapters import AtSlice, by_op
from truffula.kernels.backend import AdapterImage
from truffula.kernels.cpu.arena import ArenaPlan
from truffula.kernels.cpu.formats import BF16, F32, LANES, PLANNED_RANK, panel_bytes, panels_of
from truffula.kernels.cpu.weights import BFLOAT16, STORED, as_bits
from truffula.kernels.inputs import Int32, SampleInputs, SequenceSampling, StepInputs, StepOutput
from truffula.kernels.program import Linear, Program
from truffula.kernels.synchronous import SynchronousExecutable

Array = npt.NDArray[Any]
_KINDS = ("embed", "norm", "linear", "pointwise", "rope rows", "rope", "attention", "take rows")
"""In the order of ops.h's variant."""


class CpuExecutable(SynchronousExecutable):
    """One call of ``run`` is one call into C++, without the GIL. Made by ``CpuBackend.load``."""

    def __init__(
        self, native: Any, program: Program, inputs: StepInputs, samples: SampleInputs, arena: ArenaPlan, *, debug: bool
    ) -> None:
        super().__init__(inputs, samples, program.output)
        self._native = native
        self._program = program
        self._arena = arena
        self._debug = debug
        self._images: dict[int, AdapterImage] = {}

    def run(self) -> None:
        with as_kernel_errors():
            self._native.run()

    def sample(self) -> StepOutput:
        with as_kernel_errors():
            ids, logprob, finite, top_ids, top_logprobs = self._native.sample(self.samples)
        shape = (len(ids), len(top_ids) // max(1, len(ids)))
        return StepOutput(ids, logprob, finite.view(np.bool_), top_ids.reshape(shape), top_logprobs.reshape(shape))

    def _start_sampling(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        with as_kernel_errors():
            self._native.set_sequence(slot, prompt_ids, completion_ids, sampling)

    def logits(self) -> Array:
        made: Array = self._native.logits(self._program.output.width)
        return made

    def tap(self, op: int) -> Array:
        if not self._debug:
            raise KernelError("tap() needs load(debug=True).", param="debug")
        with as_kernel_errors():
            made: Array = self._native.tap(op)
        return made

    def op_seconds(self) -> dict[str, float]:
        """Seconds of work per kind of op since the last call, all threads together; the first call begins to count."""
        return dict(zip(_KINDS, self._native.take_seconds(), strict=True))

    # --- adapters -----------------------------------------------------------------------------------------------------

    def adapter_bytes(self, image: AdapterImage) -> int:
        """The panels that ``adapter`` makes of it, and what a full step of it needs beyond the plan."""
        found = by_op(self._program, image)
        widest = max((sum(panels_of(a.shape[0]) for a in _shrinks(present)) for present in found.values()), default=0)
        rows = max(len(self.inputs.token_ids), len(self.inputs.logit_rows))
        return self._bytes(found) + 4 * rows * max(0, LANES * widest - PLANNED_RANK)

    def _bytes(self, found: Mapping[int, Sequence[AtSlice]]) -> int:
        return sum(self._op_bytes(index, present) for index, present in found.items())

    def _op_bytes(self, index: int, present: Sequence[AtSlice]) -> int:
        arrays = _shrinks(present)
        fmt = BF16 if all(a.dtype == BFLOAT16 for a in arrays) else F32
        total = sum(panels_of(a.shape[0]) * panel_bytes(fmt, a.shape[1]) for a in arrays)
        for item, tensors in present:
            fmt = BF16 if tensors.b.dtype == BFLOAT16 else F32
            # One panel more where the slice begins inside one, and again for a slice over gates and ups.
            total += (panels_of(item.hi - item.lo) + 1 + self._gated(index)) * panel_bytes(fmt, tensors.b.shape[1])
        return total

    def _gated(self, index: int) -> bool:
        op = self._program.ops[index]
        return isinstance(op, Linear) and op.epilogue.glu

    def adapter(self, image: AdapterImage) -> int:
        found = by_op(self._program, image)
        for _, tensors in (item for present in found.values() for item in present):
            for array in (tensors.a, tensors.b):
                if array.dtype not in STORED:
                    raise KernelError(f"the adapter holds {array.dtype.name}.", param="dtype")
        with as_kernel_errors():
            slot: int = self._native.add_adapter(self._bytes(found))
            try:
                for index, present in found.items():
                    self._add_op(slot, index, present)
            except BaseException:
                self._native.drop_adapter(slot)
                raise
        self._images[slot] = image
        return slot

    def _add_op(self, slot: int, index: int, present: Sequence[AtSlice]) -> None:
        shared: dict[tuple[int, float], int] = {}  # fused modules share one A
        shrinks: list[Array] = []
        scales: list[float] = []
        of: list[int] = []
        for _, tensors in present:
            key = (tensors.a.ctypes.data, tensors.scale)
            if key not in shared:
                shared[key] = len(shrinks)
                shrinks.append(as_bits(tensors.a))
                scales.append(tensors.scale)
            of.append(shared[key])
        self._native.add_adapter_op(
            slot, index, a=shrinks, scales=scales, b=[as_bits(t.b) for _, t in present], expand_of=of,
            first_output=[item.lo for item, _ in present],
        )  # fmt: skip

    def drop_adapter(self, slot: int) -> None:
        if slot not in self._images:
            raise KernelError(f"adapter slot {slot} is not in use.", param="slot")
        self._native.drop_adapter(slot)
        self._images.pop(slot).close()

    def close(self) -> None:
        if self._native is None:
            return
        for slot in list(self._images):
            self.drop_adapter(slot)
        self._native = None


def _shrinks(present: Sequence[AtSlice]) -> list[Array]:
    """The distinct A at an op: fused modules share one."""
    return list({(t.a.ctypes.data, t.scale): t.a for _, t in present}.values())


@contextmanager
def as_kernel_errors() -> Iterator[None]:
    """What C++ refuses is a fault of the caller's arrays or of ours: an error that says which, never a crash."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        raise KernelError(f"cpu backend: {error}.") from error
