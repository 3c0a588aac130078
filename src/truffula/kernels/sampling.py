"""From logits to tokens: penalties, truncation, the draw, and logprobs. numpy, row by row.

A row is worked on alone and in float64, so its outcome cannot depend on its neighbours, and equal logits give equal
tokens whatever the batch. Rows that only want the most likely id are answered together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.kernels.inputs import SampledRows, SampleInputs
from truffula.kernels.philox import uniform

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """What is asked of one row: ``SampleInputs`` at its index, as Python values."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition: float
    frequency: float
    presence: float
    n_logprobs: int
    target: int
    warped: bool
    seen_ids: Int64
    seen_counts: Int64
    bias_ids: Int64
    bias_values: Float64

    @property
    def plain(self) -> bool:
        """Nothing but the most likely id of the model's own logits."""
        return (
            self.temperature == 0.0
            and self.target < 0
            and self.n_logprobs < 0
            and not len(self.bias_ids)
            and not (len(self.seen_ids) and (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0))
        )


def read_row(samples: SampleInputs, r: int) -> Row:
    """Row ``r`` of ``samples``."""
    seen = slice(int(samples.seen_start[r]), int(samples.seen_start[r + 1]))
    bias = slice(int(samples.bias_start[r]), int(samples.bias_start[r + 1]))
    return Row(
        temperature=float(samples.temperature[r]), top_k=int(samples.top_k[r]), top_p=float(samples.top_p[r]),
        min_p=float(samples.min_p[r]), typical_p=float(samples.typical_p[r]), repetition=float(samples.repetition[r]),
        frequency=float(samples.frequency[r]), presence=float(samples.presence[r]),
        n_logprobs=int(samples.n_logprobs[r]), target=int(samples.target[r]), warped=bool(samples.warped[r]),
        seen_ids=samples.seen_ids[seen].astype(np.int64), seen_counts=samples.seen_counts[seen].astype(np.int64),
        bias_ids=samples.bias_ids[bias].astype(np.int64), bias_values=samples.bias_values[bias].astype(np.float64),
    )  # fmt: skip


def sample(logits: npt.NDArray[Any], samples: SampleInputs) -> SampledRows:
    """Choose (or score) one id per row of ``logits`` float32 ``[R, V]``.

    A row whose raw logits hold NaN or +Inf (or nothing above -Inf) comes back with ``finite`` False and id 0; it never
    raises. ``logprob`` is 0 for rows with ``n_logprobs`` -1, and for those not finite.
    """
    count = len(logits)
    rows = [read_row(samples, r) for r in range(count)]
    ids = np.argmax(logits, axis=1).astype(np.int32) if count else np.zeros(0, np.int32)
    # argmax finds NaN before anything else, then +Inf: the value there tells for the whole row.
    finite = np.isfinite(logits[np.arange(count), ids])
    ids[~finite] = 0
    logprob = np.zeros(count, np.float32)
    width = max((row.n_logprobs for row in rows), default=0)
    top_ids = np.full((count, max(width, 0)), -1, np.int32)
    top_logprobs = np.full((count, max(width, 0)), -np.inf, np.float32)
    draws = uniform(samples.seed[:count], samples.choice[:count], samples.draw[:count])
    for r, row in enumerate(rows):
        if row.plain or not finite[r]:
            continue
        scores, kept = warp(logits[r], row)
        ids[r] = row.target if row.target >= 0 else choose(scores, kept, row, float(draws[r]))
        if row.n_logprobs >= 0:
            judged = restrict(scores, kept) if row.warped else logits[r].astype(np.float64)
            reported = log_softmax(judged)
            best = top(judged, row.n_logprobs)  # not of the logprobs: those of two near scores may be equal
            with np.errstate(over="ignore"):  # what float32 can't hold (a tiny temperature) is -inf
                logprob[r] = reported[ids[r]]
                top_ids[r, : len(best)] = best
                top_logprobs[r, : len(best)] = reported[best]
    return SampledRows(ids, logprob, finite, top_ids, top_logprobs)


def warp(logits: npt.NDArray[Any], row: Row) -> tuple[Float64, Int64 | None]:
    """The row's scores after penalties, bias and temperature, float64 ``[V]``, and the ids kept (ascending; None: all).

    At least one id is always kept: when every id is banned, the most likely one of the model stays.
    """
    scores = logits.astype(np.float64)
    _penalise(scores, row)
    np.add.at(scores, row.bias_ids, row.bias_values)
    best = scores.max()
    if best == -np.inf:
        best = scores[int(np.argmax(logits))] = 0.0
    if row.temperature == 0.0:
        return scores, None
    scores -= best  # so that a tiny temperature cannot overflow
    scores /= row.temperature
    return scores, _kept(scores, row)


def _penalise(scores: Float64, row: Row) -> None:
    if not len(row.seen_ids):
        return
    values = scores[row.seen_ids]
    values = np.where(values > 0, values / row.repetition, values * row.repetition)
    values -= row.frequency * row.seen_counts + row.presence * (row.seen_counts > 0)
    scores[row.seen_ids] = values


def _kept(scores: Float64, row: Row) -> Int64 | None:
    """Top-k, top-p, min-p, typical-p, each over the distribution that the one before it left."""
    kept: Int64 | None = None
    if 0 < row.top_k < len(scores):
        kept = np.sort(top(scores, row.top_k))
    if row.top_p < 1.0:
        kept = _nucleus(scores, kept, row.top_p)
    if row.min_p > 0.0:
        kept = np.arange(len(scores)) if kept is None else kept
        values = scores[kept]
        kept = kept[values >= values.max() + np.log(row.min_p)]
    if row.typical_p < 1.0:
        kept = _typical(scores, np.arange(len(scores)) if kept is None else kept, row.typical_p)
    return kept


def _nucleus(scores: Float64, kept: Int64 | None, top_p: float) -> Int64:
    """The fewest best ids whose probabilities reach ``top_p``; ties to the lower id."""
    ids = np.arange(len(scores)) if kept is None else kept
    values = scores[ids]
    weights = np.exp(values)
    return np.sort(ids[_shortest(values, weights / weights.sum(), top_p)])


def _typical(scores: Float64, ids: Int64, typical_p: float) -> Int64:
    """The ids whose surprise is nearest the entropy, until their mass reaches ``typical_p`` (Meister et al. 2022)."""
    logs = log_softmax(scores[ids])
    weights = np.exp(logs)
    possible = weights > 0
    entropy = -np.sum(weights[possible] * logs[possible])
    return np.sort(ids[_shortest(-np.abs(logs + entropy), weights, typical_p)])


def _shortest(rank: Float64, weights: Float64, mass: float) -> Int64:
    """Positions by falling ``rank`` (ties to the lower) until their ``weights`` reach ``mass``; at least one.

    A few hundred nearly always do: only a row that needs more has more of it sorted.
    """
    for k in (256, 8192, len(rank)):
        order = top(rank, k)
        total = np.cumsum(weights[order])
        if total[-1] >= mass:
            break
    return order[: 1 + int(np.searchsorted(total[:-1], mass, side="left"))]


def choose(scores: Float64, kept: Int64 | None, row: Row, draw: float) -> int:
    """The most likely id when greedy; else the inverse of the cumulative distribution, ids ascending, at ``draw``."""
    if row.temperature == 0.0:
        return int(np.argmax(scores))
    total = np.cumsum(np.exp(scores if kept is None else scores[kept]))
    # side="right" finds the first id whose cumulative weight exceeds the draw: one of weight 0 is never chosen.
    position = min(int(np.searchsorted(total, draw * total[-1], side="right")), len(total) - 1)
    return position if kept is None else int(kept[position])


def restrict(scores: Float64, kept: Int64 | None) -> Float64:
    """-inf everywhere but at ``kept``."""
    if kept is None:
        return scores
    out = np.full_like(scores, -np.inf)
    out[kept] = scores[kept]
    return out


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


_BLOCK = 64
