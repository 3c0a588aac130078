"""Every kind of adapter part at every op that takes it, in any mix, against the site contract in float64."""

from __future__ import annotations

import numpy as np
import pytest
from adapter_parts import KINDS, fill_segments, mixed, product, random_parts, some_kinds, spans
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import on_every_backend
from one_op import OneOp, close, exact

from truffula.errors import KernelError
from truffula.kernels.adapters import (
    AdapterLayout,
    Bias,
    ColumnScale,
    InputScale,
    LowRank,
    Place,
    Replace,
    Rows,
    SiteTensors,
    make_image,
    pack,
    tensors_of,
)
from truffula.kernels.program import (
    Buffer,
    Embed,
    Epilogue,
    ExpertLinear,
    Linear,
    Logits,
    ModuleSlice,
    Norm,
    Output,
    Program,
    Ref,
    Site,
    SiteSlice,
    TakeRows,
    WeightDecl,
    WeightPart,
)
from truffula.testing.programs import (
    AdapterTensors,
    Part,
    as_dtype,
    attach,
    decoder_program,
    fill_step,
    pull_from,
    random_weights,
)
from truffula.testing.tiny import tiny_config

quick = settings(max_examples=25, deadline=None, derandomize=True)
dtypes, stored = st.sampled_from(["float32", "bfloat16"]), st.sampled_from(["float32", "float16", "bfloat16"])
seeds = st.integers(0, 999)


def site(number: int, kind: str, inputs: int, outputs: int) -> Site:
    return Site(number, kind, 0, inputs, outputs, (ModuleSlice(f"module.{number}", 0, outputs, outputs),))


def adapters(case: OneOp, rng, kinds, dtype, *, table=False) -> list[list[tuple]]:
    """An adapter for each of ``kinds`` (kinds of parts by site); returns their parts by adapter and site."""
    made = []
    for number, by_site in enumerate(kinds):
        parts = [
            random_parts(rng, by_site[s.id], s.in_features, s.out_features, dtype, table=table)
            if s.id in by_site
            else ()
            for s in case.sites
        ]
        tensors = tuple(SiteTensors(s.id, p) for s, p in zip(case.sites, parts, strict=True) if p)
        case.adapters.append(AdapterTensors(f"a{number}", 3, tensors))
        made.append(parts)
    return made


@st.composite
def mixes(draw, sites=1, kinds=KINDS, most_rows=9):
    rows = draw(st.integers(1, most_rows))
    chosen = st.dictionaries(st.integers(0, sites - 1), some_kinds(*kinds), min_size=1)
    by_adapter = draw(st.lists(chosen, min_size=1, max_size=3))
    return rows, by_adapter, draw(spans(rows, len(by_adapter)))


@on_every_backend
@settings(max_examples=60, deadline=None, derandomize=True)
@given(mixes(sites=3), st.lists(st.integers(1, 37), min_size=3, max_size=3), st.integers(1, 70), dtypes, stored,
       st.booleans(), seeds)  # fmt: skip
def test_linear(backend, mix, widths, inputs, dtype, kept, glu, seed):
    """Sites may begin inside a panel; with a glu, one covers gates and ups."""
    rows, kinds, segments = mix
    rng = np.random.default_rng(seed)
    outputs = sum(widths) + (glu and sum(widths) % 2)
    edges = np.cumsum([0, *widths])
    x, w = exact(rng.standard_normal((rows, inputs)), dtype), exact(rng.standard_normal((outputs, inputs)), dtype)
    bias = exact(rng.standard_normal(outputs), dtype)
    case = OneOp(dtype, rows, sites=[site(i, "linear", inputs, width) for i, width in enumerate(widths)])
    parts = adapters(case, rng, kinds, kept)
    op = Linear(
        name="l", x=case.input(x), weight=case.weight(w, "matmul"), out=case.buffer(outputs // 2 if glu else outputs),
        slices=tuple(SiteSlice(i, int(edges[i]), int(edges[i + 1])) for i in range(len(widths))),
        epilogue=Epilogue(bias=case.weight(bias, "vector"), glu=glu, activation="relu" if glu else None),
    )  # fmt: skip
    wanted = x @ w.T
    for t in range(rows):
        for i in range(len(widths)):
            columns = slice(edges[i], edges[i + 1])
            wanted[t, columns] = mixed(x[t], w[columns], t, segments, [p[i] for p in parts])
    scale = np.abs(wanted).max()
    wanted += bias
    if glu:
        wanted = np.maximum(wanted[:, : outputs // 2], 0) * wanted[:, outputs // 2 :]
    got = case.run(backend, op, lambda step: fill_segments(step, segments))
    unit = 2e-5 if dtype == "float32" else 4 * 2.0**-8
    np.testing.assert_allclose(got, wanted, rtol=unit, atol=unit * max(1.0, np.abs(wanted).max(), scale))


@on_every_backend
@settings(max_examples=30, deadline=None, derandomize=True)
@given(mixes(kinds=(*KINDS, "rows"), most_rows=60), st.integers(1, 50), st.integers(1, 40), dtypes, stored, seeds)
def test_logits(backend, mix, outputs, inputs, dtype, kept, seed):
    rows, kinds, segments = mix
    kinds = [{0: [k for k in by[0] if "rows" not in by[0] or k not in ("replace", "input_scale")]} for by in kinds]
    rng = np.random.default_rng(seed)
    x, w = exact(rng.standard_normal((rows, inputs)), dtype), exact(rng.standard_normal((outputs, inputs)), dtype)
    case = OneOp(dtype, rows, sites=[site(0, "head", inputs, outputs)])
    parts = adapters(case, rng, kinds, kept)
    taken, out = case.buffer(inputs, "R"), case.buffer(outputs, "R", "float32")
    case.ops.append(TakeRows(name="rows", x=case.input(x), out=taken))
    op = Logits(name="l", x=taken, weight=case.weight(w, "matmul"), out=out, scale=0.5, site=0)

    def fill(step):
        fill_segments(step, segments, of_logits=True)
        step.R, step.logit_rows[:rows] = rows, np.arange(rows)

    wanted = np.stack([0.5 * mixed(x[t], w, t, segments, [p[0] for p in parts]) for t in range(rows)])
    close(case.run(backend, op, fill), wanted, dtype, roundings=4)


@on_every_backend
@settings(max_examples=40, deadline=None, derandomize=True)
@given(mixes(kinds=("low_rank", "column_scale", "bias", "replace", "rows"), most_rows=60), st.integers(1, 40),
       st.sampled_from([None, 4.0]), st.booleans(), dtypes, stored, seeds)  # fmt: skip
def test_embed(backend, mix, width, scale, tied, dtype, kept, seed):
    """An adapter's own tokens have ids behind the table; only rows of its segments have them."""
    rows, kinds, segments = mix
    kinds = [{0: [k for k in by[0] if "rows" not in by[0] or k != "replace"]} for by in kinds]
    rng = np.random.default_rng(seed)
    table = exact(rng.standard_normal((rows + 3, width)), dtype)
    case = OneOp(dtype, rows, sites=[site(0, "embed", rows + 3, width)])
    parts = adapters(case, rng, kinds, kept, table=True)
    weight = case.weight(table, "rows matmul" if tied else "rows")
    if tied:
        case.ops.append(Linear(name="head", x=case.input(table[:rows]), weight=weight, out=case.buffer(rows + 3)))
    op = Embed(name="e", table=weight, out=case.buffer(width), scale=scale, site=0)
    ids = rng.integers(0, rows + 1, rows)
    wanted = np.zeros((rows, width))
    for t in range(rows):
        base = table[ids[t]]
        wanted[t] = base
        for lo, hi, number, by in segments:
            if lo <= t < hi:
                wanted[t] += by * (_embedded(parts[number][0], ids[t], table) - base)
    wanted *= 1 if scale is None else scale

    def fill(step):
        step.token_ids[:rows] = ids
        fill_segments(step, segments)

    close(case.run(backend, op, fill), wanted, dtype, roundings=4)


def _embedded(parts, token: int, table: np.ndarray) -> np.ndarray:
    own, added, factor, bias = table[token] if token < len(table) else np.zeros(table.shape[1]), 0.0, 1.0, 0.0
    for part in parts:
        match part:
            case LowRank() if token < len(table):
                added = added + part.scale * part.b.astype(np.float64) @ part.a[:, token].astype(np.float64)
            case ColumnScale():
                factor = part.factor.astype(np.float64)
            case Bias():
                bias = part.values.astype(np.float64)
            case Replace():
                own = part.weight[token].astype(np.float64)
            case Rows():
                for place in np.flatnonzero(part.ids == token):
                    own = part.values[place].astype(np.float64)
    return factor * (own + added) + bias


@on_every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_an_adapter_alone(backend, dtype):
    """Ids behind the table are rows of the adapter whose segment they are in, and an error anywhere else."""
    program = Program(
        name="own", vocab_size=4,
        buffers=(Buffer(0, "x", "T", 3), Buffer(1, "last", "R", 3), Buffer(2, "l", "R", 4, "float32")),
        weights=(WeightDecl(0, "table", (4, 3), (WeightPart("t"),), frozenset({"rows", "matmul"})),),
        sites=(site(0, "embed", 4, 3),), rope_tables=(), kv_groups=(), result=Ref(2, 0, 4),
        output=Output("logits", 4), max_positions=8,
        ops=(
            Embed(name="embed", table=0, out=Ref(0, 0, 3), scale=2.0, site=0),
            TakeRows(name="take", x=Ref(0, 0, 3), out=Ref(1, 0, 3)),
            Logits(name="logits", x=Ref(1, 0, 3), weight=0, out=Ref(2, 0, 4)),
        ),
    )  # fmt: skip
    table = as_dtype(np.arange(12.0).reshape(4, 3), dtype)
    executable = backend.load(program, dtype, pull_from({"table": [table]}), OneOp("float32", 1).capacity, debug=True)
    values = as_dtype(np.array([[70, 71, 72], [90, 91, 92], [10, 11, 12]]), "float32")
    own = SiteTensors(
        0,
        (
            Rows(np.array([7, 9, 1], np.int32), values),
            LowRank(np.ones((1, 4), np.float32), np.ones((3, 1), np.float32), 1.0),
        ),
    )
    bias = SiteTensors(0, (Bias(np.ones(3, np.float32)),))
    first, second = (attach(executable, AdapterTensors("a", 1, (made,))) for made in (own, bias))

    def run(*parts):
        fill_step(executable.inputs, list(parts), 4)
        executable.run()
        return executable.tap(0)

    got = run(Part((9, 7, 1, 0), 0, (1,), first), Part((2,), 0, (2,), second), Part((3,), 0, (3,)))
    wanted = [[90, 91, 92], [70, 71, 72], [22, 24, 26], [2, 4, 6], [14, 16, 18], [18, 20, 22]]
    np.testing.assert_array_equal(got, wanted)
    for wrong in (
        Part((9,), 0, (1,)),
        Part((8,), 0, (1,), first),
        Part((7,), 0, (1,), second),
        Part((4,), 0, (1,), first),
    ):
        with pytest.raises(KernelError, match="outside the table"):
            run(wrong)
    with pytest.raises(KernelError, match="outside the table"):
        run(Part((7,), 0, (1,), first), Part((7,), 0, (2,)))
    executable.close()


@on_every_backend
@quick
@given(mixes(kinds=("bias", "replace"), most_rows=12), st.sampled_from(["rms", "layer"]),
       st.sampled_from(["first", "last"]), st.sampled_from([1, 3]), st.booleans(), st.integers(1, 40), st.booleans(),
       dtypes, stored, seeds)  # fmt: skip
def test_norm(backend, mix, kind, cast, groups, shared, width, biased, dtype, kept, seed):
    rows, kinds, segments = mix
    rng = np.random.default_rng(seed)
    x = exact(rng.standard_normal((rows, groups * width)), dtype)
    vector = width if shared else groups * width
    case = OneOp(dtype, rows, sites=[site(0, "norm", vector, vector)])
    weight, bias = (exact(rng.standard_normal(vector), dtype) for _ in range(2))
    own = []
    for number, by in enumerate(kinds):
        values = {k: exact(rng.standard_normal(vector), "bfloat16") for k in by[0]}
        made = {"bias": Bias, "replace": Replace}
        case.adapters.append(
            AdapterTensors(
                f"a{number}",
                0,
                (
                    SiteTensors(
                        0,
                        tuple(made[k](v.astype(kept if kept != "bfloat16" else np.float32)) for k, v in values.items()),
                    ),
                ),
            )
        )
        own.append(values)
    op = Norm(
        name="n",
        x=case.input(x),
        out=case.buffer(groups * width),
        kind=kind,
        eps=1e-5,
        cast=cast,
        groups=groups,
        weight=case.weight(weight, "vector"),
        bias=case.weight(bias, "vector") if biased else None,
        site=0,
    )
    wanted = np.zeros_like(x)
    for t in range(rows):
        w, b = weight.copy(), bias * biased
        for lo, hi, number, by in segments:
            if lo <= t < hi:
                w = w + by * (own[number].get("replace", weight) - weight)
                b = b + by * own[number].get("bias", 0)
        grouped = x[t].reshape(groups, width)
        centred = grouped - grouped.mean(1, keepdims=True) if kind == "layer" else grouped
        normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        wanted[t] = (normed * w.reshape(-1, width) + b.reshape(-1, width)).ravel()
    close(case.run(backend, op, lambda step: fill_segments(step, segments)), wanted, dtype, roundings=4)


@on_every_backend
@quick
@given(mixes(sites=4, most_rows=12), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 40), dtypes, seeds)
def test_experts(backend, mix, k, own, weighted, inputs, dtype, seed):
    rows, kinds, segments = mix
    rng = np.random.default_rng(seed)
    experts, outputs = 2, 21  # two sites of each: 0 .. 9 and 9 .. 21
    x = exact(rng.standard_normal((rows, k * inputs if own else inputs)), dtype)
    w = exact(rng.standard_normal((experts, outputs, inputs)), dtype)
    routes = np.concatenate([rng.integers(0, experts, (rows, k)), exact(rng.uniform(0, 1, (rows, k)), "bfloat16")], 1)
    bounds = [(0, 9), (9, 21), (21, 30), (30, 42)]
    case = OneOp(dtype, rows, sites=[site(i, "linear", inputs, hi - lo) for i, (lo, hi) in enumerate(bounds)])
    parts = adapters(case, rng, kinds, "float32")
    routed = case.buffer(2 * k, dtype="float32")
    case.input(routes, routed)
    combine = "weighted" if weighted else "none"
    op = ExpertLinear(
        name="e", x=case.input(x), routes=routed, weight=case.weight(w, "matmul"),
        out=case.buffer(outputs if weighted else k * outputs), combine=combine,
        slices=tuple(SiteSlice(i, lo, hi) for i, (lo, hi) in enumerate(bounds)),
    )  # fmt: skip
    wanted = np.zeros((rows, k, outputs))
    for t in range(rows):
        for j in range(k):
            e = int(routes[t, j])
            some = x[t, j * inputs : (j + 1) * inputs] if own else x[t]
            for i, (lo, hi) in enumerate(bounds):
                if lo // outputs == e:
                    columns = slice(lo % outputs, (hi - 1) % outputs + 1)
                    wanted[t, j, columns] = mixed(some, w[e, columns], t, segments, [p[i] for p in parts])
    wanted = (wanted * routes[:, k:, None]).sum(1) if weighted else wanted.reshape(rows, -1)
    close(case.run(backend, op, lambda step: fill_segments(step, segments)), wanted, dtype, roundings=4)


def everything(program, rng, seed: int, dtype: str = "float32") -> AdapterTensors:
    """An adapter with parts of all kinds on all sites of a program."""
    tensors = []
    for s in program.sites:
        kinds = {
            "norm": ["bias", "replace"],
            "embed": ["low_rank", "column_scale", "bias", "rows"],
            "head": ["low_rank", "column_scale", "bias", "rows"],
        }.get(s.kind, [*rng.choice(["low_rank", "column_scale", "bias"], 2, replace=False)])
        if s.kind == "linear" and seed % 2 and "kv_b" not in s.module:
            kinds = ["low_rank", "input_scale", "replace"]
        if s.kind == "norm":
            vectors = [rng.standard_normal(s.out_features).astype(np.float32) for _ in range(2)]
            tensors.append(SiteTensors(s.id, (Bias(vectors[0]), Replace(vectors[1]))))
            continue
        parts = random_parts(rng, kinds, s.in_features, s.out_features, dtype, table=s.kind == "embed")
        tensors.append(SiteTensors(s.id, parts))
    return AdapterTensors(f"all{seed}", 17, tuple(tensors))


@on_every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["llama", "deepseek_v3", "gpt2"])
def test_base_rows_and_others_never_notice(backend, dtype, model):
    """Base rows are bit for bit what they are with the adapters taken away, and an adapter's what they are alone."""
    program = decoder_program(tiny_config(model))
    rng = np.random.default_rng(0)
    executable = backend.load(program, dtype, pull_from(random_weights(program)), OneOp("float32", 1).capacity)
    first, second = (attach(executable, everything(program, rng, seed)) for seed in (0, 1))
    batch = [Part((1, 2, 3), 0, (1,), first), Part((4,), 0, (2,), second), Part((5, 6), 0, (3,), second)]
    batch += [Part((7, 8, 9, 10, 11), 0, (4, 5)), Part((12,), 0, (6,))]

    def run(parts, segments=True):
        fill_step(executable.inputs, parts, 4)
        executable.inputs.G *= segments
        executable.run()
        return executable.logits()

    together, without, alone = run(batch), run(batch, False), run(batch[1:2])
    assert np.array_equal(together[3:], without[3:])
    assert not np.isclose(without[:3], together[:3], atol=1e-3).all(axis=1).any()
    unit = 1e-4 if dtype == "float32" else 0.1  # the reference rounds its products, whose order varies
    np.testing.assert_allclose(together[1], alone[0], rtol=unit, atol=unit * np.abs(alone).max())
    executable.close()


@pytest.mark.parametrize("storage", ["stored", "float32", "mixed"])
def test_images_keep_every_part(storage):
    parts = random_parts(np.random.default_rng(0), [*KINDS, "rows"], 6, 5, "bfloat16")
    layout = AdapterLayout(storage, (Place("head", 0, 6, 5, kind="head"),) * 2)
    read = make_image(layout, [SiteTensors(0, parts[:5]), SiteTensors(1, parts[5:])], generation="g").sites()
    assert [type(p) for s in read for p in s.parts] == [type(p) for p in parts]
    for mine, theirs in zip([p for s in read for p in s.parts], parts, strict=True):
        kept = storage == "stored" or (storage == "mixed" and isinstance(theirs, LowRank))
        for one, other in zip(tensors_of(mine), tensors_of(theirs), strict=True):
            assert one.dtype == (other.dtype if kept or other.dtype == np.int32 else np.float32)
            np.testing.assert_array_equal(one.astype(np.float64), other.astype(np.float64))


NUMBERS = np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    ("kind", "parts", "param"),
    [
        ("linear", (ColumnScale(NUMBERS[0]),), "m"),
        ("linear", (InputScale(NUMBERS[:, 0]),), "m"),
        ("linear", (Bias(NUMBERS),), "m"),
        ("linear", (Replace(NUMBERS.T),), "m"),
        ("linear", (Rows(np.array([1], np.int32), NUMBERS[:1]),), "rows"),
        ("embed", (InputScale(NUMBERS[0]),), "input_scale"),
        ("embed", (Rows(np.array([1], np.int32), NUMBERS[:1]),), "m"),
        ("head", (Rows(np.array([3], np.int32), NUMBERS[:1]),), "ids"),
        ("head", (Rows(np.array([1, 1], np.int32), NUMBERS[:2]),), "ids"),
        ("head", (Rows(np.array([-1], np.int32), NUMBERS[:1]),), "ids"),
        ("head", (Rows(np.array([1], np.int32), NUMBERS[:1]), Replace(NUMBERS)), "rows"),
        ("head", (Bias(NUMBERS[:, 0]), Bias(NUMBERS[:, 0])), "bias"),
        ("head", (Bias(np.ones(3, np.int32)),), "dtype"),
        ("latent", (Replace(NUMBERS),), "replace"),
        ("norm", (LowRank(NUMBERS, NUMBERS.T, 1.0),), "low_rank"),
        ("linear", (LowRank(NUMBERS[None], NUMBERS.T[None], 1.0),), "low_rank with an expert axis"),
    ],
)
def test_what_does_not_fit_is_refused(kind, parts, param):
    layout = AdapterLayout("float32", (Place("m", 0, 4, 3, kind=kind),))
    with pytest.raises(KernelError, match="site m:") as caught:
        pack(layout, [SiteTensors(0, parts)])
    assert caught.value.param == param


def test_the_contract_of_one_segment():
    """With weight 1 the sum over segments is the adapter's own product."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal(6), rng.standard_normal((5, 6))
    parts = random_parts(rng, KINDS, 6, 5, "float32")
    np.testing.assert_allclose(mixed(x, w, 0, [(0, 1, 0, 1.0)], [parts]), product(parts, x, w))
