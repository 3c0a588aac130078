"""From logits to tokens: penalties, truncation, the draw, and logprobs. numpy, row by row.

Each row is computed alone and in float64, so its result does not depend on the batch. Greedy rows without penalties or
logprobs are computed together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.errors import KernelError
from truffula.kernels.inputs import Bool, Int32, SampleInputs, SequenceSampling, StepOutput

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Kept = Int64 | slice
"""Ids, ascending; a slice of all is quicker than their list."""

_BLOCK = 64  # values whose maximum `top` takes first
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10

Words = tuple[npt.NDArray[np.uint64], ...]


class Sampler:
    """Draws tokens for the sequences in ``max_seqs`` slots, and counts what each has drawn where penalties need it."""

    def __init__(self, max_seqs: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots: list[_Sequence | None] = [None] * max_seqs

    def set_sequence(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        """Begin or resume the sequence in ``slot``."""
        width = sampling.width or self._vocab_size
        if not 0 < width <= self._vocab_size:
            raise KernelError(f"width: {width} of a vocabulary of {self._vocab_size}.", param="width")
        for ids in (prompt_ids, completion_ids, sampling.bias_ids, sampling.banned_ids):
            if len(ids) and not 0 <= ids.min() <= ids.max() < width:
                vocabulary = f"the vocabulary of {width}"
                raise KernelError(f"an id of the sequence is outside {vocabulary}.", param="ids")
        self._slots[slot] = _Sequence(_as_float32(sampling), prompt_ids.copy(), completion_ids.tolist())

    def sample(self, logits: npt.NDArray[Any], samples: SampleInputs) -> StepOutput:
        """Draw (or score) one id per row of ``logits`` float32 ``[R, V]``.

        A row whose raw logits hold NaN or +Inf (or nothing above -Inf) comes back with ``finite`` False and id 0.

        Raises:
            KernelError: ``samples`` name a slot, id, draw or mask that does not exist. Nothing is counted then.
        """
        count = len(logits)
        rows = self._rows(samples, count)
        narrow = {r: row.sampling.width for r, row in enumerate(rows) if row.sampling.width}
        if any(width < self._vocab_size for width in narrow.values()):
            logits = logits.copy()
            for r, width in narrow.items():
                logits[r, width:] = -np.inf
        ids = np.argmax(logits, axis=1).astype(np.int32) if count else np.zeros(0, np.int32)
        # argmax returns a NaN first, then +Inf: its value shows whether the whole row is finite.
        finite = np.isfinite(logits[np.arange(count), ids])
        ids[~finite] = 0
        logprob = np.zeros(count, np.float32)
        width = max([0, *(row.n_logprobs for row in rows)])
        top_ids = np.full((count, width), -1, np.int32)
        top_logprobs = np.full((count, width), -np.inf, np.float32)
        others = [(r, row) for r, row in enumerate(rows) if not row.plain]
        choices = [row.sampling.choice for _, row in others]
        seeds, numbers = [row.sampling.seed for _, row in others], [row.draw for _, row in others]
        draws = uniform(seeds, choices, numbers).tolist() if others else []
        for (r, row), drawn in zip(others, draws, strict=True):
            if not finite[r]:
                continue
            raw = logits[r].astype(np.float64)
            judged = raw
            if row.target >= 0:
                ids[r] = row.target
            else:
                scores, kept = warp(logits[r], row)
                ids[r] = choose(scores, kept, row, drawn)
                if row.sampling.warped:
                    judged = np.full_like(raw, -np.inf)
                    judged[kept] = scores[kept]
            if row.n_logprobs >= 0:
                reported = log_softmax(judged)
                best = top(judged, row.n_logprobs)  # not of the logprobs: those of two near scores may be equal
                with np.errstate(over="ignore"):  # below float32's range (a small temperature): -inf
                    logprob[r] = reported[ids[r]]
                    top_ids[r, : len(best)] = best
                    top_logprobs[r, : len(best)] = reported[best]
        for r, row in others:
            if row.target < 0 and row.sampling.penalised:
                row.sequence.drawn.append(int(ids[r]))
        return StepOutput(ids, logprob, finite, top_ids, top_logprobs)

    def _rows(self, samples: SampleInputs, count: int) -> list[Row]:
        rows: list[Row] = []
        drawing: set[int] = set()
        for r in range(count):
            slot, target, draw = int(samples.row_slot[r]), int(samples.target[r]), int(samples.draw[r])
            sequence = self._slots[slot] if 0 <= slot < len(self._slots) else None
            if sequence is None:
                raise KernelError(f"row_slot: row {r} is of slot {slot}, which holds no sequence.", param="row_slot")
            width = sequence.sampling.width or self._vocab_size
            if target >= width:
                raise KernelError(f"target: {target} is outside the vocabulary.", param="target")
            allowed = None
            if target < 0:
                if slot in drawing:
                    raise KernelError(f"row_slot: two rows draw for slot {slot}.", param="row_slot")
                drawing.add(slot)
                allowed = self._allowed(samples, int(samples.mask_row[r]), width)
                if sequence.sampling.penalised and draw > len(sequence.drawn):
                    known = f"a sequence that has {len(sequence.drawn)} tokens"
                    raise KernelError(f"draw: number {draw} of {known}.", param="draw")
            rows.append(Row(sequence, target, draw, allowed))
        for row in rows:
            if row.target < 0:
                del row.sequence.drawn[row.draw :]
        return rows

    def _allowed(self, samples: SampleInputs, mask_row: int, width: int) -> Bool | None:
        if mask_row < 0:
            return None
        if mask_row >= len(samples.mask):
            raise KernelError(f"mask_row: there is no mask {mask_row}.", param="mask_row")
        bits = np.unpackbits(samples.mask[mask_row].astype("<u4").view(np.uint8), bitorder="little")
        allowed = bits[: self._vocab_size].astype(np.bool_)
        if not allowed[:width].any():
            raise KernelError(f"mask: row {mask_row} allows no id.", param="mask")
        return allowed


@dataclass(frozen=True)
class _Sequence:
    """One sequence. ``drawn`` is its completion so far; only penalties read the ids and keep them up to date."""

    sampling: SequenceSampling
    prompt_ids: Int32
    drawn: list[int]


@dataclass(frozen=True)
class Row:
    """One row to sample. ``allowed`` [V] is its mask, None without one."""

    sequence: _Sequence
    target: int
    draw: int
    allowed: Bool | None

    @property
    def sampling(self) -> SequenceSampling:
        return self.sequence.sampling

    @property
    def n_logprobs(self) -> int:
        return self.sampling.n_prompt_logprobs if self.target >= 0 else self.sampling.n_logprobs

    @property
    def banned_ids(self) -> Int32:
        return self.sampling.banned_ids[: None if self.draw < self.sampling.min_tokens else 0]

    @property
    def plain(self) -> bool:
        """Whether the row needs only the argmax of its logits."""
        return (
            self.sampling.temperature == 0.0
            and self.target < 0
            and self.n_logprobs < 0
            and self.allowed is None
            and not (len(self.sampling.bias_ids) or len(self.banned_ids) or self.sampling.penalised)
        )


def _as_float32(sampling: SequenceSampling) -> SequenceSampling:
    """``sampling`` with its numbers rounded to float32."""
    fields = vars(sampling).items()
    rounded: dict[str, Any] = {name: float(np.float32(value)) for name, value in fields if isinstance(value, float)}
    return replace(sampling, **rounded)


def warp(logits: npt.NDArray[Any], row: Row) -> tuple[Float64, Kept]:
    """The row's scores after penalties, bias, mask and temperature, float64 ``[V]``, and the ids that may be drawn.

    At least one score is finite: when every id is banned, that of the largest logit of those that the mask allows.
    """
    scores = logits.astype(np.float64)
    _penalise(scores, row)
    np.add.at(scores, row.sampling.bias_ids, row.sampling.bias_values.astype(np.float64))
    scores[row.banned_ids] = -np.inf
    if row.allowed is not None:
        scores[~row.allowed] = -np.inf
    best = scores.max()
    if best == -np.inf:
        ids = np.arange(len(scores)) if row.allowed is None else np.flatnonzero(row.allowed)
        best = scores[ids[np.argmax(logits[ids])]] = 0.0
    if row.sampling.temperature == 0.0:
        return scores, slice(None)
    scores -= best  # so that a tiny temperature cannot overflow
    scores /= row.sampling.temperature
    return scores, _kept(scores, row.sampling)


def _penalise(scores: Float64, row: Row) -> None:
    p = row.sampling
    if not p.penalised:
        return
    counts = np.bincount(np.asarray(row.sequence.drawn, np.int64), minlength=len(scores))
    seen = counts > 0
    seen[row.sequence.prompt_ids] = True
    values = scores[seen]
    values = np.where(values > 0, values / p.repetition, values * p.repetition)
    scores[seen] = values - (p.frequency * counts[seen] + p.presence * (counts[seen] > 0))


def _kept(scores: Float64, p: SequenceSampling) -> Kept:
    """Top-k, top-p, min-p, typical-p, each over the distribution that the one before it left."""
    every = np.arange(len(scores))
    kept: Kept = slice(None)
    if 0 < p.top_k < len(scores):
        kept = np.sort(top(scores, p.top_k))
    if p.top_p < 1.0:
        values = scores[kept]
        weights = np.exp(values)
        kept = every[kept][_shortest(values, weights / weights.sum(), p.top_p)]
    if p.min_p > 0.0:
        values = scores[kept]
        kept = every[kept][values >= values.max() + np.log(p.min_p)]
    if p.typical_p < 1.0:  # those whose surprise is nearest the entropy (Meister et al. 2022)
        logs = log_softmax(scores[kept])
        weights = np.exp(logs)
        entropy = -np.sum(weights[weights > 0] * logs[weights > 0])
        kept = every[kept][_shortest(-np.abs(logs + entropy), weights, p.typical_p)]
    return kept


def _shortest(rank: Float64, weights: Float64, mass: float) -> Int64:
    """The first positions by falling ``rank`` (ties to the lower) whose ``weights`` reach ``mass``, ascending; at least
    one.

    A few hundred nearly always suffice: more are sorted only for rows that need them.
    """
    for k in (256, 8192, len(rank)):
        order = top(rank, k)
        total = np.cumsum(weights[order])
        if total[-1] >= mass:
            break
    return np.sort(order[: 1 + int(np.searchsorted(total[:-1], mass, side="left"))])


def choose(scores: Float64, kept: Kept, row: Row, draw: float) -> int:
    """The most likely id when greedy; else the inverse of the cumulative distribution, ids ascending, at ``draw``."""
    if row.sampling.temperature == 0.0:
        return int(np.argmax(scores))
    total = np.cumsum(np.exp(scores[kept]))
    # side="right" finds the first id whose cumulative weight exceeds the draw: one of weight 0 is never chosen.
    position = min(int(np.searchsorted(total, draw * total[-1], side="right")), len(total) - 1)
    return position if isinstance(kept, slice) else int(kept[position])


def log_softmax(values: Float64) -> Float64:
    """float64; -inf stays -inf; at least one value is finite."""
    shifted = values - values.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def top(values: Float64, k: int) -> Int64:
    """The ids of the ``k`` largest values above -inf, best first, ties to the lower id."""
    if k <= 0:
        return np.zeros(0, np.int64)
    threshold = -np.inf
    blocks = len(values) // _BLOCK
    if 2 * k <= blocks:
        # k values reach the k-th largest block maximum, so the k-th largest value does: cheaper than partitioning all.
        maxima = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        threshold = np.partition(maxima, blocks - k)[blocks - k]
    elif k < len(values):
        threshold = np.partition(values, len(values) - k)[len(values) - k]
    candidates = np.flatnonzero((values >= threshold) & (values > -np.inf))
    return candidates[np.argsort(-values[candidates], kind="stable")][:k]


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> Words:
    """Philox4x32-10, a counter-based generator: a draw depends on its key and counter only. Four words of 32 bits (held
    in uint64) per counter and key; scalars and arrays broadcast.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", sec. 3.4 and the Random123 library.
    """
    x0, x1, x2, x3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(_ROUNDS):
        # Both factors are below 2**32, so the 64-bit product holds high and low words exactly.
        a, b = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (b >> _HALF) ^ x1 ^ k0, b & _LOW, (a >> _HALF) ^ x3 ^ k1, a & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return x0, x1, x2, x3


def uniform(seed: Any, choice: Any, draw: Any) -> Float64:
    """float64 in (0, 1), ends excluded: word 0 of key ``seed`` (uint64), counter ``(choice, draw, 0, 0)``, plus a half.

    ``seed``, ``choice`` (which completion of a request) and ``draw`` (completion tokens so far) broadcast.
    """
    seeds = np.asarray(seed, np.uint64)
    word = philox4x32((choice, draw, 0, 0), (seeds & _LOW, seeds >> _HALF))[0]
    return (word.astype(np.float64) + 0.5) / 2.0**32
