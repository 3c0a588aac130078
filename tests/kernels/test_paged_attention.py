"""Attention over paged KV against a float64 formula, and what paging, chunking and neighbours must not change."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import BACKENDS, on_every_backend, on_every_fast_backend
from llama_program import Shape, llama_program
from one_op import OneOp, close, exact

from truffula.errors import KernelError
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Attention, KvGroup, KvPlane
from truffula.kernels.reference import attention
from truffula.testing.programs import Part, attach, fill_step, pull_from, random_adapter, random_weights

S = 4


def oracle(q, k, v, op, sinks, chosen=None):
    """``q [L, H, E]``, ``k [L, K, E]``, ``v [L, K, W]`` of one sequence from its start; rows ``chosen``, or all."""
    chosen = range(len(q)) if chosen is None else chosen
    out = np.zeros((len(chosen), op.heads, op.dim_v))
    for at, i in enumerate(chosen):
        for h in range(op.heads):
            g = h // (op.heads // op.kv_heads)
            first = 0 if op.window is None else max(0, i - op.window + 1)
            scores = op.scale * (k[first : i + 1, g] @ q[i, h])
            if op.softcap is not None:
                scores = op.softcap * np.tanh(scores / op.softcap)
            if op.alibi:
                keys = np.arange(first, i + 1)
                keys = exact(keys, "bfloat16") if op.alibi_rounded else keys
                bias = op.alibi[h] * keys
                scores = scores + (op.scale * exact(bias, "bfloat16") if op.alibi_rounded else bias)
            top = max(scores.max(), sinks[h] if sinks is not None else -np.inf)
            weights = np.exp(scores - top)
            total = weights.sum() + (np.exp(sinks[h] - top) if sinks is not None else 0)
            out[at, h] = (weights / total) @ v[first : i + 1, g]
    return out.reshape(len(chosen), -1)


def slopes(heads):
    """In float32, a different one for each head."""
    return tuple(float(np.float32(0.5 ** (h + 1) * 1.3)) for h in range(heads))


@st.composite
def cases(draw):
    kv_heads, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "lengths": draw(st.lists(st.integers(1, 13), min_size=1, max_size=4)),
        "heads": kv_heads * share, "kv_heads": kv_heads,
        "dim_k": draw(st.integers(1, 6)), "dim_v": draw(st.integers(1, 6)),
        "window": draw(st.sampled_from([None, 1, 3, 8])), "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": draw(st.booleans()),
        "alibi": draw(st.sampled_from(["none", "exact", "rounded"])),
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@on_every_backend
@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_attention_over_shuffled_blocks(backend, case_):
    c = case_
    rng = np.random.default_rng(c["seed"])
    rows = sum(c["lengths"])
    q, k, v = (
        exact(rng.standard_normal((rows, n)), c["dtype"])
        for n in (c["heads"] * c["dim_k"], c["kv_heads"] * c["dim_k"], c["kv_heads"] * c["dim_v"])
    )
    sinks = exact(rng.standard_normal(c["heads"]), c["dtype"]) if c["sinks"] else None
    group = KvGroup(0, (KvPlane(0, 0, k.shape[1]), KvPlane(1, 0, v.shape[1])))
    case = OneOp(c["dtype"], rows, groups=[group])
    op = Attention(
        name="a", q=case.input(q), k=case.input(k), v=case.input(v), out=case.buffer(c["heads"] * c["dim_v"]), group=0,
        planes=(0, 1), heads=c["heads"], kv_heads=c["kv_heads"], dim_k=c["dim_k"], dim_v=c["dim_v"], scale=0.7,
        window=c["window"], softcap=c["softcap"], sinks=None if sinks is None else case.weight(sinks, "vector"),
        alibi=() if c["alibi"] == "none" else slopes(c["heads"]), alibi_rounded=c["alibi"] == "rounded",
    )  # fmt: skip
    free = list(rng.permutation(np.arange(1, 40)))

    def fill(inputs):
        lo = 0
        inputs.N = len(c["lengths"])
        for n, length in enumerate(c["lengths"]):
            blocks = np.array([free.pop() for _ in range(-(-length // S))])
            position = np.arange(length)
            inputs.slot_mapping[0, lo : lo + length] = blocks[position // S] * S + position % S
            inputs.block_tables[0, n] = -1
            inputs.block_tables[0, n, : len(blocks)] = blocks
            inputs.q_start[n], inputs.q_start[n + 1], inputs.kv_len[n] = lo, lo + length, length
            lo += length

    wanted, lo = [], 0
    for length in c["lengths"]:
        span = slice(lo, lo + length)
        shaped = [a[span].reshape(length, n, -1) for a, n in ((q, c["heads"]), (k, c["kv_heads"]), (v, c["kv_heads"]))]
        wanted.append(oracle(*shaped, op, sinks))
        lo += length
    close(case.run(backend, op, fill), np.concatenate(wanted), c["dtype"], roundings=2)


LONG = [
    # rows, heads, kv_heads, dim_k, dim_v, block size, window, softcap, sinks or alibi
    (1100, 2, 1, 20, 33, 16, None, None, False),
    (1100, 3, 3, 8, 8, 24, None, 5.0, True),
    (1100, 2, 2, 16, 16, 4, 600, None, False),
    (700, 30, 1, 4, 4, 512, 513, 2.0, True),
    (600, 9, 1, 7, 5, 700, None, None, False),
    (600, 5, 1, 64, 80, 16, 550, None, False),
    (540, 3, 3, 24, 128, 16, None, None, True),
    (1100, 6, 2, 12, 16, 16, None, None, "alibi"),
    (700, 3, 3, 8, 8, 24, 530, None, "alibi, rounded"),
]


@on_every_fast_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case_", LONG, ids=str)
def test_long_contexts(backend, dtype, case_):
    """More keys than a backend works on at once, block sizes that divide nothing, many heads to one kv head."""
    rows, heads, kv_heads, dim_k, dim_v, size, window, softcap, more = case_
    alibi = tuple(slope / 64 for slope in slopes(heads)) if isinstance(more, str) else ()
    rng = np.random.default_rng(7)
    # Scores that grow along the context: what was the largest weight at first counts for little at last.
    q = exact(np.abs(rng.standard_normal((rows, heads * dim_k))), dtype)
    k = exact(rng.standard_normal((rows, kv_heads * dim_k)) + np.arange(rows)[:, None] / 400, dtype)
    v = exact(rng.standard_normal((rows, kv_heads * dim_v)), dtype)
    sinks = exact(rng.standard_normal(heads) + 3, dtype) if more is True else None
    blocks = rng.permutation(np.arange(1, -(-rows // size) + 1))
    capacity = Capacity(
        max_tokens=rows, max_seqs=1, max_logit_rows=4, max_segments=1, num_blocks=len(blocks) + 1, block_size=size,
        max_blocks_per_seq=len(blocks),
    )  # fmt: skip
    group = KvGroup(0, (KvPlane(0, 0, k.shape[1]), KvPlane(1, 0, v.shape[1])))
    case = OneOp(dtype, rows, groups=[group], capacity=capacity)
    op = Attention(
        name="a", q=case.input(q), k=case.input(k), v=case.input(v), out=case.buffer(heads * dim_v), group=0,
        planes=(0, 1), heads=heads, kv_heads=kv_heads, dim_k=dim_k, dim_v=dim_v, scale=dim_k**-0.5, window=window,
        softcap=softcap, sinks=None if sinks is None else case.weight(sinks, "vector"), alibi=alibi,
        alibi_rounded=more == "alibi, rounded",
    )  # fmt: skip

    def fill(inputs):
        position = np.arange(rows)
        inputs.slot_mapping[0, :rows] = blocks[position // size] * size + position % size
        inputs.block_tables[0, 0, : len(blocks)] = blocks

    got = case.run(backend, op, fill)
    # The last rows see the most keys, those around 512 the edge of what is worked on at once.
    chosen = [*range(0, 8), *range(505, 520), *range(rows - 80, rows)]
    shaped = [a.reshape(rows, n, -1) for a, n in ((q, heads), (k, kv_heads), (v, kv_heads))]
    close(got[chosen], oracle(*shaped, op, sinks, chosen), dtype, roundings=2)


def test_large_scores_are_worked_on_in_slices(monkeypatch):
    """The same result whatever the number of query rows worked on at a time."""
    reference = BACKENDS["reference"]
    executable = load(reference, Shape(softcap=3.0)), load(reference, Shape())
    part = [Part(tuple(range(20)), 0, (1, 2, 3, 4, 5), logits="all")]
    for one in executable:
        results = []
        for limit in (1 << 24, 1, 300):
            monkeypatch.setattr(attention, "_SCORE_LIMIT", limit)
            fill_step(one.inputs, part, S)
            one.run()
            results.append(one.logits())
        np.testing.assert_allclose(results[1], results[0], atol=1e-5)
        np.testing.assert_allclose(results[2], results[0], atol=1e-5)


def load(backend, shape: Shape, dtype: str = "float32"):
    capacity = Capacity(
        max_tokens=64, max_seqs=8, max_logit_rows=64, max_segments=8, num_blocks=40, block_size=S, max_blocks_per_seq=16
    )
    program = llama_program(shape)
    return backend.load(program, dtype, pull_from(random_weights(program)), capacity)


IDS = tuple(int(i) for i in np.random.default_rng(3).integers(0, 61, 23))


def whole(executable, blocks):
    fill_step(executable.inputs, [Part(IDS, 0, blocks, logits="all")], S)
    executable.run()
    return executable.logits()


@on_every_backend
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 22), max_size=5, unique=True), st.sampled_from([None, 5]), st.randoms(use_true_random=False)
)
def test_chunked_equals_whole(backend, cuts, window, random):
    """Any chunking, over shuffled blocks, with another sequence decoding beside it: the same logits."""
    executable = load(backend, Shape(window=window))
    wanted = whole(executable, (1, 2, 3, 4, 5, 6))
    blocks = tuple(random.sample(range(1, 40), 7))
    got = []
    edges = [0, *sorted(cuts), len(IDS)]
    for step, (lo, hi) in enumerate(pairwise(edges)):
        beside = Part((step,), step, blocks[6:] + (0,) * 2)
        parts = [beside, Part(IDS[lo:hi], lo, blocks[:6], logits="all")]
        fill_step(executable.inputs, parts if step < S else parts[1:], S)
        executable.run()
        got.append(executable.logits()[-(hi - lo) :])
    np.testing.assert_allclose(np.concatenate(got), wanted, atol=2e-5, rtol=1e-5)


@on_every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 3])
def test_what_an_earlier_owner_left_in_a_block_never_shows(backend, dtype, window):
    """A sequence whose K and V were NaN leaves its blocks; the next owner's partly filled block reads none of it."""
    executable = load(backend, Shape(window=window), dtype)
    wanted = whole(executable, (1, 2, 3, 4, 5, 6))
    broken = random_adapter(llama_program(), rank=1)
    for site in broken.sites:
        site.parts[0].b[:] = np.nan
    slot = attach(executable, broken)
    fill_step(executable.inputs, [Part(IDS + IDS + IDS[:18], 0, tuple(range(16, 0, -1)), slot)], S)
    executable.run()
    assert np.isnan(executable.logits()).all()
    assert np.array_equal(whole(executable, (7, 1, 9, 3, 11, 2)), wanted)
    fill_step(executable.inputs, [Part((1,), 0, (10,)), Part(IDS[:9], 0, (12, 4, 13))], S)
    executable.run()
    assert np.isfinite(executable.logits()).all()


GROUPED = Shape(layers=3, window=(5, None, 5))
WINDOWS = (None, 5)


def fill_windowed(inputs, part):
    """``fill_step`` of one sequence; table entries behind a group's window are -1."""
    fill_step(inputs, [part], S)
    for group, window in enumerate(WINDOWS):
        if window is not None:
            inputs.block_tables[group, 0, : max(0, part.start - window + 1) // S] = -1


def fill_grouped(inputs, part, tables):
    """A step of one sequence whose blocks differ by KV group; entries behind the window are -1."""
    for group, blocks in enumerate(tables):
        before = inputs.slot_mapping.copy(), inputs.block_tables.copy()
        fill_windowed(inputs, replace(part, blocks=blocks))
        for array, kept in zip((inputs.slot_mapping, inputs.block_tables), before, strict=True):
            array[:group] = kept[:group]


@on_every_backend
@pytest.mark.parametrize("cuts", [(), (1,), (6, 7, 8, 20), tuple(range(1, 23))])
def test_each_group_has_its_own_blocks_and_reads_none_behind_its_window(backend, cuts):
    """Freed blocks are -1 in the table of the sliding group and belong to a sequence of NaN by then."""
    executable = load(backend, GROUPED)
    fill_step(executable.inputs, [Part(IDS, 0, (1, 2, 3, 4, 5, 6), logits="all")], S)
    executable.run()
    wanted = executable.logits()
    broken = random_adapter(llama_program(GROUPED), rank=1)
    for site in broken.sites:
        site.parts[0].b[:] = np.nan
    slot = attach(executable, broken)
    tables = (31, 9, 27, 12, 36, 18), (12, 31, 7, 9, 2, 27)
    got, freed = [], 0
    for lo, hi in pairwise([0, *cuts, len(IDS)]):
        fill_grouped(executable.inputs, Part(IDS[lo:hi], lo, tables[0], logits="all"), tables)
        executable.run()
        got.append(executable.logits())
        # The next query reads from position hi - 4 on.
        for block in tables[1][freed : max(0, hi - 4) // S]:
            fill_grouped(executable.inputs, Part(IDS[:S], 0, (39,), slot), ((39,), (block,)))
            executable.run()
        freed = max(0, hi - 4) // S
    np.testing.assert_allclose(np.concatenate(got), wanted, atol=2e-5, rtol=1e-5)


@on_every_backend
@pytest.mark.parametrize("group", [0, 1])
def test_a_freed_block_inside_the_window_is_an_error(backend, group):
    executable = load(backend, GROUPED)
    whole(executable, (1, 2, 3, 4, 5, 6))
    fill_windowed(executable.inputs, Part(IDS[22:], 22, (1, 2, 3, 4, 5, 6)))
    executable.inputs.block_tables[group, 0, 4] = -1
    with pytest.raises((KernelError, IndexError)):
        executable.run()


@on_every_backend
def test_many_lengths_in_one_step_equal_each_alone(backend):
    executable = load(backend, Shape(window=6))
    tables = [(1,), (2, 3), (4, 5, 6, 7, 8), (9, 10, 11), (12, 13)]
    for table, length in zip(tables, (2, 5, 18, 9, 6), strict=True):
        fill_step(executable.inputs, [Part(IDS[:length], 0, table)], S)
        executable.run()
    parts = [Part((IDS[n],), n, table) for table, n in zip(tables, (2, 5, 18, 9, 6), strict=True)]
    alone = []
    for part in parts:
        fill_step(executable.inputs, [part], S)
        executable.run()
        alone.append(executable.logits()[0])
    fill_step(executable.inputs, parts, S)
    executable.run()
    np.testing.assert_allclose(executable.logits(), np.stack(alone), atol=2e-5)
