"""Latent attention against a float64 formula that computes the keys and values of every head, with any adapters."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from adapter_parts import random_parts
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import NATIVE, on_every_backend
from one_op import OneOp, close, exact

from truffula.kernels.adapters import ColumnScale, LowRank, SiteTensors
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import KvGroup, KvPlane, Mla, ModuleSlice, Site, SiteSlice
from truffula.testing.programs import AdapterTensors, as_dtype, decoder_program, pull_from, random_weights
from truffula.testing.tiny import tiny_config

S = 4
SCALE = 0.6


def oracle(q, latent, kv_b, op, chosen=None, bias=0.0):
    """``q [L, H·(nope + rope)]``, ``latent [L, rank + rope]`` of one sequence, ``kv_b`` with its adapters; rows
    ``chosen``, or all."""
    length = len(q)
    q = q.reshape(length, op.heads, -1)
    expanded = (latent[:, : op.rank] @ kv_b.T + bias).reshape(length, op.heads, op.nope + op.dim_v)
    rotated = np.repeat(latent[:, None, op.rank :], op.heads, 1)
    keys, values = np.concatenate([expanded[..., : op.nope], rotated], -1), expanded[..., op.nope :]
    out = []
    for i in range(length) if chosen is None else chosen:
        scores = op.scale * np.einsum("hd,jhd->hj", q[i], keys[: i + 1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(np.einsum("hj,jhd->hd", weights / weights.sum(-1, keepdims=True), values[: i + 1]).ravel())
    return np.stack(out)


def latent_op(case, rng, rows, shape):
    """The op over random inputs, and those inputs in float64. ``shape``: heads, nope, rope, dim_v, rank."""
    heads, nope, rope, dim_v, rank = shape
    q = exact(rng.standard_normal((rows, heads * (nope + rope))), case.dtype)
    latent = exact(rng.standard_normal((rows, rank + rope)), case.dtype)
    outputs = heads * (nope + dim_v)
    kv_b = exact(rng.standard_normal((outputs, rank)) * rank**-0.5, case.dtype)
    case.groups.append(KvGroup(0, (KvPlane(0, 0, rank + rope),)))
    case.sites.append(Site(0, "linear", 0, rank, outputs, (ModuleSlice("kv_b_proj", 0, outputs, outputs),)))
    op = Mla(
        name="mla", q=case.input(q), latent=case.input(latent), out=case.buffer(heads * dim_v), group=0, plane=0,
        kv_b=case.weight(kv_b, "matmul"), slices=(SiteSlice(0, 0, outputs),), heads=heads, nope=nope, rope=rope,
        dim_v=dim_v, rank=rank, scale=SCALE,
    )  # fmt: skip
    return op, q, latent, kv_b


adapters = st.tuples(
    st.lists(st.sampled_from([1, 3, 16, 21]), min_size=1, max_size=2),
    st.lists(st.sampled_from(["column_scale", "bias"]), unique=True),
)


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 13), min_size=1, max_size=4))
    return {
        "lengths": lengths,
        # Of each sequence: its adapters, each with the ranks and other kinds of its parts.
        "adapters": [draw(st.lists(adapters, max_size=2)) for _ in lengths],
        "shape": [draw(st.integers(1, most)) for most in (4, 18, 6, 18, 20)],
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "stored": draw(st.sampled_from(["float32", "bfloat16"])),
        "seed": draw(st.integers(0, 99)),
    }


@on_every_backend
@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases())
def test_any_mix_equals_expanded_heads_with_folded_adapters(backend, case_):
    c = case_
    rng = np.random.default_rng(c["seed"])
    case = OneOp(c["dtype"], sum(c["lengths"]))
    op, q, latent, kv_b = latent_op(case, rng, sum(c["lengths"]), c["shape"])
    free = list(rng.permutation(np.arange(1, 40)))
    starts = np.cumsum([0, *c["lengths"]])
    segments, folded = [], []
    for n, of_sequence in enumerate(c["adapters"]):
        folded.append([kv_b.copy(), np.zeros(len(kv_b))])
        for ranks, kinds in of_sequence:
            weight, own, parts = float(rng.choice([1.0, 0.5, -2.0])), kv_b.copy(), []
            for rank in ranks:
                a = as_dtype(rng.standard_normal((rank, op.rank)) * op.rank**-0.5, c["stored"])
                b = as_dtype(rng.standard_normal((len(kv_b), rank)) * rank**-0.5, c["stored"])
                own += 0.75 * (b.astype(np.float64) @ a.astype(np.float64))
                parts.append(LowRank(a, b, 0.75))
            for part in random_parts(rng, kinds, op.rank, len(kv_b), c["stored"]):
                parts.append(part)
                if isinstance(part, ColumnScale):
                    own *= part.factor.astype(np.float64)[:, None]
                else:
                    folded[n][1] += weight * part.values.astype(np.float64)
            folded[n][0] += weight * (own - kv_b)
            segments.append((starts[n], starts[n + 1], len(case.adapters), weight))
            case.adapters.append(AdapterTensors(f"g{len(segments)}", 1, (SiteTensors(0, tuple(parts)),)))

    def fill(inputs):
        inputs.N, inputs.G = len(c["lengths"]), len(segments)
        for g, (lo, hi, slot, weight) in enumerate(segments):
            inputs.seg[g], inputs.seg_r[g], inputs.seg_weight[g] = (lo, hi, slot), (0, 0), weight
        for n, length in enumerate(c["lengths"]):
            blocks = np.array([free.pop() for _ in range(-(-length // S))])
            position, lo = np.arange(length), starts[n]
            inputs.slot_mapping[0, lo : lo + length] = blocks[position // S] * S + position % S
            inputs.block_tables[0, n] = -1
            inputs.block_tables[0, n, : len(blocks)] = blocks
            inputs.q_start[n], inputs.q_start[n + 1], inputs.kv_len[n] = lo, lo + length, length

    spans = [slice(lo, hi) for lo, hi in pairwise(starts)]
    wanted = [
        oracle(q[span], latent[span], matrix, op, bias=bias) for span, (matrix, bias) in zip(spans, folded, strict=True)
    ]
    close(case.run(backend, op, fill), np.concatenate(wanted), c["dtype"], roundings=2)


@on_every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "size", "shape"),
    [(530, 16, (26, 5, 2, 3, 20)), (600, 24, (2, 7, 2, 5, 33)), (520, 80, (3, 16, 8, 16, 16))],
    ids=str,
)
def test_long_contexts(backend, dtype, rows, size, shape):
    """More keys than a backend works on at once, and block sizes that divide nothing."""
    rng = np.random.default_rng(5)
    blocks = rng.permutation(np.arange(1, -(-rows // size) + 1))
    capacity = Capacity(
        max_tokens=rows, max_seqs=1, max_logit_rows=4, max_segments=1, num_blocks=len(blocks) + 1, block_size=size,
        max_blocks_per_seq=len(blocks),
    )  # fmt: skip
    case = OneOp(dtype, rows, capacity=capacity)
    op, q, latent, kv_b = latent_op(case, rng, rows, shape)

    def fill(inputs):
        position = np.arange(rows)
        inputs.slot_mapping[0, :rows] = blocks[position // size] * size + position % size
        inputs.block_tables[0, 0, : len(blocks)] = blocks

    # The last rows see the most keys, those around 512 the edge of what is worked on at once.
    chosen = [0, 1, *range(508, 516), rows - 1]
    close(case.run(backend, op, fill)[chosen], oracle(q, latent, kv_b, op, chosen), dtype, roundings=2)


@pytest.mark.parametrize("backend", NATIVE.values(), ids=NATIVE.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_one_row_per_token_and_the_matrix_once(backend, dtype):
    program = decoder_program(tiny_config("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=2))
    capacity = Capacity(8, 1, 1, 1, num_blocks=3, block_size=4, max_blocks_per_seq=2)
    plan = backend.plan(program, dtype, capacity)
    width = 4 if dtype == "float32" else 2
    # A row of 18 + 6 numbers, padded to 32.
    assert plan.kv_block_bytes == (2 * 4 * 32 * width,)
    matrices = {decl.id: decl for decl in program.weights if decl.name.endswith("kv_b_proj.weight")}
    assert [decl.shape for decl in matrices.values()] == [(4 * (10 + 12), 18)] * 2
    executable = backend.load(program, dtype, pull_from(random_weights(program)), capacity)
    executable.close()
