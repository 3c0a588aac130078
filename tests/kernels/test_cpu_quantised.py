"""Quantised matrices on the native backend: their arithmetic number by number, packers, and that rows stand alone.
Blocks of integers are multiplied in int8, those of floats (FP8, NF4) as floats."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from one_op import OneOp

from truffula.errors import ConfigError, KernelError
from truffula.kernels.adapters import ColumnScale, InputScale, Replace, SiteTensors, low_rank
from truffula.kernels.backend import QuantisedArray
from truffula.kernels.cpu import CpuBackend, available, instruction_sets
from truffula.kernels.program import Embed, Epilogue, Linear, ModuleSlice, Site, SiteSlice
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.select import Precision, select_backend
from truffula.testing.programs import AdapterTensors
from truffula.weights.gguf.quants import values_of_blocks
from truffula.weights.quantised.bits import unpack_e2m1
from truffula.weights.quantised.packing import BY_KIND, FLOAT8, NF4_NUMBERS, pack_fp4

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")
TABLES = instruction_sets() if available() else ()
KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0")
E2M1 = unpack_e2m1(np.arange(16, dtype=np.uint8))[::2]
FLOATS = (*FLOAT8, "NF4", "FP4_16")


def quantised(values: np.ndarray, kind: str) -> QuantisedArray:
    """What the gguf package makes of ``values``; or the nearest floats, the largest of each group at the format's."""
    format, values = BY_KIND[kind], values.astype(np.float32)
    if kind == "FP4_16":
        values = np.pad(values, ((0, 0), (0, -values.shape[1] % 16)))
        by = np.float32(448 * 6 / max(np.abs(values).max(), 1e-30))  # as compressed-tensors has it
        grouped = values.reshape(len(values), -1, 16)
        scales = (np.abs(grouped).max(-1) / 6 * by).astype(ml_dtypes.float8_e4m3fn)
        sizes = np.maximum(scales.astype(np.float32) / by, 1e-30)
        codes = np.abs((grouped / sizes[..., None])[..., None] - E2M1).argmin(-1).astype(np.uint8)
        return of_fp4(codes.reshape(len(values), -1), scales.view(np.uint8), 1, by)
    if kind in FLOATS:
        grouped = np.pad(values, ((0, 0), (0, -values.shape[1] % format.size))).reshape(len(values), -1, format.size)
        largest = 448 if kind in FLOAT8 else 1
        scales = np.maximum(np.abs(grouped).max(-1) / largest, 1e-30).astype(np.float32)
        numbers = grouped / scales[..., None]
        if kind in FLOAT8:
            codes = numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        else:
            nearest = np.abs(numbers[..., None] - NF4_NUMBERS).argmin(-1).astype(np.uint8)
            codes = nearest[..., ::2] << 4 | nearest[..., 1::2]
        return of_codes(codes, scales, values.shape, kind)
    packed = quants.quantize(values, GGMLQuantizationType[kind])
    blocks = packed.reshape(len(values), -1, format.nbytes)
    return QuantisedArray(kind, blocks, values.shape, partial(values_of_blocks, format))


def of_fp4(codes: np.ndarray, scales: np.ndarray, times: float, by: float) -> QuantisedArray:
    """Blocks of ``codes [rows, inputs]`` of e2m1 and bytes ``scales [rows, inputs / 16]`` of e4m3."""
    blocks = pack_fp4(codes[:, ::2] | codes[:, 1::2] << 4, scales, np.float32(times), np.float32(by))
    assert blocks is not None
    return QuantisedArray("FP4_16", blocks, codes.shape, partial(values_of_blocks, BY_KIND["FP4_16"]))


def of_codes(codes: np.ndarray, scales: np.ndarray, shape: tuple[int, ...], kind: str) -> QuantisedArray:
    """Blocks of bytes ``codes [rows, groups, bytes]`` and ``scales [rows, groups]``."""
    blocks = np.concatenate([np.ascontiguousarray(scales[..., None]).view(np.uint8), codes], -1)
    return QuantisedArray(kind, blocks, shape, partial(values_of_blocks, BY_KIND[kind]))


def in_whole_numbers(x: np.ndarray, weight: QuantisedArray) -> np.ndarray:
    """The product as the kernels define it, in numpy; each fused step in float64 and rounded once."""
    rows, width = x.shape
    blocks = x.astype(np.float32).reshape(rows, width // 32, 32)
    most = np.abs(blocks).max(-1)
    scale = most / np.float32(127)
    by = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    numbers = np.rint(blocks * by[..., None])
    raw = weight.blocks
    half = lambda at: np.ascontiguousarray(raw[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)
    least = half(2) if weight.kind == "Q4_1" else None
    values = weight.dequantise().reshape(*raw.shape[:2], 32).astype(np.float64)
    offset = 0.0 if least is None else least[..., None].astype(np.float64)
    scales = half(0)
    whole = np.rint(
        np.divide(values - offset, scales[..., None], out=np.zeros_like(values), where=scales[..., None] != 0)
    )
    acc = np.zeros((rows, len(raw)), np.float32)
    for b in range(width // 32):
        sums = numbers[:, b].astype(np.float64) @ whole[:, b].T
        both = scales[:, b][None] * scale[:, b][:, None]
        acc = (acc.astype(np.float64) + sums * both.astype(np.float64)).astype(np.float32)
        if least is not None:
            shift = scale[:, b] * numbers[:, b].sum(-1).astype(np.float32)
            acc = (acc.astype(np.float64) + least[:, b][None].astype(np.float64) * shift[:, None]).astype(np.float32)
    return acc


def product(backend, x, parts, *, epilogue=None, image=None, sites=(), slices=(), fill=None, dtype="float32"):
    one = OneOp(dtype, len(x))
    ref = one.input(x)
    whole = np.concatenate([p.dequantise() if isinstance(p, QuantisedArray) else p for p in parts])
    cuts = list(np.cumsum([p.shape[0] for p in parts])[:-1])
    weight = one.weight(whole, "matmul", cuts or None)
    one.values[f"w{weight}"] = list(parts)
    glu = epilogue is not None and epilogue.glu
    out = one.buffer(len(whole) // (2 if glu else 1))
    one.sites += sites
    one.adapters += [image] if image else []
    op = Linear(name="l", x=ref, weight=weight, out=out, slices=slices, epilogue=epilogue or Epilogue())
    return one.run(backend, op, fill)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS), table=st.sampled_from(TABLES or ("",)), outputs=st.integers(1, 70),
    blocks=st.integers(1, 9), rows=st.integers(1, 17), seed=st.integers(0, 99), spread=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_products_are_those_of_the_whole_numbers(kind, table, outputs, blocks, rows, seed, spread):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, 32 * blocks)) * np.exp(spread * rng.standard_normal((rows, 1)))).astype(np.float32)
    weight = quantised(rng.standard_normal((outputs, 32 * blocks)), kind)
    made = product(CpuBackend(2, table), x, [weight])
    wanted = in_whole_numbers(x, weight)
    size = np.abs(x) @ np.abs(weight.dequantise()).T
    assert (np.abs(made - wanted) <= 1e-6 * size).all()
    # Rounding x to 8 bits moves each number by half a step at most.
    exact = x.astype(np.float64) @ weight.dequantise().astype(np.float64).T
    step = np.abs(x).reshape(rows, blocks, 32).max(-1) / 127
    weights = np.abs(weight.dequantise()).reshape(outputs, blocks, 32).sum(-1)
    assert (np.abs(made - exact) <= 0.501 * step @ weights.T + 1e-5 * size).all()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_blocks(kind):
    """The largest sums 16-bit steps see, zeros, the smallest scales."""
    weight = quantised(np.ones((40, 64)), kind)
    blocks = weight.blocks.copy()
    start = {"Q8_0": 2, "Q4_0": 2, "Q4_1": 4, "Q5_0": 2}[kind]
    blocks[::3, :, start:] = 0x7F if kind == "Q8_0" else 0xFF
    blocks[1::3, :, start:] = 0x80 if kind == "Q8_0" else 0x00
    blocks[:4, :, :2] = np.array([1], np.uint16).view(np.uint8)  # 2^-24
    weight = QuantisedArray(kind, blocks, weight.shape, weight.unpack)
    x = np.ones((5, 64), np.float32)
    x[1], x[2], x[3, ::2], x[4] = -1, 0, -1, 1e-33
    wanted = in_whole_numbers(x, weight)
    for table in TABLES:
        np.testing.assert_allclose(product(CpuBackend(1, table), x, [weight]), wanted, rtol=2e-6, atol=1e-25)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(FLOATS), table=st.sampled_from(TABLES or ("",)), outputs=st.integers(1, 70),
    blocks=st.integers(1, 9), rows=st.integers(1, 50), seed=st.integers(0, 99),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_products_with_small_floats_are_those_of_their_values(kind, table, outputs, blocks, rows, seed, dtype):
    """In either dtype: activations are not rounded, and neither are weights to bfloat16."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 32 * blocks)).astype(dtype if dtype == "float32" else ml_dtypes.bfloat16)
    x = x.astype(np.float32)
    weight = quantised(rng.standard_normal((outputs, 32 * blocks)) * np.exp(rng.standard_normal((outputs, 1))), kind)
    made = product(CpuBackend(2, table), x, [weight], dtype=dtype)
    exact = x.astype(np.float64) @ weight.dequantise().astype(np.float64).T
    size = np.abs(x) @ np.abs(weight.dequantise()).T
    assert (np.abs(made - exact) <= (2e-6 if dtype == "float32" else 2**-8) * size).all()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", FLOATS)
def test_every_number_has_its_value(kind, table):
    """Multiplied, with few rows and with many, and looked up."""
    if kind == "FP4_16":
        return check_every_product_and_look_up(*every_fp4(), table)
    scales = np.array([[1.0], [0.1], [-3e-7], [1e9]], np.float32)
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)[:, ::-1].copy()
    if kind == "NF4":
        codes, numbers = codes[:, :32], NF4_NUMBERS[np.stack([codes[:, :32] >> 4, codes[:, :32] & 15], -1)]
    else:
        codes[(codes & 0x7F) == 0x7F] = 0x80
        numbers = codes.view(ml_dtypes.float8_e4m3fn)
    wanted = numbers.reshape(4, 64).astype(np.float32) * scales
    size = BY_KIND[kind].nbytes - 4
    blocks = np.pad(codes, ((0, 0), (0, -codes.shape[1] % size))).reshape(4, -1, size)
    weight = of_codes(blocks, scales.repeat(blocks.shape[1], 1), (4, 64), kind)
    check_every_product_and_look_up(weight, wanted, table)


def every_fp4() -> tuple[QuantisedArray, np.ndarray]:
    """Every number with every scale, which two float32 multiply and divide."""
    scales = np.resize(np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8), (64, 4))
    codes = np.resize(np.arange(16, dtype=np.uint8), (64, 64))
    times, by = np.float32(0.3), np.float32(713.7)
    sizes = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * times / by
    return of_fp4(codes, scales, times, by), E2M1[codes] * sizes.repeat(16, 1)


def check_every_product_and_look_up(weight: QuantisedArray, wanted: np.ndarray, table: str) -> None:
    np.testing.assert_array_equal(weight.dequantise(), wanted)
    eye = np.eye(64, dtype=np.float32)
    for dtype in ("float32", "bfloat16"):
        rounded = wanted.astype(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bfloat16" else wanted
        many = product(CpuBackend(1, table), eye, [weight], dtype=dtype)
        few = [product(CpuBackend(1, table), row[None], [weight], dtype=dtype)[0] for row in eye]
        np.testing.assert_array_equal(many.T, rounded)
        np.testing.assert_array_equal(np.transpose(few), rounded)
    count = len(wanted)
    one = OneOp("float32", count)
    tied = one.weight(wanted, "rows matmul")
    one.values[f"w{tied}"] = [weight]
    one.ops.append(Linear(name="head", x=one.input(np.ones((count, 64))), weight=tied, out=one.buffer(count)))
    looked_up = one.run(CpuBackend(1, table), Embed(name="rows", table=tied, out=one.buffer(64)))
    np.testing.assert_array_equal(looked_up, wanted)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", (*KINDS, *FLOATS))
def test_a_row_stands_alone(kind, table):
    """Bit for bit whatever the number of rows and threads."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 96)).astype(np.float32)
    weight = quantised(rng.standard_normal((83, 96)), kind)
    whole = product(CpuBackend(1, table), x, [weight])
    for threads in (1, 2, 3):
        for lo, hi in ((0, 1), (1, 3), (3, 8), (8, 21), (21, 40)):
            np.testing.assert_array_equal(product(CpuBackend(threads, table), x[lo:hi], [weight]), whole[lo:hi])


@pytest.mark.parametrize(
    "kinds",
    [
        *(("Q8_0", "Q4_0", "Q5_0"), ("Q4_1", "Q4_1"), ("Q4_1", "Q8_0"), ("Q4_0", "float32")),
        *(("FP8_128", "FP8_128"), ("FP8_128", "FP8_32"), ("FP8_32", "Q8_0"), ("FP4_16", "FP4_16", "FP4_16")),
    ],
)
def test_fused_parts(kinds):
    """Parts of several kinds: without loss where one format holds them, else by their values."""
    rng = np.random.default_rng(4)
    values = [rng.standard_normal((rows, 64)).astype(np.float32) for rows in (24, 17, 9)]
    parts = [v if kind == "float32" else quantised(v, kind) for v, kind in zip(values, kinds, strict=False)]
    x = rng.standard_normal((6, 64)).astype(np.float32)
    made = product(CpuBackend(2), x, parts)
    if kinds in (("Q4_1", "Q8_0"), ("Q4_0", "float32")) or kinds[0] in FLOATS:
        whole = np.concatenate([p if isinstance(p, np.ndarray) else p.dequantise() for p in parts])
        np.testing.assert_allclose(made, x @ whole.T, rtol=1e-4, atol=1e-4)
    else:
        wanted = np.concatenate([in_whole_numbers(x, part) for part in parts], axis=1)
        np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "FP8_128"])
def test_gate_and_up_with_an_adapter(kind):
    """The epilogue and the adapter's float32 sums are on top, from the x that was not rounded."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((7, 64)).astype(np.float32)
    weight = quantised(rng.standard_normal((60, 64)), kind)
    site = Site(0, "linear", 0, 64, 60, (ModuleSlice("l", 0, 60, 60),))
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 64), (60, 4)))
    image = AdapterTensors("g", 4, (low_rank(0, a, b, 0.5),))

    def fill(inputs):
        inputs.G = 1
        inputs.seg[0], inputs.seg_r[0], inputs.seg_weight[0] = (2, 5, 0), (0, 0), 1.0

    made = product(
        CpuBackend(2), x, [weight], epilogue=Epilogue(glu=True, activation="silu"), image=image, sites=[site],
        slices=(SiteSlice(0, 0, 60),), fill=fill,
    )  # fmt: skip
    y = in_whole_numbers(x, weight) if kind == "Q8_0" else x @ weight.dequantise().T
    y[2:5] += 0.5 * (x[2:5] @ a.T) @ b.T
    gate, up = y[:, :30], y[:, 30:]
    np.testing.assert_allclose(made, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", (*KINDS, *FLOATS))
def test_an_adapter_that_scales_inputs_and_outputs(kind, table):
    """Rows of x are rounded to int8 (for small floats not at all) after they were scaled, and by themselves: other rows
    stay as they are."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((19, 64)).astype(np.float32)
    weight = quantised(rng.standard_normal((60, 64)), kind)
    sites = [Site(i, "linear", 0, 64, 30, (ModuleSlice(f"l{i}", 0, 30, 30),)) for i in range(2)]
    u, c = rng.standard_normal(64).astype(np.float32), rng.standard_normal(30).astype(np.float32)
    own = rng.standard_normal((30, 64)).astype(np.float32)
    parts = [SiteTensors(0, (InputScale(u), ColumnScale(c))), SiteTensors(1, (InputScale(u), Replace(own)))]
    spans = [(3, 6), (6, 18)]

    def fill(inputs):
        inputs.G = 2
        for g, span in enumerate(spans):
            inputs.seg[g], inputs.seg_r[g], inputs.seg_weight[g] = (*span, 0), (0, 0), 1.0

    made = product(CpuBackend(2, table), x, [weight], image=AdapterTensors("g", 0, tuple(parts)), sites=sites,
                   slices=(SiteSlice(0, 0, 30), SiteSlice(1, 30, 60)), fill=fill)  # fmt: skip
    plain = product(CpuBackend(2, table), x, [weight])
    rows = np.arange(3, 18)
    others = np.setdiff1d(np.arange(19), rows)
    np.testing.assert_array_equal(made[others], plain[others])
    scaled = (x * u) @ weight.dequantise().T if kind in FLOATS else in_whole_numbers(x * u, weight)
    np.testing.assert_allclose(made[rows, :30], c * scaled[rows, :30], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made[rows, 30:], (x * u)[rows] @ own.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", (*KINDS, *FLOATS))
def test_a_tied_table_gives_its_stored_rows(kind, table):
    rng = np.random.default_rng(6)
    weight = quantised(rng.standard_normal((45, 64)), kind)
    one = OneOp("float32", 45)
    x = one.input(np.ones((45, 64)))
    tied = one.weight(weight.dequantise(), "rows matmul")
    one.values[f"w{tied}"] = [weight]
    one.ops.append(Linear(name="head", x=x, weight=tied, out=one.buffer(45)))
    made = one.run(CpuBackend(2, table), Embed(name="rows", table=tied, out=one.buffer(64)))
    np.testing.assert_array_equal(made, weight.dequantise())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_quantize_rounds_as_ggml_does(stored):
    """Read back row by row from the tied table: the values of the gguf package's own blocks."""
    rng = np.random.default_rng(7)
    values = (rng.standard_normal((33, 96)) * np.exp(2 * rng.standard_normal((33, 1)))).astype(np.float32)
    values[0], values[1, 5:] = 0, 1e-9
    values = values.astype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
    one = OneOp("float32", 33)
    x = one.input(np.ones((33, 96)))
    tied = one.weight(values.astype(np.float32), "rows matmul")
    one.values[f"w{tied}"] = [values]
    one.ops.append(Linear(name="head", x=x, weight=tied, out=one.buffer(33)))
    made = one.run(CpuBackend(1, quantize="q8_0"), Embed(name="rows", table=tied, out=one.buffer(96)))
    packed = quants.quantize(values.astype(np.float32), GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(made, quants.dequantize(packed, GGMLQuantizationType.Q8_0))


def test_what_is_not_quantised():
    """Inputs that are no whole blocks, products asked for in float32, tables that are only gathered."""
    rng = np.random.default_rng(8)
    backend = CpuBackend(1, quantize="q8_0")
    x, w = rng.standard_normal((3, 40)), rng.standard_normal((8, 40)).astype(np.float32)
    np.testing.assert_allclose(product(backend, x, [w]), x @ w.T, rtol=1e-5, atol=1e-5)
    one = OneOp("float32", 3)
    x, w = rng.standard_normal((3, 64)), rng.standard_normal((8, 64)).astype(np.float32)
    ref = one.input(x)
    op = Linear(name="l", x=ref, weight=one.weight(w, "matmul"), out=one.buffer(8), compute="float32")
    np.testing.assert_allclose(one.run(backend, op), x @ w.T, rtol=1e-5, atol=1e-5)


def test_values_beyond_float16_scales_are_refused():
    with pytest.raises((KernelError, ValueError), match="Q8_0"):
        product(CpuBackend(1, quantize="q8_0"), np.ones((2, 32)), [np.full((4, 32), 3e38, np.float32)])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["Q8_0", "FP8_128"])
def test_a_number_that_is_not_finite_spoils_its_row_only(table, bad, kind):
    rng = np.random.default_rng(9)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    weight = quantised(rng.standard_normal((20, 64)), kind)
    clean = product(CpuBackend(1, table), x, [weight])
    x[2, 40] = bad
    made = product(CpuBackend(1, table), x, [weight])
    assert not np.isfinite(made[2]).any()
    np.testing.assert_array_equal(np.delete(made, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.parametrize("kind", ["Q4_0", "FP8_128"])
def test_exact_and_reference_compute_on_the_values(kind):
    rng = np.random.default_rng(10)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    weight = quantised(rng.standard_normal((20, 64)), kind)
    wanted = x.astype(np.float64) @ weight.dequantise().astype(np.float64).T
    for backend in (CpuBackend(1, exact=True), ReferenceBackend()):
        assert not backend.block_kinds
        np.testing.assert_allclose(product(backend, x, [weight]), wanted, rtol=1e-5, atol=1e-5)
    assert CpuBackend(1).block_kinds == {*KINDS, *FLOATS}


def test_the_reference_backend_does_not_quantize():
    with pytest.raises(ConfigError, match="reference") as caught:
        select_backend("reference", "cpu", precision=Precision(quantize="q8_0"))
    assert caught.value.param == "quantize"
    assert select_backend("cpu", precision=Precision(quantize="q8_0")).name == "cpu"
