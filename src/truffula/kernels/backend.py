"""The protocol of backends. ``reference`` (torch) is the specification; ``cpu`` (C++) implements the same protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from truffula.kernels.adapters import AdapterImage as AdapterImage
from truffula.kernels.adapters import AdapterLayout
from truffula.kernels.inputs import Array as Array
from truffula.kernels.inputs import Capacity, Int32, SampleInputs, SequenceSampling, StepInputs, StepOutput
from truffula.kernels.program import Program, WeightDecl


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that may be used, and what sets the limit, in words."""

    nbytes: int
    reason: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, known before anything is read. A block of KV group g costs ``kv_block_bytes[g]``.

    ``state_bytes`` is what recurrent layers keep of all sequence slots.
    """

    weight_bytes: int
    arena_bytes: int
    logits_bytes: int
    kv_block_bytes: tuple[int, ...]
    state_bytes: int = 0
    weight_formats: Mapping[str, int] = field(default_factory=dict)
    """Bytes of matrices by the format they are held in, where a backend has several."""

    @property
    def fixed_bytes(self) -> int:
        """All but the pool that KV blocks and adapters share: the scratch block of each KV group is in it."""
        parts = self.weight_bytes, self.arena_bytes, self.logits_bytes, self.state_bytes
        return sum(parts) + sum(self.kv_block_bytes)


@dataclass(frozen=True)
class QuantisedArray:
    """A matrix as GGUF stores it: uint8 ``blocks [rows, blocks of a row, bytes of a block]`` of the type ``kind``.

    ``unpack`` makes ``[N, bytes]`` blocks the float32 values they stand for. The blocks' scales are finite.
    """

    kind: str
    blocks: Array
    shape: tuple[int, int]
    unpack: Callable[[Array], Array]

    @property
    def nbytes(self) -> int:
        return int(self.blocks.nbytes)

    def rows(self, lo: int, hi: int) -> QuantisedArray:
        """Rows ``lo .. hi``; a view."""
        part = self.blocks[lo:hi]
        return QuantisedArray(self.kind, part, (len(part), self.shape[1]), self.unpack)

    def dequantise(self) -> Array:
        """float32 ``shape``, as the format defines the values."""
        return self.unpack(self.blocks.reshape(-1, self.blocks.shape[2])).reshape(self.shape)


def as_array(part: Array | QuantisedArray) -> Array:
    """The numbers of a part, whatever holds them."""
    return part.dequantise() if isinstance(part, QuantisedArray) else part


PullWeight = Callable[[WeightDecl], Sequence[Array | QuantisedArray]]
"""Yields a weight's parts in order, as mapped arrays in their stored dtype (transforms and permutations already done);
the caller may keep the views: the mapping outlives the executable. Parts stored in one of the backend's ``block_kinds``
come as ``QuantisedArray``."""


class PendingStep(Protocol):
    """A submitted step."""

    def done(self) -> bool:
        """Whether ``result`` would return or raise without waiting."""

    def result(self) -> StepOutput:
        """What the step computed; waits for it. May be called again.

        Raises:
            KernelError: The step failed and drew nothing. So does every step that was submitted after it and was not
                finished. The same step may be submitted again.
            DeviceLost: The executable can compute nothing any more.
        """


class Executable(Protocol):
    """A loaded model. One owner, one thread at a time. Owns weights, KV bytes, adapter bytes, logits, and the sampling
    state of each sequence slot.

    What is called takes effect in order of the calls: a step sees the sequences, adapters and KV as the calls before it
    left them, also while it is not finished.
    """

    depth: int
    """Steps that may be unfinished at once. A program that submits more must take a result first."""

    inputs: StepInputs
    """What the next ``submit`` reads: another object after each when ``depth`` > 1. It must not be written to while a
    step that was submitted with it is unfinished."""

    samples: SampleInputs
    """Like ``inputs``, for the rows of logits."""

    layout: AdapterLayout
    """What adapters must be packed for."""

    def prepare(self) -> None:
        """Do what makes later steps faster (warm up, capture graphs). Once, before the first ``submit``."""

    def submit(self) -> PendingStep:
        """Begin one forward pass over ``inputs`` and the draws that ``samples`` asks for. Raises nothing of the step's.

        A row with ``draw`` = d depends on the first d completion tokens of its sequence: a step that failed, or whose
        tokens were not used, may be submitted again.
        """

    def set_sequence(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        """Begin or resume a sequence in a slot: what it has so far, and how its further tokens are drawn."""

    def run(self) -> None:
        """One forward pass over ``inputs`` without sampling; only with no step unfinished (tests, ``verify``)."""

    def logits(self) -> Array:
        """float32 ``[R, V]`` copy of the last pass's logits; only with no step unfinished."""

    def tap(self, op: int) -> Array:
        """float32 copy of what op number ``op`` wrote in the last pass; only when loaded with ``debug=True``."""

    def adapter_bytes(self, image: AdapterImage) -> int:
        """Bytes that steps with ``image`` take beside it, where the memory plan does not count them."""

    def adapter(self, image: AdapterImage) -> int:
        """Begin to make an adapter usable; returns its slot. The image is kept, and read where it lies, until
        ``drop_adapter``.

        Raises ``KernelError`` for an image of another layout, or one that does not hold together.
        """

    def adapter_ready(self, slot: int) -> bool:
        """Whether the upload that ``adapter`` began has ended, so that a step may use the slot. Never blocks."""

    def drop_adapter(self, slot: int) -> None:
        """Release a slot: no later step may name it; unfinished ones may."""

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
        """Memory of its device that is free now: weights, KV and adapters are planned into a share of it."""

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
