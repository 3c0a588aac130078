"""The data of one step: the scheduler makes a ``StepPlan``, the runner returns a ``ChunkResult`` for each chunk."""

from __future__ import annotations

import msgspec

from truffula.engine.constraints import Matcher
from truffula.engine.states import Span
from truffula.kernels.inputs import Float32, Int32, SequenceSampling
from truffula.lora.image import KvPrefix

TopList = list[tuple[int, float]]


class SequenceState(msgspec.Struct, frozen=True, gc=False):
    """What the executable needs to start or continue a sequence in a slot. All ids are known (no ``RELAY``)."""

    prompt_ids: Int32
    completion_ids: Int32
    sampling: SequenceSampling


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """The tokens of one sequence that a step computes. ``token_ids`` and ``targets`` are views of the sequence's ids,
    which the next ``commit`` or ``plan`` may change: the runner copies them when it submits. ``rope_length`` as in
    ``StepInputs``.

    ``seq_slot`` is the sequence's slot in the executable; it stays the same until the sequence ends or is preempted.
    ``restart``: the state to set in the slot before the step (``set_sequence``); None: the slot continues with the
    state that its last step left.

    ``token_ids`` ``[count]`` are at positions ``start .. start + count``; the last may be ``RELAY``. ``block_tables``
    has one array ``[blocks]`` per KV group that covers all positions; the tuple is the same object until a table
    changes. ``adapters`` are the slots and weights of those that act on it, none for the base. The last rows of the
    chunk have logits: one for each of ``targets``, the ids to score, then one for each of ``draws``, the numbers of the
    completion tokens to draw. ``matcher`` says which ids may be drawn; None: all, or it draws none. ``spans`` divide
    the chunk of a model with states. ``prefix``: keys and values that are written before the step, those of its tokens
    from ``prefix_from`` on.
    """

    serial: int
    seq_slot: int
    restart: SequenceState | None
    start: int
    token_ids: Int32
    block_tables: tuple[Int32, ...]
    adapters: tuple[tuple[int, float], ...]
    targets: Int32
    draws: tuple[int, ...]
    matcher: Matcher | None = None
    rope_length: int = 0
    spans: tuple[Span, ...] = ()
    prefix: KvPrefix | None = None
    prefix_from: int = 0

    @property
    def count(self) -> int:
        return len(self.token_ids)

    @property
    def rows(self) -> int:
        """Rows of logits it needs."""
        return len(self.targets) + len(self.draws)


class StepPlan(msgspec.Struct, frozen=True):
    """Chunks in row order: by adapter slots, base last, then by age. ``step`` numbers plans from 1."""

    step: int
    chunks: list[Chunk]


class ChunkResult(msgspec.Struct, frozen=True, gc=False):
    """The result of one chunk: a token per draw, a score per target, or a vector (of a model that has no logits).

    ``logprobs`` and ``tops`` (the best ids and their logprobs) have an entry per token. The last chunk of a scored
    prompt gives both scores and a token. ``finite`` False: a row held a NaN or an infinity, and the other fields are
    void.
    """

    finite: bool = True
    tokens: list[int] = []
    logprobs: list[float] = []
    tops: list[TopList] = []
    scores: list[tuple[float, TopList]] = []
    vector: Float32 | None = None
