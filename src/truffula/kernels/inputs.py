"""All that varies from step to step: numpy arrays of fixed capacity, owned by an executable, filled by the runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Uint32 = npt.NDArray[np.uint32]
Uint64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]
Uint8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Capacity:
    """Upper bounds of a step and of the KV memory. Block 0 is scratch: it is never given to a sequence."""

    max_tokens: int  # T
    max_seqs: int  # N
    max_logit_rows: int  # R
    max_segments: int  # G
    num_blocks: int  # P, scratch included
    block_size: int  # S
    max_blocks_per_seq: int  # M
    max_adapters: int = 1 << 20


@dataclass
class StepInputs:
    """One step. Rows are sorted by adapter slot, base rows last, and within it by sequence; a sequence's rows are
    adjacent.

    Sequence n owns rows ``q_start[n] .. q_start[n + 1]``, its keys after the step are positions 0 .. kv_len[n], found
    in ``block_tables[group, n]``; row t's K and V go to slot ``slot_mapping[group, t]`` (block * block_size + offset).
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
    slot_mapping: Int32  # [Q, T]
    block_tables: Int32  # [Q, N, M]
    q_start: Int32  # [N + 1]
    kv_len: Int32  # [N]
    seg: Int32  # [G, 3]
    seg_r: Int32  # [G, 2]
    seg_weight: Float32  # [G]
    logit_rows: Int32  # [R]

    @classmethod
    def allocate(cls, capacity: Capacity, groups: int) -> StepInputs:
        c = capacity
        zeros: Callable[..., Int32] = lambda *shape: np.zeros(shape, np.int32)
        return cls(
            0, 0, 0, 0,
            token_ids=zeros(c.max_tokens), position=zeros(c.max_tokens), rope_pos=zeros(3, c.max_tokens),
            slot_mapping=zeros(groups, c.max_tokens), block_tables=zeros(groups, c.max_seqs, c.max_blocks_per_seq),
            q_start=zeros(c.max_seqs + 1), kv_len=zeros(c.max_seqs), seg=zeros(c.max_segments, 3),
            seg_r=zeros(c.max_segments, 2), seg_weight=np.ones(c.max_segments, np.float32),
            logit_rows=zeros(c.max_logit_rows),
        )  # fmt: skip


@dataclass
class SampleInputs:
    """What is done with the R rows of logits. Neutral values switch a thing off.

    ``target`` -1 samples, else scores that id (prompt logprobs). ``n_logprobs`` -1 wants none, k the k best besides
    the chosen one.
    ``draw`` is the number of completion tokens the sequence already has, resumed ones included. ``seen`` is CSR:
    row r's distinct ids are ``seen_ids[seen_start[r]:seen_start[r+1]]`` with ``seen_counts`` in the completion (0 =
    only in the prompt). ``bias`` is CSR likewise; -inf bans. Only rows 0 .. R count; CSR arrays are replaced each step.
    """

    temperature: Float32
    top_k: Int32
    top_p: Float32
    min_p: Float32
    typical_p: Float32
    repetition: Float32
    frequency: Float32
    presence: Float32
    n_logprobs: Int32
    seed: Uint64
    choice: Uint32
    draw: Uint32
    target: Int32
    warped: Uint8
    seen_start: Int32
    seen_ids: Int32
    seen_counts: Int32
    bias_start: Int32
    bias_ids: Int32
    bias_values: Float32

    @classmethod
    def allocate(cls, capacity: Capacity) -> SampleInputs:
        R = capacity.max_logit_rows
        f32: Callable[[float], Float32] = lambda value: np.full(R, value, np.float32)
        return cls(
            temperature=f32(0), top_k=np.zeros(R, np.int32), top_p=f32(1), min_p=f32(0), typical_p=f32(1),
            repetition=f32(1), frequency=f32(0), presence=f32(0), n_logprobs=np.full(R, -1, np.int32),
            seed=np.zeros(R, np.uint64), choice=np.zeros(R, np.uint32), draw=np.zeros(R, np.uint32),
            target=np.full(R, -1, np.int32), warped=np.zeros(R, np.uint8),
            seen_start=np.zeros(R + 1, np.int32), seen_ids=np.zeros(0, np.int32), seen_counts=np.zeros(0, np.int32),
            bias_start=np.zeros(R + 1, np.int32), bias_ids=np.zeros(0, np.int32), bias_values=np.zeros(0, np.float32),
        )  # fmt: skip


@dataclass(frozen=True)
class SampledRows:
    """Per row: the id (sampled, or the scored target), its logprob, and whether the row's logits were finite.

    ``top_ids``, ``top_logprobs`` ``[R, kmax]`` best first, ties to the lower id, -1 / -inf beyond a row's k.
    """

    ids: Int32
    logprob: Float32
    finite: Bool
    top_ids: Int32
    top_logprobs: Float32
