"""What a backend is. ``reference`` (torch) is the specification; ``cpu`` (C++) and later ``triton`` obey the same
words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
class MemoryPlan:
    """Bytes by part, known before anything is read. KV is ``kv_block_bytes`` per block."""

    weight_bytes: int
    arena_bytes: int
    logits_bytes: int
    kv_block_bytes: int

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


PullWeight = Callable[[WeightDecl], Sequence[Array]]
"""Yields a weight's parts in order, as mapped arrays in their stored dtype (transforms and permutations already done);
the caller may keep the views: the mapping outlives the executable."""


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

    def probe(self) -> BackendProbe: ...

    def plan(self, program: Program, dtype: str, capacity: Capacity, stored_bytes: int) -> MemoryPlan:
        """Bytes needed. ``stored_bytes`` is what the checkpoint's tensors take on disk (they may be kept mapped)."""

    def time_products(self, dtypes: Sequence[str]) -> Mapping[str, float]:
        """Seconds that the same few products take in each dtype; how ``auto`` chooses. Costs about 50 ms."""

    def load(
        self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, *, debug: bool = False
    ) -> Executable: ...


def weight_elements(decl: WeightDecl) -> int:
    """Number of values in a weight."""
    return int(np.prod(decl.shape))
