"""The protocol of backends: ``reference`` (torch) is the specification, ``cpu`` and ``triton`` (CUDA) follow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from truffula.errors import KernelError
from truffula.kernels.adapters import AdapterImage as AdapterImage
from truffula.kernels.adapters import AdapterLayout
from truffula.kernels.inputs import Array as Array
from truffula.kernels.inputs import Capacity, Float32, Int32, SampleInputs, SequenceSampling, StepInputs, StepOutput
from truffula.kernels.program import Program, WeightDecl


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that may be used, and the reason for this limit, for messages."""

    nbytes: int
    reason: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, computed before weights are read. A block of KV group g costs ``kv_block_bytes[g]``, a state row
    ``state_bytes``.
    """

    weight_bytes: int
    arena_bytes: int
    logits_bytes: int
    kv_block_bytes: tuple[int, ...]
    state_bytes: int = 0
    weight_formats: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the weights by storage format, where a backend has several."""
    depth: int = 1
    """The executable's: a sequence holds the KV of so many steps, and their state rows, before they are committed."""
    kv_at_load: bool = False
    """Whether KV blocks and states take their memory at load, not when they are written."""

    @property
    def fixed_bytes(self) -> int:
        """All bytes but the pool that KV blocks, states and adapters share. Includes the scratch block of each KV group
        and state row 0."""
        parts = self.weight_bytes, self.arena_bytes, self.logits_bytes, self.state_bytes
        return sum(parts) + sum(self.kv_block_bytes)


@dataclass(frozen=True)
class QuantisedArray:
    """A matrix in blocks along its inputs: uint8 ``blocks [rows, blocks of a row, bytes of a block]`` of the type
    ``kind``; or matrices of experts, ``[E, rows, ...]``. The last block of a row may hold more values than the row.

    ``unpack`` dequantises ``[N, bytes]`` blocks to float32. Scales are finite.
    """

    kind: str
    blocks: Array
    shape: tuple[int, ...]
    unpack: Callable[[Array], Array]

    @property
    def nbytes(self) -> int:
        return int(self.blocks.nbytes)

    def rows(self, lo: int, hi: int) -> QuantisedArray:
        """Rows ``lo .. hi``; a view."""
        part = self.blocks[lo:hi]
        return QuantisedArray(self.kind, part, (len(part), self.shape[1]), self.unpack)

    def __getitem__(self, expert: int) -> QuantisedArray:
        """One expert's matrix; a view."""
        return QuantisedArray(self.kind, self.blocks[expert], self.shape[1:], self.unpack)

    def output_rows(self, which: slice) -> QuantisedArray:
        """Some rows of each expert's matrix; a view."""
        part = self.blocks[:, which]
        return QuantisedArray(self.kind, part, (*part.shape[:2], self.shape[-1]), self.unpack)

    def dequantise(self) -> Array:
        """float32 ``shape``, as the format defines the values."""
        values = self.unpack(self.blocks.reshape(-1, self.blocks.shape[-1]))
        return values.reshape(*self.shape[:-1], -1)[..., : self.shape[-1]]


@dataclass(frozen=True)
class ComputedArray:
    """An array of ``shape`` in ``dtype`` whose rows are computed, or read and checked, when they are needed:
    ``read(lo, hi)`` gives rows ``lo .. hi``, as far as they exist.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int, int], Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def dequantise(self) -> Array:
        return self.read(0, self.shape[0])


Part = Array | QuantisedArray | ComputedArray


def as_array(part: Part) -> Array:
    """A part as an array, dequantised if necessary."""
    return part if isinstance(part, np.ndarray) else part.dequantise()


PullWeight = Callable[[WeightDecl], Sequence[Part]]
"""Returns a weight's parts in order, as mapped arrays in their stored dtype, with transforms applied. The caller may
keep the views: the mapping outlives the executable. Parts stored in one of the backend's ``block_kinds`` are
``QuantisedArray``; large ones, and those that are computed from several stored tensors, may be ``ComputedArray``."""


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STORED = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
"""The dtypes of files and adapters that are accepted. Dtypes, not names: numpy computes a name on each access."""


def make_shape(decl: WeightDecl, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether parts of these shapes make ``decl``'s: stacked along axis 0, or of experts each [O', I] or [E, O', I]."""
    if list(shapes) == [decl.shape]:
        return True
    if len(decl.shape) == 3:
        experts, _, width = decl.shape
        fits = len(shapes) == len(decl.parts) and all(
            shape == (*(() if part.expert is not None else (experts,)), shape[-2], width)
            for shape, part in zip(shapes, decl.parts, strict=True)
        )
        return fits and sum(math.prod(shape) for shape in shapes) == math.prod(decl.shape)
    rows = sum(shape[0] for shape in shapes if shape)
    return rows == decl.shape[0] and all(shape[1:] == decl.shape[1:] for shape in shapes)


def expert_matrices(decl: WeightDecl, parts: Sequence[Part]) -> Iterator[tuple[int, int, Part]]:
    """Expert, first row and matrix [O', I] for each matrix of the parts of a weight of experts. No bytes are copied."""
    for where, part in zip(decl.parts, parts, strict=True):
        if where.expert is not None:
            yield where.expert, where.lo, part
            continue
        stacked = part.dequantise() if isinstance(part, ComputedArray) else part
        for expert in range(decl.shape[0]):
            yield expert, where.lo, stacked[expert]


def pull_parts(pull: PullWeight, decl: WeightDecl) -> list[Part]:
    """The parts of ``decl``. Raises ``KernelError`` unless they make its shape and are stored in an accepted dtype."""
    parts = list(pull(decl))
    if not make_shape(decl, [part.shape for part in parts]):
        shapes = [list(part.shape) for part in parts]
        raise KernelError(f"weight {decl.name}: parts {shapes} do not make {list(decl.shape)}.", param=decl.name)
    for part in parts:
        if not isinstance(part, QuantisedArray) and part.dtype not in STORED:
            raise KernelError(
                f"{decl.name} is {part.dtype.name}; expected float32, float16 or bfloat16.", param="dtype"
            )
    return parts


class PendingStep(Protocol):
    """A submitted step."""

    def done(self) -> bool:
        """Whether ``result`` would return or raise without waiting."""

    def result(self) -> StepOutput:
        """The output of the step; waits for it. May be called again.

        Raises:
            KernelError: The step failed and drew nothing. So does every step that was submitted after it and was not
                finished. The same step may be submitted again.
            DeviceLost: The executable is unusable from now on.
        """


class Executable(Protocol):
    """A loaded model. One owner, one thread at a time. Owns weights, KV bytes, adapter bytes, logits, and the sampling
    state of each sequence slot.

    Calls take effect in order: a step sees the sequences, adapters and KV as the calls before ``submit`` left them,
    even if it finishes later.
    """

    depth: int
    """Steps that may be unfinished at a time. With so many, take the oldest one's result before the next ``submit``."""

    inputs: StepInputs
    """What the next ``submit`` reads: another object after each when ``depth`` > 1. It must not be written to while a
    step that was submitted with it is unfinished."""

    samples: SampleInputs
    """Like ``inputs``, for the rows of logits."""

    layout: AdapterLayout
    """The layout that adapters must be packed for."""

    def prepare(self) -> None:
        """Warm up and capture graphs, so that later steps are faster. Called once, before the first ``submit``."""

    def submit(self, wait_for_masks: Callable[[], None] | None = None) -> PendingStep:
        """Begin one forward pass over ``inputs`` and the draws of ``samples``. ``result`` raises the step's errors.

        ``samples.mask`` may still be written to: it is read after ``wait_for_masks`` has returned, which is called
        once the forward pass has begun, at the latest in ``result``. What it raises is an error of the step.

        A row with ``draw`` = d depends on the first d completion tokens of its sequence: a step that failed, or whose
        tokens were not used, may be submitted again.
        """

    def set_sequence(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        """Begin or resume a sequence in a slot, with its tokens so far and its sampling parameters."""

    def run(self) -> None:
        """One forward pass over ``inputs`` without sampling; only with no step unfinished (tests, ``verify``)."""

    def logits(self) -> Array:
        """float32 ``[R, V]`` copy of the last pass's logits; only with no step unfinished."""

    def tap(self, op: int) -> Array:
        """float32 copy of the output of op number ``op`` in the last pass; only when loaded with ``debug=True``."""

    def adapter_bytes(self, image: AdapterImage) -> int:
        """Bytes that steps with ``image`` need besides the image and the memory plan."""

    def adapter(self, image: AdapterImage) -> int:
        """Begin to make an adapter usable; returns its slot. The image is kept, and read where it lies, until
        ``drop_adapter``.

        Raises ``KernelError`` for an image of another layout or with an inconsistent table.
        """

    def adapter_ready(self, slot: int) -> bool:
        """Whether the upload that ``adapter`` began has ended, so that a step may use the slot. Never blocks."""

    def drop_adapter(self, slot: int) -> None:
        """Release a slot: no later step may name it; unfinished ones may."""

    def write_kv(self, op: int, slots: Int32, keys: Float32, values: Float32) -> None:
        """Write keys and values ``[n, width]`` of the ``Attention`` with number ``op``, as that op would, to ``slots``
        (as in ``slot_mapping``), which no unfinished step uses. Only of a program without windows and states.
        """

    def release_kv(self, group: int, blocks: Int32) -> None:
        """Return the memory of KV blocks of a group to the system; their contents are lost. The ids ascend, and no
        unfinished step uses them. A block that is written again commits its memory again.

        Memory that such a block shares with other blocks (a page at either end) stays. Does nothing on a device that
        allocates KV at load.
        """

    def release_states(self, rows: Int32) -> None:
        """Return the memory of state rows to the system, as ``release_kv`` does. Row 0 is not among them."""

    def close(self) -> None:
        """Free everything. Idempotent."""


class Backend(Protocol):
    """Loads programs on one device. Chosen once, at start.

    ``isa`` is the instruction set on a CPU, empty on another device; ``dtypes`` are those it computes in.
    ``block_kinds`` are the quantised types whose blocks it computes on; of other types it gets the values.
    """

    name: str
    device: str
    isa: str
    dtypes: tuple[str, ...]
    block_kinds: frozenset[str]

    def free_memory(self) -> MemoryLimit:
        """Free memory of the device: weights, KV and adapters are planned into a fraction of it."""

    def plan(
        self,
        program: Program,
        dtype: str,
        capacity: Capacity,
        stored_types: Mapping[str, str] = MappingProxyType({}),
    ) -> MemoryPlan:
        """Bytes needed. ``stored_types``: how the weights' parts are stored, by their names."""

    def faster_dtype(self) -> tuple[str, str]:
        """The faster one of ``dtypes`` on this machine, and the reason in words: what ``--dtype auto`` takes."""

    def adapter_layout(self, program: Program) -> AdapterLayout:
        """How its executables of ``program`` read adapters; the loading worker packs for it."""

    def load(
        self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, *, debug: bool = False
    ) -> Executable: ...
