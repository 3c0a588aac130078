"""Philox4x32-10 against the published vectors, and the uniform numbers made of it."""

from __future__ import annotations

import numpy as np
import pytest

from truffula.kernels.sampling import philox4x32, uniform

F = 0xFFFFFFFF
# Random123's kat_vectors, philox4x32 10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    assert tuple(int(word) for word in philox4x32(counter, key)) == result


def test_arrays_give_what_scalars_give():
    counters = np.array([k[0] for k in KNOWN], np.uint64).T
    keys = np.array([k[1] for k in KNOWN], np.uint64).T
    words = np.stack(philox4x32(tuple(counters), tuple(keys)), 1)
    assert words.tolist() == [list(k[2]) for k in KNOWN]


def slow_philox(counter, key):
    """The paper's definition in Python integers."""
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(b >> 32) ^ x[1] ^ k[0], b & F, (a >> 32) ^ x[3] ^ k[1], a & F]
        k = [(k[0] + 0x9E3779B9) & F, (k[1] + 0xBB67AE85) & F]
    return tuple(x)


def test_uniform_is_word_0_by_seed_choice_and_draw():
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**64, 50, np.uint64)
    choices, draws = rng.integers(0, 2**32, 50, np.uint32), rng.integers(0, 2**32, 50, np.uint32)
    got = uniform(seeds, choices, draws)
    for seed, choice, draw, u in zip(seeds.tolist(), choices.tolist(), draws.tolist(), got, strict=True):
        assert u == (slow_philox((choice, draw, 0, 0), (seed & F, seed >> 32))[0] + 0.5) / 2**32


def test_uniform_never_reaches_its_ends_and_is_flat():
    values = uniform(np.uint64(7), np.uint32(0), np.arange(40000, dtype=np.uint32))
    assert values.min() > 0 and values.max() < 1
    counts = np.histogram(values, 100, (0, 1))[0]
    # chi-square with 99 degrees of freedom: 149 is its 99.9 % point.
    assert ((counts - 400) ** 2 / 400).sum() < 149
