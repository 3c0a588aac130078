"""The sampler in plain numpy, row by row: an oracle for backends, and what ``HashModel`` samples with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from truffula.kernels.inputs import SampledRows, SampleInputs
from truffula.kernels.philox import uniform

Row = npt.NDArray[np.float64]


def sample_rows(logits: npt.NDArray[np.float32], s: SampleInputs) -> SampledRows:
    """What ``Executable.sample`` gives for ``logits`` ``[R, V]``, in ``SamplingParams``' order of work."""
    R = len(logits)
    kmax = max(0, int(s.n_logprobs[:R].max(initial=0)))
    ids, logprob = np.zeros(R, np.int32), np.zeros(R, np.float32)
    finite = np.asarray(np.isfinite(logits).all(axis=1), np.bool_)
    top_ids, top_logprobs = np.full((R, kmax), -1, np.int32), np.full((R, kmax), -np.inf, np.float32)
    for r in range(R):
        if not finite[r]:
            continue
        raw = logits[r].astype(np.float64)
        warped, keep = _warp(raw, s, r)
        target = int(s.target[r])
        ids[r] = target if target >= 0 else _draw(warped, keep, s, r)
        shown = _log_softmax(np.where(keep, warped, -np.inf)) if s.warped[r] else _log_softmax(raw)
        logprob[r] = shown[ids[r]]
        k = min(int(s.n_logprobs[r]), len(raw))
        if k > 0:
            best = np.lexsort((np.arange(len(shown)), -shown))[:k]
            top_ids[r, :k], top_logprobs[r, :k] = best, shown[best]
    return SampledRows(ids, logprob, finite, top_ids, top_logprobs)


def _warp(raw: Row, s: SampleInputs, r: int) -> tuple[Row, npt.NDArray[np.bool_]]:
    """Logits after penalties, bias and temperature, and which ids the truncations keep."""
    x = raw.copy()
    seen = slice(int(s.seen_start[r]), int(s.seen_start[r + 1]))
    ids, counts = s.seen_ids[seen], s.seen_counts[seen]
    x[ids] = np.where(x[ids] > 0, x[ids] / s.repetition[r], x[ids] * s.repetition[r])
    x[ids] -= s.frequency[r] * counts + s.presence[r] * (counts > 0)
    bias = slice(int(s.bias_start[r]), int(s.bias_start[r + 1]))
    np.add.at(x, s.bias_ids[bias], s.bias_values[bias])
    if s.temperature[r] == 0:
        return x, np.isfinite(x)
    x /= float(s.temperature[r])
    keep = np.isfinite(x)
    if 0 < s.top_k[r] < len(x):
        keep &= _ranks(x) < s.top_k[r]
    if s.top_p[r] < 1:
        p = _probabilities(x, keep)
        order = np.lexsort((np.arange(len(p)), -p))
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= s.top_p[r]]] = False
    if s.min_p[r] > 0:
        p = _probabilities(x, keep)
        keep &= p >= s.min_p[r] * p.max()
    if s.typical_p[r] < 1:
        p = _probabilities(x, keep)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(p)
            entropy = float(np.sum(np.where(p > 0, p * surprise, 0.0)))
        distance = np.where(keep, np.abs(surprise - entropy), np.inf)
        order = np.lexsort((np.arange(len(p)), distance))
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= s.typical_p[r]]] = False
    return x, keep


def _ranks(x: Row) -> npt.NDArray[np.int64]:
    ranks = np.empty(len(x), np.int64)
    ranks[np.lexsort((np.arange(len(x)), -x))] = np.arange(len(x))
    return ranks


def _probabilities(x: Row, keep: npt.NDArray[np.bool_]) -> Row:
    p = np.where(keep, np.exp(x - x[keep].max()), 0.0)
    return np.asarray(p / p.sum())


def _draw(x: Row, keep: npt.NDArray[np.bool_], s: SampleInputs, r: int) -> int:
    if s.temperature[r] == 0:
        return int(np.argmax(x))
    sums = np.cumsum(_probabilities(x, keep))
    u = float(uniform(s.seed[r], s.choice[r], s.draw[r]))
    place = int(np.searchsorted(sums, u * sums[-1], side="right"))
    return min(place, int(np.flatnonzero(keep)[-1]))


def _log_softmax(x: Row) -> Row:
    top = x.max()
    return np.asarray(x - top - np.log(np.exp(x - top).sum()))
