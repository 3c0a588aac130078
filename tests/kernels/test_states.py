"""Ops with sequence states: the same whether a sequence is computed in one span or in many, beside any others."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import BACKENDS, on_every_backend
from one_op import CAPACITY, OneOp, close, exact
from spans import fill_spans, sequences

from truffula.errors import KernelError
from truffula.kernels.program import CausalConv, Mamba2, RecurrentState

quick = settings(max_examples=20, deadline=None, derandomize=True)
SILU = {"silu": lambda x: x / (1 + np.exp(-x)), None: lambda x: x}


@on_every_backend
@quick
@given(
    st.sampled_from(["float32", "bfloat16"]), sequences, st.sampled_from([3, 16, 40]), st.sampled_from([2, 3, 4]),
    st.sampled_from(["silu", None]), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_causal_conv(backend, dtype, lengths, width, taps, activation, biased, in_place, seed):
    rng = np.random.default_rng(seed)
    rows = sum(map(sum, lengths))
    x, weight, bias = (exact(rng.standard_normal(s), dtype) for s in ((rows, width), (width, taps), (width,)))
    case = OneOp(dtype, rows, states=[RecurrentState(0, 0, (taps - 1) * width, "model")])
    op = CausalConv(
        name="conv", x=case.input(x), out=case.buffer(width), weight=case.weight(weight, "conv"), state=0,
        bias=case.weight(bias, "vector") if biased else None, activation=activation,
    )  # fmt: skip
    found = case.run(backend, op, lambda inputs: fill_spans(inputs, lengths, in_place=in_place))
    at = 0
    for spans in lengths:
        count = sum(spans)
        padded = np.concatenate([np.zeros((taps - 1, width)), x[at : at + count]])
        wanted = sum(padded[k : k + count] * weight[:, k] for k in range(taps)) + (bias if biased else 0)
        close(found[at : at + count], SILU[activation](wanted), dtype)
        at += count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.state_out.fill(0), "state_out"),
        (lambda i: i.state_in.fill(CAPACITY.num_states), "state_in"),
        (lambda i: i.span_start.fill(0), "span_start"),
        (lambda i: (i.q_start.__setitem__(1, 2), i.kv_len.fill(6)), "two sequences"),
        (lambda i: setattr(i, "Z", 0), "Z"),
    ],
)
def test_the_native_backend_rejects_spans_out_of_range(change, message):
    for name, backend in BACKENDS.items():
        if name == "reference":
            continue
        case = OneOp("float32", 6, states=[RecurrentState(0, 0, 8)])
        op = CausalConv(
            name="conv", x=case.input(np.ones((6, 4))), out=case.buffer(4), state=0,
            weight=case.weight(np.ones((4, 3)), "conv"),
        )  # fmt: skip

        def fill(inputs):
            fill_spans(inputs, [[3], [3]], in_place=False)
            change(inputs)

        with pytest.raises(KernelError, match=message):
            case.run(backend, op, fill)


@on_every_backend
@quick
@given(
    st.sampled_from(["float32", "bfloat16"]), sequences, st.sampled_from([(1, 1, 1), (4, 2, 5), (6, 3, 16), (2, 1, 7)]),
    st.sampled_from([3, 16, 40]), st.sampled_from([(0.0, math.inf), (0.3, 0.9)]), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_mamba2(backend, dtype, lengths, shape, size, limit, each, in_place, seed):
    """``each`` column of a state has a rate of its own, or all of a head have one."""
    heads, groups, width = shape
    rng = np.random.default_rng(seed)
    rows = sum(map(sum, lengths))
    x, b, c, dt, dt_bias, skip = (
        exact(rng.standard_normal(s), dtype)
        for s in (
            (rows, heads * width),
            (rows, groups * size),
            (rows, groups * size),
            (rows, heads),
            (heads,),
            (heads,),
        )
    )
    rate = exact(-np.exp(rng.standard_normal((heads, size if each else 1))), dtype)
    case = OneOp(dtype, rows, states=[RecurrentState(0, 0, heads * width * size)])
    op = Mamba2(
        name="scan", x=case.input(x), b=case.input(b), c=case.input(c), dt=case.input(dt), state=0,
        out=case.buffer(heads * width), rate=case.weight(rate.ravel(), "vector"),
        dt_bias=case.weight(dt_bias, "vector"), skip=case.weight(skip, "vector"), heads=heads, head_dim=width,
        groups=groups, state_size=size, dt_limit=limit,
    )  # fmt: skip
    found = case.run(backend, op, lambda inputs: fill_spans(inputs, lengths, in_place=in_place))
    wanted, at = np.zeros((rows, heads, width)), 0
    for spans in lengths:
        state = np.zeros((heads, width, size))
        for t in range(at, at + sum(spans)):
            step = np.clip(np.log1p(np.exp(dt[t] + dt_bias)), *limit)
            values, keys, queries = x[t].reshape(heads, width), *(y[t].reshape(groups, size) for y in (b, c))
            keys, queries = (np.repeat(y, heads // groups, 0) for y in (keys, queries))
            state *= np.exp(rate * step[:, None])[:, None]
            state += (step[:, None] * values)[:, :, None] * keys[:, None]
            wanted[t] = (state * queries[:, None]).sum(-1) + skip[:, None] * values
        at += sum(spans)
    close(found, wanted.reshape(rows, -1), dtype)
