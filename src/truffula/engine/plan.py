"""What one step does: decided by the scheduler, carried out by the runner. Numbers and views, no owner's object."""

from __future__ import annotations

from dataclasses import dataclass

from truffula.engine.sampling import SequenceSampling
from truffula.kernels.inputs import Int32

TopList = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that this step computes.

    ``token_ids`` ``[count]`` stand at positions ``start .. start + count``; ``block_table`` ``[blocks]`` covers them
    all. ``slot`` is the adapter's slot in the executable, None for the base. ``targets`` are the ids to score: target j
    is scored by the row of position ``score_start + j``. ``samples``: the chunk's last row draws completion token
    number ``draw``. ``completion_ids`` are those the sequence has so far. The arrays are views, good for this step
    only.
    """

    serial: int
    start: int
    token_ids: Int32
    block_table: Int32
    slot: int | None
    score_start: int
    targets: Int32
    samples: bool
    draw: int
    completion_ids: Int32
    sampling: SequenceSampling

    @property
    def count(self) -> int:
        return len(self.token_ids)

    @property
    def rows(self) -> int:
        """Rows of logits it needs."""
        return len(self.targets) + self.samples


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Chunks in row order: by adapter slot, base last, then by age."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What came of a chunk. ``token`` None when it drew nothing. ``scores``: (logprob, top list) per target.

    ``finite`` False: some row of it held a NaN or an infinity, and nothing else here is meant.
    """

    serial: int
    finite: bool
    token: int | None = None
    logprob: float = 0.0
    top: TopList | None = None
    scores: tuple[tuple[float, TopList], ...] = ()
