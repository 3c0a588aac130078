"""Rows of sampling parameters, and what a slow sampler that works on plain dicts says of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st
from kernel_backends import AnySampler

from truffula.kernels.inputs import Capacity, SampleInputs, SequenceSampling, StepOutput
from truffula.kernels.sampling import uniform

INF = float("inf")
NEUTRAL = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition": 1.0, "frequency": 0.0,
    "presence": 0.0, "n_logprobs": 3, "seed": 1, "choice": 0, "draw": 0, "target": -1, "warped": 0, "seen": {},
    "bias": [], "min_tokens": 0, "banned": [], "mask": None,
}  # fmt: skip


def as_sent(row: dict) -> dict:
    """``row`` with the defaults, its numbers rounded to float32 as samplers do; with penalties, the draw is the number
    of completion tokens seen; nothing but the model's distribution is behind a scored row."""
    row = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in {**NEUTRAL, **row}.items()}
    if (row["repetition"], row["frequency"], row["presence"]) != (1.0, 0.0, 0.0):
        row["draw"] = sum(row["seen"].values())
    if row["target"] >= 0:
        row["warped"] = 0
    return row


def sampling_of(row: dict) -> SequenceSampling:
    same = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition", "frequency", "presence", "n_logprobs",
            "seed", "choice", "min_tokens")  # fmt: skip
    return SequenceSampling(
        width=row.get("width", 0), **{name: row[name] for name in same},
        n_prompt_logprobs=row["n_logprobs"], warped=bool(row["warped"]),
        bias_ids=np.array([i for i, _ in row["bias"]], np.int32),
        bias_values=np.array([v for _, v in row["bias"]], np.float32), banned_ids=np.array(row["banned"], np.int32),
    )  # fmt: skip


def drawn(sampler: Callable[[int, int], AnySampler], logits: np.ndarray, rows: list[dict]) -> StepOutput:
    """What a new sampler gives for ``rows``, each of a sequence of its own that has seen what the row says."""
    count, vocab = logits.shape
    made = sampler(max(1, count), vocab)
    capacity = Capacity(8, max(1, count), max(1, count), 1, 1, 1, 1)
    samples = SampleInputs.allocate(capacity, vocab)
    samples.row_slot[:count] = np.arange(count)
    for r, row in enumerate(map(as_sent, rows)):
        completion = [i for i, times in row["seen"].items() for _ in range(times)]
        made.set_sequence(r, np.array(list(row["seen"]), np.int32), np.array(completion, np.int32), sampling_of(row))
        samples.target[r], samples.draw[r] = row["target"], row["draw"]
        if row["mask"] is not None:
            samples.mask_row[r] = r
            for i in row["mask"]:
                samples.mask[r, i // 32] |= np.uint32(1 << i % 32)
    return made.sample(logits, samples)


def soften(scores: dict[int, float]) -> dict[int, float]:
    top = max(scores.values())
    weights = {i: math.exp(v - top) for i, v in scores.items()}
    total = sum(weights.values())
    return {i: w / total for i, w in weights.items()}


def best_first(values: dict[int, float]) -> list[int]:
    return sorted(values, key=lambda i: (-values[i], i))


def prefix(order: list[int], p: dict[int, float], mass: float) -> list[int]:
    """The shortest prefix whose probabilities reach ``mass``, at least one id."""
    kept, total = [], 0.0
    for i in order:
        if kept and total >= mass:
            break
        kept.append(i)
        total += p[i]
    return kept


def oracle_scores(logits: np.ndarray, row: dict) -> dict[int, float]:
    """Id to score of the ids kept, in the documented order of work."""
    scores = {i: float(v) for i, v in enumerate(logits)}
    penalised = (row["repetition"], row["frequency"], row["presence"]) != (1.0, 0.0, 0.0)
    for i, count in row["seen"].items() if penalised else ():
        scores[i] = scores[i] / row["repetition"] if scores[i] > 0 else scores[i] * row["repetition"]
        scores[i] -= row["frequency"] * count + (row["presence"] if count > 0 else 0)
    for i, value in row["bias"]:
        scores[i] += value
    for i in row["banned"] if row["draw"] < row["min_tokens"] else ():
        scores[i] = -INF
    allowed = set(scores) if row["mask"] is None else row["mask"]
    scores = {i: v if i in allowed else -INF for i, v in scores.items()}
    if max(scores.values()) == -INF:
        return {best_first({i: logits[i] for i in allowed})[0]: 0.0}
    scores = {i: v for i, v in scores.items() if v > -INF}
    if row["temperature"] == 0:
        return scores
    top = max(scores.values())
    scores = {i: (v - top) / row["temperature"] for i, v in scores.items()}
    if row["top_k"]:
        scores = {i: scores[i] for i in best_first(scores)[: row["top_k"]]}
    if row["top_p"] < 1:
        scores = {i: scores[i] for i in prefix(best_first(scores), soften(scores), row["top_p"])}
    if row["min_p"] > 0:
        p = soften(scores)
        scores = {i: v for i, v in scores.items() if p[i] >= row["min_p"] * max(p.values())}
    if row["typical_p"] < 1:
        p = soften(scores)
        entropy = -sum(v * math.log(v) for v in p.values() if v > 0)
        far = {i: abs(-math.log(v) - entropy) if v > 0 else INF for i, v in p.items()}
        scores = {i: scores[i] for i in prefix(sorted(far, key=lambda i: (far[i], i)), p, row["typical_p"])}
    return scores


def oracle_choice(scores: dict[int, float], row: dict) -> int:
    if row["temperature"] == 0:
        return best_first(scores)[0]
    u, total = float(uniform(row["seed"], row["choice"], row["draw"])), 0.0
    p = soften(scores)
    for i in sorted(p):
        total += p[i]
        if total > u:
            return i
    return max(p)


V = 24
# Values from a coarse grid make ties; values in between do not.
values = st.one_of(st.integers(-4, 4).map(float), st.floats(-6, 6, width=32, allow_subnormal=False))
rows_of_logits = st.lists(values, min_size=V, max_size=V).map(lambda v: np.array(v, np.float32))
params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 5, 23, 24, 100]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.37, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "typical_p": st.sampled_from([1.0, 0.9, 0.2]),
        "repetition": st.sampled_from([1.0, 1.7, 0.5]),
        "frequency": st.sampled_from([0.0, 0.5, -1.0]),
        "presence": st.sampled_from([0.0, 0.25]),
        "seen": st.dictionaries(st.integers(0, V - 1), st.integers(0, 3), max_size=5),
        "bias": st.lists(st.tuples(st.integers(0, V - 1), st.sampled_from([-INF, -2.0, 3.5])), max_size=5),
        "min_tokens": st.sampled_from([0, 0, 2, 2000]),
        "banned": st.lists(st.integers(0, V - 1), max_size=4),
        "mask": st.one_of(st.none(), st.none(), st.sets(st.integers(0, V - 1), min_size=1)),
        "seed": st.integers(0, 2**64 - 1),
        "choice": st.integers(0, 3),
        "draw": st.integers(0, 1000),
        "n_logprobs": st.sampled_from([-1, 0, 1, 5, V]),
        "warped": st.integers(0, 1),
        "target": st.sampled_from([-1, -1, 3]),
    }
)


def on_an_edge(raw: np.ndarray, row: dict) -> bool:
    """Whether the outcome hangs on the last digits: it changes when a limit or the draw moves by 1e-9."""
    outcomes = set()
    for shift in (-1e-9, 0.0, 1e-9):
        near = dict(row)
        for name in ("top_p", "typical_p", "min_p"):
            if 0 < row[name] < 1:
                near[name] = row[name] * (1 + shift)
        scores = oracle_scores(raw, near)
        u, total, chosen = float(uniform(row["seed"], row["choice"], row["draw"])) * (1 + shift), 0.0, max(scores)
        for i, weight in sorted(soften(scores).items()):
            total += weight
            if total > u:
                chosen = i
                break
        outcomes.add((tuple(sorted(scores)), chosen))
    return len(outcomes) > 1
