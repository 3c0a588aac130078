"""What a backend is. ``reference`` (torch) is the specification; ``cpu`` (C++) and later ``triton`` obey the same
words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from truffula.kernels.inputs import Capacity, SampledRows, SampleInputs, StepInputs
from truffula.kernels.program import Program, WeightDecl

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BackendProbe:
    """What this machine offers to a backend. ``reason`` says why it is not available when it isn't."""

    name: str
    available: bool
    device: str
    isa: str = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    reason: str = ""


@dataclass(frozen=True)
class MemoryLimit:
    """Bytes that may be used, and what sets the limit, in words."""

    nbytes: int
    reason: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, known before anything is read. KV is ``kv_block_bytes`` per block."""

    weight_bytes: int
    arena_bytes: int
    logits_bytes: int
    kv_block_bytes: int
    weight_formats: Mapping[str, int] = field(default_factory=dict)
    """Bytes of matrices by the format they are held in, where a backend has several."""

    def total(self, num_blocks: int) -> int:
        return self.weight_bytes + self.arena_bytes + self.logits_bytes + num_blocks * self.kv_block_bytes


@dataclass(frozen=True)
class SiteTensors:
    """One adapter at one site: A ``[r, I]``, B ``[O, r]`` in their stored dtype (float32, float16 or bfloat16), scale
    apart.

    Several sites may hold the same A array (a fused module): it is stored once.
    """

    site: int
    a: Array
    b: Array
    scale: float


@dataclass(frozen=True)
class AdapterImage:
    """An adapter laid out for an executable: arrays are views of one mapped file that ``close`` releases.

    ``generation`` is the content hash, ``nbytes`` what the budget is charged.
    """

    generation: str
    sites: tuple[SiteTensors, ...]
    nbytes: int
    rank: int
    close: Callable[[], None] = lambda: None


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


class Executable(Protocol):
    """A loaded model. One owner, one thread at a time. Owns weights, KV bytes, adapter bytes and logits."""

    inputs: StepInputs
    samples: SampleInputs

    def run(self) -> None:
        """One forward pass over ``inputs``; logits of the R rows stay inside for ``sample``."""

    def sample(self) -> SampledRows:
        """Apply ``samples`` to the logits of the last ``run``."""

    def logits(self) -> Array:
        """float32 ``[R, V]`` copy of the last run's logits."""

    def tap(self, op: int) -> Array:
        """float32 copy of what op number ``op`` wrote in the last run; only when loaded with ``debug=True``."""

    def adapter_bytes(self, image: AdapterImage) -> int:
        """Bytes that ``adapter(image)`` will hold beside the mapped image (copies in another dtype or layout)."""

    def adapter(self, image: AdapterImage) -> int:
        """Make an adapter usable; returns its slot. Raises ``KernelError`` on a shape that does not fit its site."""

    def drop_adapter(self, slot: int) -> None:
        """Forget a slot (no step in flight may use it)."""

    def kv_copy(self, group: int, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy whole blocks."""

    def close(self) -> None:
        """Free everything. Idempotent."""


class Backend(Protocol):
    """Chosen once at start from the configuration and the probe."""

    name: str
    block_kinds: frozenset[str]
    """Quantised types it takes as they are stored; empty when it computes on their values."""

    def probe(self) -> BackendProbe: ...

    def free_memory(self) -> MemoryLimit:
        """Memory of its device that is free now: weights, KV and adapters are planned into a share of it."""

    def plan(
        self,
        program: Program,
        dtype: str,
        capacity: Capacity,
        stored_bytes: int,
        stored_types: Mapping[str, str] = MappingProxyType({}),
    ) -> MemoryPlan:
        """Bytes needed. ``stored_bytes`` is what the checkpoint's tensors take on disk (they may be kept mapped),
        ``stored_types`` how they are stored, by the names of the weights' parts."""

    def faster_dtype(self) -> tuple[str, str]:
        """The dtype of ``probe().dtypes`` that it computes faster in here, and why, in words: how ``auto`` chooses."""

    def load(
        self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, *, debug: bool = False
    ) -> Executable: ...


def weight_elements(decl: WeightDecl) -> int:
    """Number of values in a weight."""
    return int(np.prod(decl.shape))
