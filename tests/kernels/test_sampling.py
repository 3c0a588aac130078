"""The sampler against a plain per-row oracle, and the promises around it: distribution, independence, ties, faults."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.kernels.inputs import Capacity, SampleInputs
from truffula.kernels.philox import uniform
from truffula.kernels.sampling import sample

INF = float("inf")
CAPACITY = Capacity(
    max_tokens=8, max_seqs=8, max_logit_rows=4096, max_segments=1, num_blocks=1, block_size=1, max_blocks_per_seq=1
)
NEUTRAL = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition": 1.0, "frequency": 0.0,
    "presence": 0.0, "n_logprobs": 3, "seed": 1, "choice": 0, "draw": 0, "target": -1, "warped": 0, "seen": {},
    "bias": [],
}  # fmt: skip


def fill(rows: list[dict]) -> SampleInputs:
    samples = SampleInputs.allocate(CAPACITY)
    rows = [{**NEUTRAL, **row} for row in rows]
    for r, row in enumerate(rows):
        for name in set(NEUTRAL) - {"seen", "bias"}:
            getattr(samples, name)[r] = row[name]
    samples.seen_start[1 : len(rows) + 1] = np.cumsum([len(row["seen"]) for row in rows])
    samples.seen_ids = np.array([i for row in rows for i in row["seen"]], np.int32)
    samples.seen_counts = np.array([c for row in rows for c in row["seen"].values()], np.int32)
    samples.bias_start[1 : len(rows) + 1] = np.cumsum([len(row["bias"]) for row in rows])
    samples.bias_ids = np.array([i for row in rows for i, _ in row["bias"]], np.int32)
    samples.bias_values = np.array([v for row in rows for _, v in row["bias"]], np.float32)
    return samples


def as_sent(row: dict) -> dict:
    """``row`` with the defaults, its numbers rounded as ``SampleInputs`` (float32) carries them."""
    return {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in {**NEUTRAL, **row}.items()}


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
    for i, count in row["seen"].items():
        scores[i] = scores[i] / row["repetition"] if scores[i] > 0 else scores[i] * row["repetition"]
        scores[i] -= row["frequency"] * count + (row["presence"] if count > 0 else 0)
    for i, value in row["bias"]:
        scores[i] += value
    if max(scores.values()) == -INF:
        return {best_first(dict(enumerate(logits)))[0]: 0.0}
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
        "seed": st.integers(0, 2**64 - 1),
        "choice": st.integers(0, 3),
        "draw": st.integers(0, 1000),
        "n_logprobs": st.sampled_from([-1, 0, 1, 5, V]),
        "warped": st.integers(0, 1),
        "target": st.sampled_from([-1, -1, 3]),
    }
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(st.tuples(rows_of_logits, params), min_size=1, max_size=4))
def test_rows_equal_the_plain_oracle(batch):
    """Ids, logprobs and top lists of a batch equal those of a slow sampler that sees one row at a time."""
    logits = np.stack([row for row, _ in batch])
    got = sample(logits, fill([row for _, row in batch]))
    assert got.finite.all()
    for r, (raw, asked) in enumerate(batch):
        row = as_sent(asked)
        scores = oracle_scores(raw, row)
        wanted = row["target"] if row["target"] >= 0 else oracle_choice(scores, row)
        if row["target"] < 0 and int(got.ids[r]) != wanted:
            assert on_an_edge(raw, row), f"row {r}: {got.ids[r]}, wanted {wanted}"
            continue
        assert got.ids[r] == wanted
        if row["n_logprobs"] < 0:
            assert got.logprob[r] == 0
            continue
        p = soften(scores) if row["warped"] else soften({i: float(v) for i, v in enumerate(raw)})
        if row["warped"] and on_an_edge(raw, row):
            continue
        logs = {i: math.log(v) for i, v in p.items() if v > 0}
        assert math.isclose(got.logprob[r], logs.get(wanted, -INF), rel_tol=1e-5, abs_tol=1e-6)
        n = min(row["n_logprobs"], len(p))
        ranked = best_first(scores if row["warped"] else dict(enumerate(raw)))[:n]
        assert [i for i in got.top_ids[r].tolist() if i >= 0] == ranked
        np.testing.assert_allclose(
            got.top_logprobs[r, :n], [logs.get(i, -INF) for i in got.top_ids[r, :n].tolist()], rtol=1e-5, atol=1e-6
        )
        assert (got.top_logprobs[r, n:] == -INF).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 999), st.sampled_from([0.3, 2.0, 6.0]), st.booleans(),
    st.sampled_from(
        [{"top_k": 3}, {"top_k": 700}, {"top_p": 0.5}, {"top_p": 0.97}, {"typical_p": 0.3}, {"typical_p": 0.95},
         {"top_k": 50, "top_p": 0.9}, {"min_p": 0.01}, {"n_logprobs": 20},
         {"n_logprobs": 20, "warped": 1, "top_p": 0.6}]
    ),
)  # fmt: skip
def test_large_vocabularies_equal_the_plain_oracle(seed, spread, ties, asked):
    """Peaked, flat and full of ties: sorting only what is needed changes nothing."""
    rng = np.random.default_rng(seed)
    raw = (rng.standard_normal(3001) * spread).astype(np.float32)
    raw = np.round(raw) if ties else raw
    asked = {**asked, "seed": seed}
    got = sample(raw[None], fill([asked]))
    row = as_sent(asked)
    scores = oracle_scores(raw, row)
    assert got.ids[0] == oracle_choice(scores, row) or on_an_edge(raw, row)
    if row["n_logprobs"] == 20:
        ranked = best_first(scores if row["warped"] else dict(enumerate(raw)))[:20]
        assert [i for i in got.top_ids[0].tolist() if i >= 0] == ranked


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


def test_draws_follow_the_distribution():
    """Chi-square over many draws, with and without truncation."""
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.0], np.float32)
    for asked in ({}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"typical_p": 0.7}):
        count = 4096
        rows = [{**NEUTRAL, **asked, "n_logprobs": -1, "seed": 99, "draw": d} for d in range(count)]
        got = sample(np.tile(logits, (count, 1)), fill(rows)).ids
        expected = soften(oracle_scores(logits, as_sent(asked)))
        assert set(got.tolist()) <= set(expected)
        observed = np.bincount(got, minlength=8)
        chi = sum((observed[i] - count * p) ** 2 / (count * p) for i, p in expected.items())
        # 24.3 is the 99.9 % point for 7 degrees of freedom, the most there are here.
        assert chi < 24.3, asked


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(rows_of_logits, params), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_company(batch, random):
    """Shuffled, alone, or beside a broken row: bit for bit the same outcome."""
    logits, rows = np.stack([row for row, _ in batch]), [row for _, row in batch]
    together = sample(logits, fill(rows))
    order = list(range(len(rows)))
    random.shuffle(order)
    broken = np.concatenate([np.full((1, V), np.nan, np.float32), logits[order]])
    shuffled = sample(broken, fill([{}, *(rows[i] for i in order)]))
    for place, r in enumerate(order, start=1):
        alone = sample(logits[r : r + 1], fill([rows[r]]))
        for got, at in ((shuffled, place), (alone, 0)):
            assert got.ids[at] == together.ids[r]
            assert got.logprob[at] == together.logprob[r]
            n = max(0, rows[r]["n_logprobs"])
            assert np.array_equal(got.top_ids[at, :n], together.top_ids[r, :n])
            assert np.array_equal(got.top_logprobs[at, :n], together.top_logprobs[r, :n])
    assert not shuffled.finite[0] and shuffled.ids[0] == 0


def test_greedy_takes_the_lower_id_of_a_tie():
    logits = np.array([[1, 5, 5, 0], [2, 2, 2, 2]], np.float32)
    plain = [{"temperature": 0.0, "n_logprobs": -1}] * 2
    assert sample(logits, fill(plain)).ids.tolist() == [1, 0]
    with_logprobs = [{"temperature": 0.0, "n_logprobs": 2}] * 2
    got = sample(logits, fill(with_logprobs))
    assert got.ids.tolist() == [1, 0]
    assert got.top_ids.tolist() == [[1, 2], [0, 1]]


def test_top_k_1_is_greedy_even_among_ties():
    logits = np.tile(np.array([3, 7, 7, 7], np.float32), (64, 1))
    got = sample(logits, fill([{"top_k": 1, "draw": d, "temperature": 5.0} for d in range(64)]))
    assert set(got.ids.tolist()) == {1}


def test_penalties_and_bias_act_on_greedy():
    logits = np.tile(np.array([1.0, 3.0, 2.0, -1.0], np.float32), (5, 1))
    rows = [
        {"seen": {1: 1}, "repetition": 2.0},
        {"seen": {1: 3}, "frequency": 0.5},
        {"seen": {1: 0}, "frequency": 2.0, "presence": 2.0},  # only in the prompt: no completion counts
        {"bias": [(1, -INF)]},
        {"bias": [(3, 3.0), (3, 3.0)]},
    ]
    got = sample(logits, fill([{"temperature": 0.0, **row} for row in rows]))
    assert got.ids.tolist() == [2, 2, 1, 2, 3]


def test_something_is_always_kept():
    logits = np.array([[1.0, 4.0, 2.0]], np.float32)
    banned = [(i, -INF) for i in range(3)]
    for temperature in (0.0, 1.0):
        got = sample(logits, fill([{"bias": banned, "temperature": temperature, "warped": 1, "top_p": 1e-9}]))
        assert got.ids[0] == 1 and got.finite[0] and got.logprob[0] == 0.0


def test_extreme_temperatures_stay_finite():
    logits = np.array([[1e30, 0.0, -1e30, -INF]], np.float32)
    for temperature in (1e-30, 1e6):
        got = sample(logits, fill([{"temperature": temperature, "warped": 1}]))
        assert got.finite[0] and got.ids[0] in (0, 1) and np.isfinite(got.logprob[0])


def test_faults_stay_in_their_row():
    logits = np.zeros((5, 4), np.float32)
    logits[1, 2], logits[2, 3], logits[3, 0] = np.nan, np.inf, -np.inf
    for temperature in (0.0, 1.0):
        got = sample(logits, fill([{"temperature": temperature, "n_logprobs": 1}] * 5))
        assert got.finite.tolist() == [True, False, False, True, True]
        assert got.ids[1] == got.ids[2] == 0
        assert got.ids[3] != 0


def test_targets_are_scored_not_sampled():
    logits = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)
    got = sample(logits, fill([{"target": 1, "n_logprobs": 1}]))
    assert got.ids[0] == 1 and got.top_ids[0].tolist() == [3]
    assert math.isclose(got.logprob[0], math.log(soften({i: float(i) for i in range(4)})[1]), rel_tol=1e-6)


def test_no_rows():
    got = sample(np.zeros((0, 7), np.float32), fill([]))
    assert got.ids.shape == (0,) and got.top_ids.shape == (0, 0)
