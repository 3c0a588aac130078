"""The sampler in plain numpy, row by row: an oracle for backends, and what ``HashModel`` samples with."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from truffula.errors import KernelError
from truffula.kernels.inputs import Int32, SampleInputs, SequenceSampling, StepOutput
from truffula.kernels.sampling import uniform

Row = npt.NDArray[np.float64]
Kept = npt.NDArray[np.bool_]


class PlainSequence:
    """A sequence and how it is sampled. What the penalties need is counted anew for each row."""

    def __init__(self, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        self.prompt = set(prompt_ids.tolist())
        self.completion: list[int] = completion_ids.tolist()
        self.sampling = sampling

    def seen(self, draw: int) -> tuple[Int32, Int32]:
        """Distinct ids before draw number ``draw``, and how often each is in the completion."""
        counts = Counter(self.completion[:draw])
        ids = sorted(self.prompt | counts.keys())
        return np.array(ids, np.int32), np.array([counts[i] for i in ids], np.int32)

    def n_logprobs(self, target: int) -> int:
        return self.sampling.n_prompt_logprobs if target >= 0 else self.sampling.n_logprobs


def sample_rows(logits: npt.NDArray[np.float32], s: SampleInputs, sequences: dict[int, PlainSequence]) -> StepOutput:
    """What a step gives for ``logits`` ``[R, V]`` and the sequences by slot, in ``SamplingParams``' order of work."""
    R = len(logits)
    of_row = [sequences[slot] for slot in s.row_slot[:R].tolist()]
    wanted = [sequence.n_logprobs(target) for sequence, target in zip(of_row, s.target[:R].tolist(), strict=True)]
    kmax = max([0, *wanted])
    ids, logprob = np.zeros(R, np.int32), np.zeros(R, np.float32)
    finite = np.asarray(np.isfinite(logits).all(axis=1), np.bool_)
    top_ids, top_logprobs = np.full((R, kmax), -1, np.int32), np.full((R, kmax), -np.inf, np.float32)
    for r, sequence in enumerate(of_row):
        if not finite[r]:
            continue
        raw, width = logits[r].astype(np.float64), sequence.sampling.width or logits.shape[1]
        raw[width:] = -np.inf
        ids[r], shown = int(s.target[r]), _log_softmax(raw)
        if ids[r] < 0:
            warped, keep = _warp(raw, s, r, sequence)
            ids[r] = _draw(warped, keep, int(s.draw[r]), sequence.sampling)
            if sequence.sampling.warped:
                shown = _log_softmax(np.where(keep, warped, -np.inf))
        if wanted[r] >= 0:
            logprob[r] = shown[ids[r]]
        k = min(wanted[r], width)
        if k > 0:
            best = np.lexsort((np.arange(len(shown)), -shown))[:k]
            top_ids[r, :k], top_logprobs[r, :k] = best, shown[best]
    for r, sequence in enumerate(of_row):
        if s.target[r] < 0:
            if s.draw[r] > len(sequence.completion):
                raise KernelError(f"row {r} draws number {s.draw[r]} of {len(sequence.completion)} tokens.")
            sequence.completion[int(s.draw[r]) :] = [int(ids[r])]
    return StepOutput(ids, logprob, finite, top_ids, top_logprobs)


def _warp(raw: Row, s: SampleInputs, r: int, sequence: PlainSequence) -> tuple[Row, Kept]:
    """Logits after penalties, bias, mask and temperature, and which ids the truncations keep."""
    x, p, draw = raw.copy(), sequence.sampling, int(s.draw[r])
    if p.penalised:
        ids, counts = sequence.seen(draw)
        x[ids] = np.where(x[ids] > 0, x[ids] / np.float32(p.repetition), x[ids] * np.float32(p.repetition))
        x[ids] -= np.float32(p.frequency) * counts + np.float32(p.presence) * (counts > 0)
    np.add.at(x, p.bias_ids, p.bias_values)
    if draw < p.min_tokens:
        x[p.banned_ids] = -np.inf
    if s.mask_row[r] >= 0:
        words = s.mask[s.mask_row[r]]
        masked = [i for i in range(len(x)) if not words[i // 32] >> np.uint32(i % 32) & np.uint32(1)]
        x[masked] = -np.inf
        if (x == -np.inf).all():  # banned by other rules: the best of those that the mask allows
            allowed = np.setdiff1d(np.arange(len(x)), masked)
            x[allowed[np.argmax(raw[allowed])]] = 0.0
    if p.temperature == 0:
        return x, np.isfinite(x)
    x /= float(np.float32(p.temperature))
    keep = np.isfinite(x)
    if 0 < p.top_k < len(x):
        keep &= _ranks(x) < p.top_k
    if p.top_p < 1:
        probs = _probabilities(x, keep)
        order = np.lexsort((np.arange(len(probs)), -probs))
        before = np.cumsum(probs[order]) - probs[order]
        keep[order[before >= np.float32(p.top_p)]] = False
    if p.min_p > 0:
        probs = _probabilities(x, keep)
        keep &= probs >= np.float32(p.min_p) * probs.max()
    if p.typical_p < 1:
        probs = _probabilities(x, keep)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(probs)
            entropy = float(np.sum(np.where(probs > 0, probs * surprise, 0.0)))
        distance = np.where(keep, np.abs(surprise - entropy), np.inf)
        order = np.lexsort((np.arange(len(probs)), distance))
        before = np.cumsum(probs[order]) - probs[order]
        keep[order[before >= np.float32(p.typical_p)]] = False
    return x, keep


def _ranks(x: Row) -> npt.NDArray[np.int64]:
    ranks = np.empty(len(x), np.int64)
    ranks[np.lexsort((np.arange(len(x)), -x))] = np.arange(len(x))
    return ranks


def _probabilities(x: Row, keep: Kept) -> Row:
    p = np.where(keep, np.exp(x - x[keep].max()), 0.0)
    return np.asarray(p / p.sum())


def _draw(x: Row, keep: Kept, draw: int, p: SequenceSampling) -> int:
    if p.temperature == 0:
        return int(np.argmax(x))
    sums = np.cumsum(_probabilities(x, keep))
    u = float(uniform(p.seed, p.choice, draw))
    place = int(np.searchsorted(sums, u * sums[-1], side="right"))
    return min(place, int(np.flatnonzero(keep)[-1]))


def _log_softmax(x: Row) -> Row:
    top = x.max()
    return np.asarray(x - top - np.log(np.exp(x - top).sum()))
