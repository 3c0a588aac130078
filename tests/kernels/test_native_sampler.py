"""The native sampler gives the ids and log-probabilities of its specification, and refuses arrays that do not fit."""

from __future__ import annotations

import math
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import ISAS, SAMPLERS, needs_native
from sampler_rows import V, as_sent, fill, on_an_edge, params

from examples import examples

pytestmark = needs_native
SIZES = [V, 63, 64, 65, 700, 2049]  # about the blocks of 64 that the native one works in; V: the ids of `params`


def rows(seed: int, size: int, count: int, spread: float, coarse: bool, banned: int) -> np.ndarray:
    """Float32 logits, with ties where they are ``coarse``; every ``banned``-th is -inf."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((count, size)) * spread).astype(np.float32)
    logits = np.round(logits) if coarse else logits
    if banned:
        logits[:, ::banned] = -np.inf
    return logits


shapes = st.tuples(
    st.integers(0, 2**32 - 1), st.sampled_from(SIZES), st.sampled_from([0.01, 1.0, 5.0, 300.0]), st.booleans(),
    st.sampled_from([0, 0, 2, 7]),
)  # fmt: skip


@settings(max_examples=examples(100, 300))
@given(shapes, st.lists(params, min_size=1, max_size=6))
def test_it_is_the_numpy_sampler_row_for_row(shape, asked):
    """Equal ids, and log-probabilities to float32's last places: but where a draw or a mass hangs on 1e-9 of a limit,
    since the two add the same weights in another order."""
    seed, size, spread, coarse, banned = shape
    logits = rows(seed, size, len(asked), spread, coarse, banned)
    wanted = SAMPLERS["numpy"](logits, fill(asked))
    for isa in ISAS:
        got = SAMPLERS[f"cpu-{isa}"](logits, fill(asked))
        for r, one in enumerate(asked):
            same = (
                got.ids[r] == wanted.ids[r]
                and got.finite[r] == wanted.finite[r]
                and near(got.logprob[r], wanted.logprob[r])
                and got.top_ids[r].tolist() == wanted.top_ids[r].tolist()
                and all(map(near, got.top_logprobs[r], wanted.top_logprobs[r]))
            )
            assert same or on_an_edge(logits[r], as_sent(one)), (isa, r, one)


def near(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=3e-7, abs_tol=1e-7)


@settings(max_examples=60)
@given(shapes, st.lists(params, min_size=1, max_size=3))
def test_every_table_gives_the_same_bits(shape, asked):
    seed, size, spread, coarse, banned = shape
    logits = rows(seed, size, len(asked), spread, coarse, banned)
    first, *others = (SAMPLERS[f"cpu-{isa}"](logits, fill(asked)) for isa in ISAS)
    for other in others:
        for field in ("ids", "logprob", "finite", "top_ids", "top_logprobs"):
            assert getattr(other, field).tobytes() == getattr(first, field).tobytes(), field


def call(logits: object = None, width: int = 3, isa: str = "auto", **changed: object) -> None:
    samples = fill([{}, {"seen": {1: 1}, "bias": [(2, 1.0)]}])
    for name, value in changed.items():
        setattr(samples, name, value)
    logits = np.zeros((2, 5), np.float32) if logits is None else logits
    import_module("truffula.kernels.cpu._native").sample_rows(logits, samples, width, isa)


@pytest.mark.parametrize(
    "logits",
    [
        np.zeros((2, 5)), np.zeros((2, 5), np.float16), np.zeros(5, np.float32), np.zeros((2, 0), np.float32),
        np.zeros((2, 10), np.float32)[:, ::2], np.zeros((5, 2), np.float32).T, np.zeros((1, 2, 5), np.float32), [[0.0]],
    ],
    ids=["float64", "float16", "one axis", "no ids", "strided", "transposed", "three axes", "a list"],
)  # fmt: skip
def test_logits_of_another_kind_are_refused(logits):
    with pytest.raises((TypeError, ValueError)):
        call(logits)


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": np.ones(1, np.float32)}, {"top_k": np.zeros(4096)}, {"seed": np.zeros(4096, np.int64)},
        {"draw": np.zeros(8192, np.uint32)[::2]}, {"target": np.full(4096, 5, np.int32)},
        {"seen_start": np.array([0, 0, 9], np.int32)}, {"seen_start": np.array([0, -1, -1], np.int32)},
        {"seen_start": np.array([0, 1], np.int32)}, {"seen_start": np.array([0, 1, 0], np.int32)},
        {"seen_ids": np.array([5], np.int32)}, {"seen_ids": np.array([-1], np.int32)},
        {"seen_counts": np.zeros(0, np.int32)}, {"bias_ids": np.array([5], np.int32)},
        {"bias_values": np.zeros(0, np.float32)}, {"bias_start": None},
        {"n_logprobs": np.full(4096, 4, np.int32)}, {"width": -1}, {"isa": "mmx"},
    ],
    ids=str,
)  # fmt: skip
def test_samples_that_do_not_fit_are_refused(changed):
    call()
    with pytest.raises((TypeError, ValueError)):
        call(**changed)
