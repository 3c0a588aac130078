"""Each sampler against a plain per-row oracle, and the promises around it: distribution, independence, ties, faults."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import SAMPLERS, on_every_sampler
from sampler_rows import (
    INF,
    NEUTRAL,
    V,
    as_sent,
    best_first,
    drawn,
    on_an_edge,
    oracle_choice,
    oracle_scores,
    params,
    rows_of_logits,
    soften,
)

from examples import examples


@on_every_sampler
@settings(max_examples=examples(40, 120))
@given(st.lists(st.tuples(rows_of_logits, params), min_size=1, max_size=4), st.data())
def test_rows_of_fewer_ids_are_as_if_the_others_were_not_there(sampler, batch, data):
    """Beside rows of all ids; whatever is in the columns behind."""
    rows = [{**row, "width": V} for _, row in batch]
    behind = data.draw(st.sampled_from([np.nan, INF, 9.0, -3.0]))
    wide = np.full((len(rows) + 1, V + data.draw(st.integers(1, 40))), behind, np.float32)
    wide[:-1, :V], wide[-1] = [logits for logits, _ in batch], np.arange(wide.shape[1])
    alone = drawn(sampler, np.stack([logits for logits, _ in batch]), [row for _, row in batch])
    beside = drawn(sampler, wide, [*rows, {**NEUTRAL, "temperature": 0.0, "n_logprobs": -1}])
    assert beside.ids[-1] == wide.shape[1] - 1 and beside.finite.all()
    for r, (logits, row) in enumerate(batch):
        if on_an_edge(logits, as_sent(row)):
            continue
        assert beside.ids[r] == alone.ids[r] and beside.top_ids[r].tolist() == alone.top_ids[r].tolist()
        np.testing.assert_allclose(beside.logprob[r], alone.logprob[r], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(beside.top_logprobs[r], alone.top_logprobs[r], rtol=1e-5, atol=1e-6)


@settings(max_examples=examples(80, 120))
@given(st.lists(st.tuples(rows_of_logits, params), min_size=1, max_size=4))
def test_rows_equal_the_plain_oracle(batch):
    """Ids, logprobs and top lists of a batch equal those of a slow sampler that sees one row at a time."""
    logits = np.stack([row for row, _ in batch])
    found = {name: drawn(sampler, logits, [row for _, row in batch]) for name, sampler in SAMPLERS.items()}
    for r, (raw, asked) in enumerate(batch):
        row = as_sent(asked)
        scores = oracle_scores(raw, row)
        wanted = row["target"] if row["target"] >= 0 else oracle_choice(scores, row)
        p = soften(scores) if row["warped"] else soften({i: float(v) for i, v in enumerate(raw)})
        logs = {i: math.log(v) for i, v in p.items() if v > 0}
        n = min(row["n_logprobs"], len(p))
        ranked = best_first(scores if row["warped"] else dict(enumerate(raw)))[: max(0, n)]
        for name, got in found.items():
            assert got.finite.all(), name
            if row["target"] < 0 and int(got.ids[r]) != wanted:
                assert on_an_edge(raw, row), f"{name}, row {r}: {got.ids[r]}, wanted {wanted}"
                continue
            assert got.ids[r] == wanted, name
            if row["n_logprobs"] < 0:
                assert got.logprob[r] == 0, name
                continue
            if row["warped"] and on_an_edge(raw, row):
                continue
            assert math.isclose(got.logprob[r], logs.get(wanted, -INF), rel_tol=1e-5, abs_tol=1e-6), name
            assert [i for i in got.top_ids[r].tolist() if i >= 0] == ranked, name
            np.testing.assert_allclose(
                got.top_logprobs[r, :n], [logs.get(i, -INF) for i in ranked], rtol=1e-5, atol=1e-6, err_msg=name
            )
            assert (got.top_logprobs[r, n:] == -INF).all(), name


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
    row = as_sent(asked)
    scores = oracle_scores(raw, row)
    wanted = oracle_choice(scores, row)
    ranked = best_first(scores if row["warped"] else dict(enumerate(raw)))[:20]
    for name, sampler in SAMPLERS.items():
        got = drawn(sampler, raw[None], [asked])
        assert got.ids[0] == wanted or on_an_edge(raw, row), name
        if row["n_logprobs"] == 20:
            assert [i for i in got.top_ids[0].tolist() if i >= 0] == ranked, name


@on_every_sampler
def test_draws_follow_the_distribution(sampler):
    """Chi-square over many draws, with and without truncation."""
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.0], np.float32)
    for asked in ({}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"typical_p": 0.7}):
        count = 4096
        rows = [{**NEUTRAL, **asked, "n_logprobs": -1, "seed": 99, "draw": d} for d in range(count)]
        got = drawn(sampler, np.tile(logits, (count, 1)), rows).ids
        expected = soften(oracle_scores(logits, as_sent(asked)))
        assert set(got.tolist()) <= set(expected)
        observed = np.bincount(got, minlength=8)
        chi = sum((observed[i] - count * p) ** 2 / (count * p) for i, p in expected.items())
        # 24.3 is the 99.9 % point for 7 degrees of freedom, the most there are here.
        assert chi < 24.3, asked


@on_every_sampler
@settings(max_examples=examples(20, 50))
@given(st.lists(st.tuples(rows_of_logits, params), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_company(sampler, batch, random):
    """Shuffled, alone, or beside a broken row: bit for bit the same outcome."""
    logits, rows = np.stack([row for row, _ in batch]), [row for _, row in batch]
    together = drawn(sampler, logits, rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    broken = np.concatenate([np.full((1, V), np.nan, np.float32), logits[order]])
    shuffled = drawn(sampler, broken, [{}, *(rows[i] for i in order)])
    for place, r in enumerate(order, start=1):
        alone = drawn(sampler, logits[r : r + 1], [rows[r]])
        for got, at in ((shuffled, place), (alone, 0)):
            assert got.ids[at] == together.ids[r]
            assert got.logprob[at] == together.logprob[r]
            n = max(0, rows[r]["n_logprobs"])
            assert np.array_equal(got.top_ids[at, :n], together.top_ids[r, :n])
            assert np.array_equal(got.top_logprobs[at, :n], together.top_logprobs[r, :n])
    assert not shuffled.finite[0] and shuffled.ids[0] == 0


@on_every_sampler
def test_greedy_takes_the_lower_id_of_a_tie(sampler):
    logits = np.array([[1, 5, 5, 0], [2, 2, 2, 2]], np.float32)
    plain = [{"temperature": 0.0, "n_logprobs": -1}] * 2
    assert drawn(sampler, logits, plain).ids.tolist() == [1, 0]
    with_logprobs = [{"temperature": 0.0, "n_logprobs": 2}] * 2
    got = drawn(sampler, logits, with_logprobs)
    assert got.ids.tolist() == [1, 0]
    assert got.top_ids.tolist() == [[1, 2], [0, 1]]


@on_every_sampler
def test_top_k_1_is_greedy_even_among_ties(sampler):
    logits = np.tile(np.array([3, 7, 7, 7], np.float32), (64, 1))
    got = drawn(sampler, logits, [{"top_k": 1, "draw": d, "temperature": 5.0} for d in range(64)])
    assert set(got.ids.tolist()) == {1}


@on_every_sampler
def test_penalties_and_bias_act_on_greedy(sampler):
    logits = np.tile(np.array([1.0, 3.0, 2.0, -1.0], np.float32), (5, 1))
    rows = [
        {"seen": {1: 1}, "repetition": 2.0},
        {"seen": {1: 3}, "frequency": 0.5},
        {"seen": {1: 0}, "frequency": 2.0, "presence": 2.0},  # only in the prompt: no completion counts
        {"bias": [(1, -INF)]},
        {"bias": [(3, 3.0), (3, 3.0)]},
    ]
    got = drawn(sampler, logits, [{"temperature": 0.0, **row} for row in rows])
    assert got.ids.tolist() == [2, 2, 1, 2, 3]


@on_every_sampler
def test_something_is_always_kept(sampler):
    logits = np.array([[1.0, 4.0, 2.0]], np.float32)
    banned = [(i, -INF) for i in range(3)]
    for temperature in (0.0, 1.0):
        got = drawn(sampler, logits, [{"bias": banned, "temperature": temperature, "warped": 1, "top_p": 1e-9}])
        assert got.ids[0] == 1 and got.finite[0] and got.logprob[0] == 0.0


@on_every_sampler
def test_extreme_temperatures_stay_finite(sampler):
    logits = np.array([[1e30, 0.0, -1e30, -INF]], np.float32)
    for temperature in (1e-30, 1e6):
        got = drawn(sampler, logits, [{"temperature": temperature, "warped": 1}])
        assert got.finite[0] and got.ids[0] in (0, 1) and np.isfinite(got.logprob[0])


@on_every_sampler
def test_faults_stay_in_their_row(sampler):
    logits = np.zeros((5, 4), np.float32)
    logits[1, 2], logits[2, 3], logits[3, 0] = np.nan, np.inf, -np.inf
    for temperature in (0.0, 1.0):
        got = drawn(sampler, logits, [{"temperature": temperature, "n_logprobs": 1}] * 5)
        assert got.finite.tolist() == [True, False, False, True, True]
        assert got.ids[1] == got.ids[2] == 0
        assert got.ids[3] != 0


@on_every_sampler
def test_targets_are_scored_not_sampled(sampler):
    logits = np.array([[0.0, 1.0, 2.0, 3.0]], np.float32)
    got = drawn(sampler, logits, [{"target": 1, "n_logprobs": 1}])
    assert got.ids[0] == 1 and got.top_ids[0].tolist() == [3]
    assert math.isclose(got.logprob[0], math.log(soften({i: float(i) for i in range(4)})[1]), rel_tol=1e-6)


@on_every_sampler
def test_no_rows(sampler):
    got = drawn(sampler, np.zeros((0, 7), np.float32), [])
    assert got.ids.shape == (0,) and got.top_ids.shape == (0, 0)
