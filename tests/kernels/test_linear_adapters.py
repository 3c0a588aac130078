"""Adapters at a Linear: any mix in one batch equals folding each into its base, and base rows never notice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import on_every_backend
from llama_program import llama_program
from one_op import OneOp, close, exact

from truffula.errors import KernelError
from truffula.kernels.backend import AdapterImage, SiteTensors
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Epilogue, Linear, ModuleSlice, Site, SiteSlice
from truffula.testing.programs import Part, as_dtype, fill_step, pull_from, random_adapter, random_weights

CAPACITY = Capacity(
    max_tokens=64, max_seqs=8, max_logit_rows=64, max_segments=16, num_blocks=40, block_size=4, max_blocks_per_seq=8
)


def site(number: int, inputs: int, outputs: int) -> Site:
    return Site(number, "linear", 0, inputs, outputs, (ModuleSlice(f"layer.{number}", 0, outputs, outputs),))


def image(sites, shared_a=False, dtype="float32", seed=0, ranks=None) -> AdapterImage:
    rng = np.random.default_rng(seed)
    made = []
    a = None
    for index, s in enumerate(sites):
        rank = ranks[index] if ranks else 3
        if a is None or not shared_a:
            a = as_dtype(rng.standard_normal((rank, s.in_features)), dtype)
        b = as_dtype(rng.standard_normal((s.out_features, a.shape[0])), dtype)
        made.append(SiteTensors(s.id, a, b, float(rng.uniform(0.1, 2))))
    return AdapterImage(f"g{seed}", tuple(made), 1, 3)


@st.composite
def mixes(draw):
    """Widths of the slices, adapters as {slice: rank}, segments as (lo, hi, adapter, weight)."""
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    rows = draw(st.integers(1, 9))
    adapters = draw(
        st.lists(
            st.dictionaries(st.integers(0, len(widths) - 1), st.sampled_from([1, 2, 3, 7, 16, 40]), min_size=1),
            min_size=1, max_size=4,
        )
    )  # fmt: skip
    count = draw(st.integers(0, 5))
    segments = []
    for _ in range(count):
        lo = draw(st.integers(0, rows))
        weight = draw(st.sampled_from([1.0, 0.5, -2.0]))
        segments.append((lo, draw(st.integers(lo, rows)), draw(st.integers(0, len(adapters) - 1)), weight))
    return widths, rows, adapters, segments


@on_every_backend
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    mixes(), st.integers(1, 12), st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["float32", "float16", "bfloat16"]), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_mix_equals_folding_each_into_its_base(backend, mix, inputs, dtype, stored, split, residual, seed):
    """Ranks differ, segments may be empty or overlap (then their deltas add), slices may lack an adapter."""
    widths, rows, adapters, segments = mix
    rng = np.random.default_rng(seed)
    outputs = sum(widths)
    x = exact(rng.standard_normal((rows, inputs)), dtype)
    w = exact(rng.standard_normal((outputs, inputs)), dtype)
    r = exact(rng.standard_normal((rows, outputs)), dtype)
    case = OneOp(dtype, rows, sites=[site(i, inputs, width) for i, width in enumerate(widths)])
    edges = np.cumsum([0, *widths])
    for number, chosen in enumerate(adapters):
        sites = [case.sites[i] for i in sorted(chosen)]
        case.adapters.append(image(sites, dtype=stored, seed=number, ranks=[chosen[s.id] for s in sites]))
    op = Linear(
        name="l", x=case.input(x), weight=case.weight(w, "matmul", list(edges[1:-1]) if split else None),
        slices=tuple(SiteSlice(i, int(edges[i]), int(edges[i + 1])) for i in range(len(widths))),
        out=case.buffer(outputs),
        epilogue=Epilogue(residual=case.input(r) if residual else None),
    )  # fmt: skip

    def fill(step):
        step.G = len(segments)
        for g, (lo, hi, adapter, weight) in enumerate(segments):
            step.seg[g], step.seg_r[g], step.seg_weight[g] = (lo, hi, adapter), (0, 0), weight

    wanted = np.zeros((rows, outputs))
    for t in range(rows):
        folded = w.copy()
        for lo, hi, adapter, weight in segments:
            if lo <= t < hi:
                for s in case.adapters[adapter].sites:
                    span = slice(edges[s.site], edges[s.site + 1])
                    folded[span] += weight * s.scale * (s.b.astype(np.float64) @ s.a.astype(np.float64))
        wanted[t] = folded @ x[t] + (r[t] if residual else 0)
    close(case.run(backend, op, fill), wanted, dtype, roundings=2)


@on_every_backend
def test_sites_may_share_one_a(backend):
    """A fused module: one A array at several sites gives each site its own expand."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 5)), rng.standard_normal((7, 5))
    case = OneOp("float32", 3, sites=[site(0, 5, 4), site(1, 5, 3)])
    case.adapters.append(image(case.sites, shared_a=True))
    weight = case.weight(w, "matmul")
    op = Linear(
        name="l", x=case.input(x), weight=weight, out=case.buffer(7), slices=(SiteSlice(0, 0, 4), SiteSlice(1, 4, 7))
    )

    def fill(step):
        step.G, step.seg[0] = 1, (0, 3, 0)

    deltas = [s.scale * (s.b.astype(np.float64) @ s.a.astype(np.float64)) for s in case.adapters[0].sites]
    close(case.run(backend, op, fill), x @ (w + np.concatenate(deltas)).T, "float32")


def load(backend, program, dtype="float32", stored="float32"):
    return backend.load(program, dtype, pull_from(random_weights(program, dtype=stored)), CAPACITY)


@on_every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_rows_are_bit_equal_with_the_adapters_taken_away(backend, dtype):
    program = llama_program()
    executable = load(backend, program, dtype)
    slots = [executable.adapter(random_adapter(program, rank=r, seed=r)) for r in (1, 7, 40)]
    parts = [Part((1, 2, 3), 0, (1,), slots[0]), Part((4,), 0, (2,), slots[1]), Part((5, 6), 0, (3,), slots[2])]
    parts += [Part((7, 8, 9, 10, 11), 0, (4, 5)), Part((12,), 0, (6,))]
    results = []
    for with_adapters in (True, False):
        fill_step(executable.inputs, parts, 4)
        if not with_adapters:
            executable.inputs.G = 0
        executable.run()
        results.append(executable.logits())
    assert np.array_equal(results[0][3:], results[1][3:])
    assert not np.isclose(results[0][:3], results[1][:3], atol=1e-3).all(axis=1).any()


@on_every_backend
def test_each_adapter_answers_as_if_alone(backend):
    program = llama_program()
    executable = load(backend, program)
    slots = [executable.adapter(random_adapter(program, rank=3 + i, seed=i)) for i in range(4)]
    parts = [Part((5, 9, 2 + i), 0, (1 + i,), slot) for i, slot in enumerate(slots)] + [Part((5, 9, 9), 0, (9,))]
    fill_step(executable.inputs, parts, 4)
    executable.run()
    together = executable.logits()
    for index, part in enumerate(parts):
        fill_step(executable.inputs, [part], 4)
        executable.run()
        np.testing.assert_allclose(executable.logits()[0], together[index], atol=2e-5, rtol=1e-5)


@on_every_backend
def test_slots_are_reused_and_images_closed(backend):
    program = llama_program()
    executable = load(backend, program)
    closed = []
    images = [random_adapter(program, seed=i) for i in range(3)]
    images = [
        AdapterImage(i.generation, i.sites, i.nbytes, i.rank, lambda g=i.generation: closed.append(g)) for i in images
    ]
    first, second = executable.adapter(images[0]), executable.adapter(images[1])
    assert first != second
    executable.drop_adapter(first)
    assert closed == ["random-0"]
    assert executable.adapter(images[2]) == first
    with pytest.raises(KernelError, match="slot 7"):
        executable.drop_adapter(7)
    executable.close()
    executable.close()
    assert sorted(closed) == ["random-0", "random-1", "random-2"]


@on_every_backend
def test_a_segment_without_its_adapter_is_refused(backend):
    program = llama_program()
    executable = load(backend, program)
    fill_step(executable.inputs, [Part((1,), 0, (1,), 5)], 4)
    with pytest.raises(KernelError, match="slot 5"):
        executable.run()


@on_every_backend
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, 31), (32, 4)),
        ((4, 32), (31, 4)),
        ((4, 32), (32, 3)),
        ((128,), (32, 4)),
        ((0, 32), (32, 0)),
        ((4, 32, 1), (32, 4)),
    ],
)
def test_shapes_that_do_not_fit_name_the_site(backend, a, b):
    program = llama_program()
    executable = load(backend, program)
    wrong = SiteTensors(0, np.zeros(a, np.float32), np.zeros(b, np.float32), 1.0)
    with pytest.raises(KernelError, match=r"model\.layers\.0\.q_proj"):
        executable.adapter(AdapterImage("g", (wrong,), 1, 4))


@on_every_backend
def test_sites_that_do_not_exist_or_that_no_op_serves_are_refused(backend):
    program = llama_program()
    executable = load(backend, program)
    zeros = np.zeros((1, 32), np.float32)
    with pytest.raises(KernelError, match="names site 99"):
        executable.adapter(AdapterImage("g", (SiteTensors(99, zeros, zeros.T, 1.0),), 1, 1))
