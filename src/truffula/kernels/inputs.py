"""The inputs and outputs of a step: numpy arrays of fixed capacity, owned by an executable and filled by the runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Int32 = npt.NDArray[np.int32]
Uint32 = npt.NDArray[np.uint32]
Uint64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]

NO_IDS: Int32 = np.zeros(0, np.int32)
NO_VALUES: Float32 = np.zeros(0, np.float32)
SPANS_PER_SEQUENCE = 3
"""Spans of one sequence in a step: so many snapshots of its state may be taken, the last one behind its last row."""
RELAY = -1
"""In ``token_ids``: the token last drawn for the row's sequence slot, which the host may not know yet."""


@dataclass(frozen=True)
class Capacity:
    """Upper bounds of a step, of the KV memory and of the state rows. Block 0 is scratch: no sequence owns it."""

    max_tokens: int  # T
    max_seqs: int  # N
    max_logit_rows: int  # R
    max_segments: int  # G
    num_blocks: int  # P, scratch included
    block_size: int  # S
    max_blocks_per_seq: int  # M
    num_states: int = 0  # state rows, row 0 included; 0: the program has no states

    @property
    def max_spans(self) -> int:  # Z
        """Spans of a step: see ``StepInputs``."""
        return min(SPANS_PER_SEQUENCE * self.max_seqs, self.max_tokens) if self.num_states else 0


@dataclass
class StepInputs:
    """One step. Rows are sorted by adapter slot, base rows last, and within it by sequence; a sequence's rows are
    adjacent.

    Sequence n owns rows ``q_start[n] .. q_start[n + 1]``, its keys after the step are positions 0 .. kv_len[n], found
    in ``block_tables[group, n]``, whose entries beyond those keys are not read; row t's K and V go to slot
    ``slot_mapping[group, t]`` (block * block_size + offset). ``seq_slot[n]`` (0 .. max_seqs - 1) is the sequence's
    slot while it runs: the executable keeps its sampling state there. A token id may be ``RELAY``.
    ``rope_length[t]`` is the length of the row's sequence by which rotary tables are chosen, 0 if none depends on it;
    where ``rope_pos[0, t] + 1`` is larger, that is used.
    The rows of a program with states are divided into spans: ``span_start[z] .. span_start[z + 1]`` belong to one
    sequence, which has one or several, in order. A span begins with the state in row ``state_in[z]`` and leaves the
    state after its last token in row ``state_out[z]``; the next span of its sequence begins with that row. Row 0 is all
    zeros, the state before a sequence's first token, and is never written. The two may be the same row.
    ``seg[g] = (lo, hi, adapter slot)`` over T rows, ``seg_r[g] = (lo, hi)`` the same segment over R rows; base rows are
    in no segment; segments may overlap (composition), each with its ``seg_weight``. ``logit_rows`` ascends.
    """

    T: int
    N: int
    R: int
    G: int
    token_ids: Int32  # [T]
    position: Int32  # [T]
    rope_pos: Int32  # [3, T]
    rope_length: Int32  # [T]
    slot_mapping: Int32  # [Q, T]
    block_tables: Int32  # [Q, N, M]
    q_start: Int32  # [N + 1]
    kv_len: Int32  # [N]
    seq_slot: Int32  # [N]
    seg: Int32  # [G, 3]
    seg_r: Int32  # [G, 2]
    seg_weight: Float32  # [G]
    logit_rows: Int32  # [R]
    span_start: Int32  # [Z + 1]
    state_in: Int32  # [Z]
    state_out: Int32  # [Z]
    Z: int = 0

    @classmethod
    def allocate(cls, capacity: Capacity, groups: int) -> StepInputs:
        c = capacity
        zeros: Callable[..., Int32] = lambda *shape: np.zeros(shape, np.int32)
        return cls(
            0, 0, 0, 0,
            token_ids=zeros(c.max_tokens), position=zeros(c.max_tokens), rope_pos=zeros(3, c.max_tokens),
            rope_length=zeros(c.max_tokens), slot_mapping=zeros(groups, c.max_tokens),
            block_tables=zeros(groups, c.max_seqs, c.max_blocks_per_seq),
            q_start=zeros(c.max_seqs + 1), kv_len=zeros(c.max_seqs), seq_slot=zeros(c.max_seqs),
            seg=zeros(c.max_segments, 3), seg_r=zeros(c.max_segments, 2),
            seg_weight=np.ones(c.max_segments, np.float32), logit_rows=zeros(c.max_logit_rows),
            span_start=zeros(c.max_spans + 1), state_in=zeros(c.max_spans), state_out=zeros(c.max_spans),
        )  # fmt: skip


@dataclass(frozen=True)
class SequenceSampling:
    """How the tokens of one sequence are drawn. The defaults are greedy, without logprobs.

    Samplers round the floats to float32. ``width``: only ids below it may be drawn, and logprobs are of these; 0: all.
    ``n_logprobs`` -1: none; k: of the k best and of the one drawn;
    ``n_prompt_logprobs`` likewise for scored rows. ``warped``: logprobs are those of the distribution drawn from,
    instead of the model's. ``bias_values`` are added to the logits of ``bias_ids``; -inf bans an id. ``banned_ids`` are
    banned until the sequence has ``min_tokens`` completion tokens. ``seed``, ``choice`` and the number of the draw
    address the random number.
    """

    temperature: float = 0.0
    width: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    n_logprobs: int = -1
    n_prompt_logprobs: int = -1
    seed: int = 0
    choice: int = 0
    warped: bool = False
    bias_ids: Int32 = field(default_factory=lambda: NO_IDS)
    bias_values: Float32 = field(default_factory=lambda: NO_VALUES)
    min_tokens: int = 0
    banned_ids: Int32 = field(default_factory=lambda: NO_IDS)

    @property
    def penalised(self) -> bool:
        """Whether penalties are set; only then are tokens counted."""
        return (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0)


@dataclass
class SampleInputs:
    """How the R rows of logits are sampled, besides the ``SequenceSampling`` of each row's sequence.

    ``row_slot`` is the ``seq_slot`` of the row's sequence. ``target`` -1 draws a token, else scores that id by the
    model's own distribution (prompt logprobs). ``draw`` is the number of completion tokens that the sequence has before
    this draw, resumed ones included. ``mask_row`` -1 allows every id, else only those whose bit (id % 32 of word
    id // 32) is set in that row of ``mask``, at least one (grammars). Only rows 0 .. R count. All is known at
    ``submit``, except for ``mask``: see there.
    """

    row_slot: Int32  # [R]
    target: Int32  # [R]
    draw: Uint32  # [R]
    mask_row: Int32  # [R]
    mask: Uint32  # [max_seqs, words of the vocabulary]

    @classmethod
    def allocate(cls, capacity: Capacity, vocab_size: int) -> SampleInputs:
        R = capacity.max_logit_rows
        return cls(
            row_slot=np.zeros(R, np.int32), target=np.full(R, -1, np.int32), draw=np.zeros(R, np.uint32),
            mask_row=np.full(R, -1, np.int32), mask=np.zeros((capacity.max_seqs, -(-vocab_size // 32)), np.uint32),
        )  # fmt: skip


@dataclass(frozen=True)
class StepOutput:
    """Per row: the id (drawn, or the scored target), its logprob, and whether the row's logits were finite.

    A row that is not finite has id 0. ``logprob`` is 0 where none was requested. ``top_ids``, ``top_logprobs``
    ``[R, kmax]`` best first, ties to the lower id, -1 / -inf beyond a row's k. A model whose output is a vector gives
    ``vectors`` ``[R, width]`` and draws nothing: ids are -1.
    """

    ids: Int32
    logprob: Float32
    finite: Bool
    top_ids: Int32
    top_logprobs: Float32
    vectors: Float32 | None = None
