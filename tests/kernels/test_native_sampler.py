"""The native sampler gives the ids and log-probabilities of its specification, and refuses arrays that do not fit."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import ISAS, SAMPLERS, NativeSampler, needs_native
from sampler_rows import V, as_sent, drawn, on_an_edge, params, sampling_of

from examples import examples
from truffula.kernels.inputs import Capacity, SampleInputs, SequenceSampling

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
    wanted = drawn(SAMPLERS["numpy"], logits, asked)
    for isa in ISAS:
        got = drawn(SAMPLERS[f"cpu-{isa}"], logits, asked)
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
    first, *others = (drawn(SAMPLERS[f"cpu-{isa}"], logits, asked) for isa in ISAS)
    for other in others:
        for field in ("ids", "logprob", "finite", "top_ids", "top_logprobs"):
            assert getattr(other, field).tobytes() == getattr(first, field).tobytes(), field


def call(**changed: object) -> None:
    """Two rows of five ids, the second with penalties and bias; ``changed`` are arrays of samples or fields."""
    sampler = NativeSampler("auto", 2, 5)
    row = {"repetition": 2.0, "bias": [(2, 1.0)]}
    sampling = sampling_of(as_sent(row))
    sequence = {"prompt_ids": np.array([0, 1], np.int32), "completion_ids": np.array([1], np.int32)}
    for name in sequence.keys() & changed.keys():
        sequence[name] = changed.pop(name)
    for field in {f.name for f in fields(SequenceSampling)} & changed.keys():
        sampling = replace(sampling, **{field: changed.pop(field)})
    sampler.set_sequence(0, **sequence, sampling=sampling)
    sampler.set_sequence(1, **sequence, sampling=sampling)
    samples = SampleInputs.allocate(Capacity(8, 2, 2, 1, 1, 1, 1), 5)
    samples.row_slot[:], samples.draw[:] = (0, 1), 1
    for name, value in changed.items():
        setattr(samples, name, value)
    sampler.sample(np.zeros((2, 5), np.float32), samples)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    "changed",
    [
        {"row_slot": i32(0)}, {"row_slot": i32(0, 2)}, {"row_slot": i32(-1, 0)}, {"row_slot": i32(1, 1)},
        {"row_slot": np.zeros(2)}, {"target": i32(5, -1)}, {"target": None}, {"draw": np.array([2, 1], np.uint32)},
        {"draw": np.ones(4, np.uint32)[::2]}, {"draw": i32(1, 1)}, {"mask_row": i32(2, -1)}, {"mask_row": i32(0, -1)},
        {"mask": np.zeros((2, 0), np.uint32)}, {"mask": np.zeros((2, 1))}, {"prompt_ids": i32(5)},
        {"prompt_ids": i32(-1)}, {"prompt_ids": np.zeros(2, np.int64)}, {"completion_ids": i32(1, 1, 7)},
        {"bias_ids": i32(5)}, {"bias_ids": i32(0, 1)}, {"bias_values": np.zeros(1)}, {"banned_ids": i32(-3)},
        {"top_k": 2**40}, {"seed": -1}, {"temperature": None},
    ],
    ids=str,
)  # fmt: skip
def test_samples_that_do_not_fit_are_refused(changed):
    call()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        call(**changed)
