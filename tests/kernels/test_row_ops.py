"""Ops that work on rows alone, against the formulas of their docstrings in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import on_every_backend
from one_op import OneOp, close, exact
from transformers.activations import XIELUActivation

from truffula.kernels.adapters import low_rank
from truffula.kernels.program import (
    Embed,
    Epilogue,
    Linear,
    ModuleSlice,
    Norm,
    Pointwise,
    Ref,
    Rope,
    RopeRegime,
    RopeRows,
    RopeTable,
    Site,
)
from truffula.testing.programs import AdapterTensors, as_dtype

quick = settings(max_examples=12, deadline=None, derandomize=True)
dtypes = st.sampled_from(["float32", "bfloat16"])
ERF = np.vectorize(math.erf)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return exact(values, dtype)


def draw(seed: int, *shape: int, dtype: str = "float32", scale: float = 1.0) -> np.ndarray:
    return exact(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "softplus": lambda x: np.log1p(np.exp(x)),
}


@on_every_backend
@quick
@given(
    dtypes, st.integers(1, 9), st.integers(1, 20), st.sampled_from([None, 4.898979]), st.booleans(), st.integers(0, 99)
)
def test_embed(backend, dtype, rows, width, scale, add, seed):
    table = draw(seed, rows + 3, width, dtype=dtype)
    case = OneOp(dtype, rows)
    extra = draw(seed + 1, rows, width, dtype=dtype)
    added = case.input(extra) if add else None
    op = Embed(
        name="e", table=case.weight(table, "rows"), out=case.buffer(width), source="position", offset=2, scale=scale,
        add=added,
    )  # fmt: skip

    def fill(inputs):
        inputs.position[:rows] = np.arange(rows)[::-1]

    wanted = table[np.arange(rows)[::-1] + 2] * (1 if scale is None else rounded(np.array(scale), dtype))
    close(case.run(backend, op, fill), wanted + extra if add else wanted, dtype)


@on_every_backend
@quick
@given(
    dtypes, st.integers(1, 60), st.sampled_from([1, 5, 16, 33, 40]), st.sampled_from([None, 4.898979]), st.booleans(),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 2), st.sampled_from([1.0, -0.5])),
             max_size=6),
    st.integers(0, 99),
)  # fmt: skip
def test_embed_with_adapters(backend, dtype, rows, width, scale, tied, segments, seed):
    """``scale · (table row + Σ weight · s · (Bᵀ of A's column))``: segments overlap, leave rows out, and cover several
    tiles; the table may be the head's panels too."""
    table = draw(seed, rows + 3, width, dtype=dtype)
    site = Site(0, "embed", None, rows + 3, width, (ModuleSlice("embed", 0, width, width),))
    case = OneOp(dtype, rows, sites=[site])
    ranks = (1, 7, 40)
    pairs = [(draw(seed + r, r, rows + 3), draw(seed + r + 1, width, r) / r) for r in ranks]
    for (a, b), stored in zip(pairs, ("float32", "bfloat16", "float16"), strict=True):
        a[:], b[:] = exact(a, "bfloat16"), exact(b, "bfloat16")
        tensors = low_rank(0, as_dtype(a, stored), as_dtype(b, stored), 0.5)
        case.adapters.append(AdapterTensors(stored, len(a), (tensors,)))
    weight = case.weight(table, "rows matmul" if tied else "rows")
    if tied:
        case.ops.append(Linear(name="head", x=case.input(table[:rows]), weight=weight, out=case.buffer(rows + 3)))
    op = Embed(name="e", table=weight, out=case.buffer(width), scale=scale, site=0)
    spans = [(min(lo, hi, rows), min(max(lo, hi), rows), number, by) for lo, hi, number, by in segments]

    def fill(inputs):
        inputs.token_ids[:rows] = np.arange(rows)[::-1]
        inputs.G = len(spans)
        for g, (lo, hi, number, by) in enumerate(spans):
            inputs.seg[g], inputs.seg_r[g], inputs.seg_weight[g] = (lo, hi, number), (0, 0), by

    ids = np.arange(rows)[::-1]
    wanted = table[ids].copy()
    for lo, hi, number, by in spans:
        a, b = pairs[number]
        wanted[lo:hi] += by * 0.5 * (b @ a[:, ids[lo:hi]]).T
    wanted *= 1 if scale is None else rounded(np.array(scale), dtype)
    close(case.run(backend, op, fill), wanted, dtype)


@on_every_backend
@quick
@given(
    dtypes, st.integers(1, 9), st.integers(1, 4), st.integers(2, 12), st.sampled_from(["rms", "layer"]),
    st.sampled_from(["first", "last"]), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_norm(backend, dtype, rows, groups, width, kind, cast, weighted, biased, plus, seed):
    x = draw(seed, rows, groups * width, dtype=dtype, scale=3.0)
    w, b, p = (
        draw(seed + 1, width, dtype=dtype),
        draw(seed + 2, width, dtype=dtype),
        draw(seed + 3, *x.shape, dtype=dtype),
    )
    case = OneOp(dtype, rows)
    op = Norm(
        name="n", x=case.input(x), out=case.buffer(groups * width), kind=kind, eps=1e-3, cast=cast, groups=groups,
        weight=case.weight(w, "vector") if weighted else None, bias=case.weight(b, "vector") if biased else None,
        plus=case.input(p) if plus else None,
    )  # fmt: skip
    y = x.reshape(rows, groups, width)
    if kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3)
    y = rounded(y, dtype) if cast == "first" else y
    y = (y * w if weighted else y) + (b if biased else 0)
    y = y.reshape(rows, -1)
    close(case.run(backend, op), rounded(y, dtype) + p if plus else y, dtype, roundings=3)


@on_every_backend
def test_norm_order_of_rounding_shows_in_bfloat16(backend):
    """The two casts differ in bfloat16, each equal to its own formula in nearly every value."""
    x, w = draw(1, 50, 64, dtype="bfloat16"), draw(2, 64, dtype="bfloat16")
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    results = {}
    for cast, wanted in (("first", rounded(normed, "bfloat16") * w), ("last", normed * w)):
        case = OneOp("bfloat16", 50)
        weight = case.weight(w, "vector")
        op = Norm(name="n", x=case.input(x), out=case.buffer(64), kind="rms", eps=1e-5, cast=cast, weight=weight)
        results[cast] = case.run(backend, op)
        assert (results[cast] == rounded(wanted, "bfloat16")).mean() > 0.99
    assert (results["first"] != results["last"]).mean() > 0.05


@on_every_backend
@quick
@given(
    dtypes, st.integers(1, 6), st.integers(1, 9),
    st.sampled_from(["act", "add", "scale", "clip", "softcap", "sigmoid_mul", "position_scale"]),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.integers(0, 99),
)  # fmt: skip
def test_pointwise(backend, dtype, rows, width, kind, activation, seed):
    x, y = draw(seed, rows, width, dtype=dtype, scale=2.0), draw(seed + 1, rows, width, dtype=dtype)
    case = OneOp(dtype, rows)
    two = kind in ("add", "sigmoid_mul")
    op = Pointwise(
        name="p", kind=kind, x=case.input(x), out=case.buffer(width), y=case.input(y) if two else None,
        activation=activation if kind == "act" else None,
        params={"scale": (1.5,), "clip": (1.5,), "softcap": (1.5,), "position_scale": (0.7, 3.0, 1.0)}.get(kind, ()),
    )  # fmt: skip
    positions = np.arange(rows) * 5 + seed

    def fill(inputs):
        inputs.position[:rows] = positions

    wanted = {
        "act": lambda: ACTIVATIONS[activation](x), "add": lambda: x + y, "scale": lambda: x * 1.5,
        "clip": lambda: np.clip(x, -1.5, 1.5), "softcap": lambda: 1.5 * np.tanh(x / 1.5),
        "sigmoid_mul": lambda: x / (1 + np.exp(-y)),
        "position_scale": lambda: x * (1 + 0.7 * np.log(1 + np.floor((positions + 1) / 3)))[:, None],
    }[kind]()  # fmt: skip
    close(case.run(backend, op, fill), wanted, dtype)


@on_every_backend
@quick
@given(dtypes, st.integers(1, 6), st.integers(1, 40), st.integers(0, 99))
def test_xielu_is_that_of_transformers(backend, dtype, rows, width, seed):
    module = XIELUActivation(alpha_p_init=0.3 + seed / 50, alpha_n_init=0.9 + seed / 40, dtype=torch.float32)
    numbers = np.array([module.alpha_p.item(), module.alpha_n.item(), module.beta.item(), module.eps.item()])
    x = draw(seed, rows, width, dtype=dtype, scale=3.0)
    case = OneOp(dtype, rows)
    weight = case.weight(exact(numbers, dtype), "vector")
    op = Pointwise(name="p", kind="xielu", x=case.input(x), out=case.buffer(width), weight=weight)
    module.alpha_p.data[0], module.alpha_n.data[0], module.beta, module.eps = torch.tensor(exact(numbers, dtype))
    close(case.run(backend, op), module._xielu_python(torch.tensor(x)).detach().numpy(), dtype)


@on_every_backend
@quick
@given(dtypes, st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 3, 16, 19]), st.booleans(),
       st.sampled_from(["rms", "layer"]), st.integers(0, 99))  # fmt: skip
def test_norm_with_a_weight_for_each_group(backend, dtype, rows, groups, width, with_bias, kind, seed):
    x, weight = draw(seed, rows, groups * width, dtype=dtype), draw(seed + 1, groups * width, dtype=dtype)
    bias = draw(seed + 2, groups * width, dtype=dtype) if with_bias else None
    case = OneOp(dtype, rows)
    op = Norm(name="n", x=case.input(x), out=case.buffer(groups * width), kind=kind, eps=1e-3, groups=groups,
              cast="last", weight=case.weight(weight, "vector"),
              bias=None if bias is None else case.weight(bias, "vector"))  # fmt: skip
    parts = x.reshape(rows, groups, width)
    centred = parts - parts.mean(-1, keepdims=True) if kind == "layer" else parts
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    wanted = normed.reshape(x.shape) * weight + (0 if bias is None else bias)
    close(case.run(backend, op), wanted, dtype)


@on_every_backend
@quick
@given(dtypes, st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3),
       st.sampled_from(["half", "interleaved"]), st.integers(0, 99))  # fmt: skip
def test_rope(backend, dtype, rows, heads, pairs, before, behind, layout, seed):
    dims, head_dim = 2 * pairs, before + 2 * pairs + behind
    x = draw(seed, rows, heads * head_dim, dtype=dtype)
    other = draw(seed + 1, rows, 3, dtype=dtype)
    freq = tuple(0.5**i for i in range(pairs))
    positions = np.random.default_rng(seed).integers(0, 500, rows)
    case = OneOp(dtype, rows, tables=[RopeTable(0, freq, factor=1.25)])
    whole = case.buffer(heads * head_dim + 3)  # the rotated columns are part of a wider buffer
    ref = Ref(whole.buffer, 3, heads * head_dim)
    case.input(other, Ref(whole.buffer, 0, 3))
    case.input(x, ref)
    table = case.buffer(dims, dtype="float32")
    case.ops.append(RopeRows(name="rows", table=0, out=table))
    op = Rope(name="r", x=ref, rows=table, heads=heads, head_dim=head_dim, start=before, dims=dims, layout=layout)

    def fill(inputs):
        inputs.rope_pos[0, :rows] = positions

    angle = positions[:, None] * np.array(freq)
    wanted = x.reshape(rows, heads, head_dim).copy()
    for i in range(pairs):
        a, b = (before + i, before + i + pairs) if layout == "half" else (before + 2 * i, before + 2 * i + 1)
        cos, sin = 1.25 * np.cos(angle[:, i, None]), 1.25 * np.sin(angle[:, i, None])
        left, right = wanted[..., a].copy(), wanted[..., b].copy()
        wanted[..., a], wanted[..., b] = left * cos - right * sin, right * cos + left * sin
    # Positions up to 500 radians: float32 angles are good to 2^-15 there.
    got = case.run(backend, op, fill)
    np.testing.assert_allclose(got, wanted.reshape(rows, -1), atol=3e-4 if dtype == "float32" else 4e-2, rtol=1e-2)


@on_every_backend
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_rows_by_length(backend, kind):
    """Rows of one step take the table of their sequence's length, or of their position where that is beyond it."""
    freq, long = (1.0, 0.25, 0.1), (0.5, 0.2, 0.05)
    table = RopeTable(0, freq, 1.25, border=16, **({"long_freq": long} if kind == "longrope" else {"growth": 3.0}))
    positions, lengths = np.array([3, 3, 15, 16, 40, 40]), np.array([16, 17, 0, 0, 41, 90])
    case = OneOp("float32", len(positions), tables=[table], regime=RopeRegime(16, grows=kind == "dynamic"))
    out = case.buffer(6, dtype="float32")

    def fill(inputs):
        inputs.rope_pos[0, : len(positions)], inputs.rope_length[: len(positions)] = positions, lengths

    got = case.run(backend, RopeRows(name="rows", table=0, out=out), fill)
    for row, position, length in zip(got, positions, np.maximum(lengths, positions + 1), strict=True):
        wanted = np.array(freq)
        if length > 16:
            wanted = np.array(long) if kind == "longrope" else freq / (3 * length / 16 - 2) ** (np.arange(3) / 2)
        angles = position * wanted
        np.testing.assert_allclose(row, 1.25 * np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-5)


def oracle_epilogue(y, e, bias, residual):
    y = y + bias if e.bias is not None else y
    y = np.clip(y, -e.clip, e.clip) if e.clip is not None else y
    act = ACTIVATIONS[e.activation] if e.activation else (lambda v: v)
    if e.glu:
        gate, up = np.split(y, 2, axis=1)
        y = act(gate) * up
    else:
        y = act(y)
    return y * e.scale + (residual if e.residual is not None else 0)


@on_every_backend
@settings(quick, max_examples=25)
@given(dtypes, st.integers(1, 9), st.integers(1, 20), st.integers(1, 10), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from([None, "silu", "gelu_tanh"]), st.sampled_from([1.0, 0.22]), st.sampled_from([None, 0.7]),
       st.booleans(), st.integers(0, 99))  # fmt: skip
def test_linear_with_epilogue(backend, dtype, rows, inputs, half, glu, biased, added, act, scale, clip, split, seed):
    outputs = 2 * half
    x, w = draw(seed, rows, inputs, dtype=dtype), draw(seed + 1, outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    bias, residual = draw(seed + 2, outputs, dtype=dtype), draw(seed + 3, rows, half if glu else outputs, dtype=dtype)
    case = OneOp(dtype, rows)
    weight = case.weight(w, "matmul", [half] if split else None)
    e = Epilogue(
        bias=case.weight(bias, "vector") if biased else None, clip=clip, activation=act, glu=glu, scale=scale,
        residual=case.input(residual) if added else None,
    )  # fmt: skip
    op = Linear(name="l", x=case.input(x), weight=weight, out=case.buffer(half if glu else outputs), epilogue=e)
    wanted = oracle_epilogue(x @ w.T, e, bias, residual)
    # The reference rounds the base product in bfloat16; 2^-9 of it can be tripled by gelu's slope and by the gate.
    close(case.run(backend, op), wanted, dtype, roundings=4)


@on_every_backend
@pytest.mark.parametrize("glu", [False, True])
def test_a_clip_bounds_numbers_and_hides_no_nan(backend, glu):
    x, w = draw(1, 3, 8), draw(2, 8, 8, scale=9.0)
    x[1, 2] = np.nan
    for clip in (0.0, 0.5):
        case = OneOp("float32", 3)
        epilogue = Epilogue(clip=clip, glu=glu)
        op = Linear(name="l", x=case.input(x), weight=case.weight(w, "matmul"), out=case.buffer(4 if glu else 8),
                    epilogue=epilogue)  # fmt: skip
        got = case.run(backend, op)
        assert np.isnan(got[1]).all() and np.abs(got[[0, 2]]).max() <= clip


@on_every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 12, 13, 48, 49, 63])
def test_products_of_many_rows_and_panels(backend, dtype, glu, rows):
    """Rows and outputs on both sides of a tile's edges, and inputs that are odd."""
    x, w = draw(1, rows, 131, dtype=dtype), draw(2, 2 * 41, 131, dtype=dtype, scale=0.1)
    case = OneOp(dtype, rows)
    epilogue = Epilogue(activation="silu" if glu else None, glu=glu)
    op = Linear(
        name="l", x=case.input(x), weight=case.weight(w, "matmul"), out=case.buffer(41 if glu else 82),
        epilogue=epilogue,
    )  # fmt: skip
    close(case.run(backend, op), oracle_epilogue(x @ w.T, epilogue, None, None), dtype)


@on_every_backend
def test_float32_linear_in_a_bfloat16_program(backend):
    """``compute="float32"`` (a router) keeps the product and the output exact."""
    x, w = draw(1, 7, 33, dtype="bfloat16"), draw(2, 5, 33, dtype="bfloat16")
    case = OneOp("bfloat16", 7)
    out, weight = case.buffer(5, dtype="float32"), case.weight(w, "matmul")
    op = Linear(name="l", x=case.input(x), weight=weight, out=out, compute="float32")
    np.testing.assert_allclose(case.run(backend, op), x @ w.T, atol=1e-5, rtol=1e-5)


@on_every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gathered_row_is_the_stored_row(backend, dtype):
    """A table that also serves a product gives back its rows bit for bit."""
    table = draw(5, 9, 6, dtype=dtype)
    case = OneOp(dtype, 4)
    op = Embed(name="e", table=case.weight(table, "rows matmul"), out=case.buffer(6))
    assert np.array_equal(case.run(backend, op), table[:4].astype(np.float32))
