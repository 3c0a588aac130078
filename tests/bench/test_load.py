"""Which prompts, with which adapters, when: all of it follows from the seed."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace

import pytest

from truffula.bench.load import Load, arrivals, used

NAMES = tuple(f"a{i}" for i in range(20))
LOAD = Load(2000, 1, 8, 4, NAMES, 500, seed=5, zipf=1.0)


def test_zipf_asks_for_each_adapter_by_its_rank() -> None:
    counts = Counter(used(LOAD))
    harmonic = sum(1 / k for k in range(1, 21))
    for rank in (1, 2, 5, 10):
        expected = 2000 / rank / harmonic
        assert counts[f"a{rank - 1}"] == pytest.approx(expected, abs=4 * expected**0.5)


def test_zipf_of_exponent_zero_draws_evenly() -> None:
    counts = Counter(used(replace(LOAD, zipf=0.0)))
    assert all(count == pytest.approx(100, abs=45) for count in counts.values()) and len(counts) == 20


def test_same_seed_same_adapters_and_another_seed_others() -> None:
    assert used(LOAD) == used(replace(LOAD))
    assert used(LOAD) != used(replace(LOAD, seed=6))


def test_each_client_of_distinct_has_an_adapter_of_its_own() -> None:
    assert used(Load(3, 2, 8, 4, NAMES, 500)) == ["a0", "a0", "a1", "a1", "a2", "a2"]


def test_arrivals_are_poisson() -> None:
    at = arrivals(50.0, 4000, seed=1)
    gaps = [b - a for a, b in zip([0.0, *at], at, strict=False)]
    assert min(gaps) > 0
    # An exponential distribution's mean and deviation are both 1 / rate.
    assert statistics.fmean(gaps) == pytest.approx(0.02, rel=0.07)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=0.1)


def test_arrivals_follow_from_the_seed() -> None:
    assert arrivals(3.0, 50, seed=2) == arrivals(3.0, 50, seed=2)
    assert arrivals(3.0, 50, seed=2) != arrivals(3.0, 50, seed=3)


def test_prompts_share_no_beginning() -> None:
    first = {LOAD.prompt(client, request)[0] for client in range(8) for request in range(2)}
    prompts = {tuple(LOAD.prompt(client, request)) for client in range(8) for request in range(2)}
    assert len(prompts) == 16 and len(first) > 12
