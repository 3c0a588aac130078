"""Products in every table: one order of sums, and so the same bits wherever products and sums are fused. Which of two
ways to multiply bfloat16 numbers a machine takes therefore never shows in an answer. Tiles have an order of their own
in bfloat16, so nothing but the processor decides whether they are taken."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import pytest
from kernel_backends import ISAS, needs_native
from one_op import OneOp

from truffula.kernels.backend import QuantisedArray
from truffula.kernels.cpu import CpuBackend
from truffula.kernels.program import Linear
from truffula.testing.programs import as_dtype
from truffula.weights.gguf.quants import values_of_blocks
from truffula.weights.quantised.packing import BY_KIND

pytestmark = needs_native
BLOCK = 128
FUSED = tuple(isa for isa in ISAS if isa != "portable")
CHAINED = tuple(isa for isa in FUSED if isa != "amx")  # one chain an output, where x holds bfloat16 numbers
TILE = 32
needs_tiles = pytest.mark.skipif("amx" not in ISAS, reason="this processor multiplies no tiles")


def products(
    isa: str, x: np.ndarray, w: np.ndarray, dtype: str = "bfloat16", stored: str | QuantisedArray = ""
) -> np.ndarray:
    """x W^T, in bfloat16 before its rounding: the buffer is float32. ``stored``: the dtype of w, or its blocks."""
    one = OneOp(dtype, len(x))
    ref = one.input(x)
    out = one.buffer(len(w), dtype="float32")
    op = Linear(name="l", x=ref, weight=one.weight(w, "matmul"), out=out)
    stored = stored or dtype
    one.values[one.weights[op.weight].name] = [as_dtype(w, stored) if isinstance(stored, str) else stored]
    return one.run(CpuBackend(2, isa), op)


def summed(x: np.ndarray, w: np.ndarray, order: Iterable[int]) -> np.ndarray:
    """x W^T of ``halves``, rounded to float32 behind each k: in float64 the product and the sum are exact."""
    sums = np.zeros((len(x), len(w)), np.float32)
    for k in order:
        sums = (sums.astype(np.float64) + np.outer(x[:, k], w[:, k]).astype(np.float64)).astype(np.float32)
    return sums


def pairwise_down(lo: int, hi: int) -> list[int]:
    """k upward in pairs, of a pair the odd one first."""
    return [k for pair in range(lo, hi, 2) for k in (pair + 1, pair) if k < hi]


def in_pairs(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return summed(x, w, pairwise_down(0, x.shape[1]))


def in_order(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return summed(x.astype(np.float64), w, range(x.shape[1]))


def summed_by_tiles(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of each 32 inputs the even and the odd ones in a chain of their own; both together are added to the sum."""
    sums = np.zeros((len(x), len(w)), np.float32)
    for lo in range(0, x.shape[1], TILE):
        hi = min(lo + TILE, x.shape[1])
        sums += summed(x, w, range(lo, hi, 2)) + summed(x, w, range(lo + 1, hi, 2))
    return sums


def halves(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """bfloat16 numbers of both signs between 1/64 and 1: few of their sums of products are exact."""
    bits = rng.integers(0x3C80, 0x3F80, shape, np.uint32) | rng.integers(0, 2, shape, np.uint32) << 15
    return (bits << 16).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("isa", CHAINED)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 2), (3, 40, 33), (13, 35, 64), (29, 17, 271)])
def test_sums_go_upward_in_pairs_odd_inputs_first(isa, rows, outputs, inputs):
    rng = np.random.default_rng(inputs)
    x, w = halves(rng, rows, inputs), halves(rng, outputs, inputs)
    wanted = summed(x, w, pairwise_down(0, inputs))
    np.testing.assert_array_equal(products(isa, x, w).view(np.uint32), wanted.view(np.uint32))


@needs_tiles
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 16, 2), (3, 40, 33), (16, 35, 64), (17, 33, 96), (29, 17, 271), (64, 70, 160)]
)
def test_tiles_sum_even_and_odd_inputs_of_32_apart(rows, outputs, inputs):
    rng = np.random.default_rng(inputs)
    x, w = halves(rng, rows, inputs), halves(rng, outputs, inputs)
    wanted = summed_by_tiles(x, w)
    np.testing.assert_array_equal(products("amx", x, w).view(np.uint32), wanted.view(np.uint32))


@needs_tiles
@pytest.mark.parametrize("rows", [1, 17])
def test_tiles_count_what_is_below_the_normal_range_as_zero(rows):
    rng = np.random.default_rng(rows)
    x, w = halves(rng, rows, 96), halves(rng, 40, 96)
    x[:, 5], x[:, 6], w[::3, 7], w[1::3, 8] = 1e-39, -2e-39, 1e-39, -3e-39
    zeroed = [np.where(np.abs(array) < np.finfo(np.float32).tiny, np.float32(0), array) for array in (x, w)]
    wanted = summed_by_tiles(*zeroed)
    np.testing.assert_array_equal(products("amx", x, w).view(np.uint32), wanted.view(np.uint32))
    tiny = np.full_like(x, 2.0**-64), np.full_like(w, 2.0**-66)  # each product is below it
    np.testing.assert_array_equal(products("amx", *tiny), np.zeros((rows, 40), np.float32))


@needs_tiles
def test_what_is_not_finite_stays_in_its_row_and_column_of_tiles():
    rng = np.random.default_rng(9)
    x, w = halves(rng, 20, 80), halves(rng, 40, 80)
    clean = products("amx", x, w)
    x[3, 70], w[18, 9] = np.inf, np.nan
    got = products("amx", x, w)
    assert np.isnan(got[:, 18]).all() and not np.isfinite(got[3]).any()
    rest = np.ix_(np.arange(20) != 3, np.arange(40) != 18)
    np.testing.assert_array_equal(got[rest], clean[rest])


def test_orders_of_sums_can_be_told_apart_by_these_numbers():
    rng = np.random.default_rng(3)
    x, w = halves(rng, 8, 271), halves(rng, 16, 271)
    made = [summed(x, w, pairwise_down(0, 271)), summed(x, w, range(271)), summed_by_tiles(x, w)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (made[one] != made[other]).mean() > 0.2


@pytest.mark.parametrize("isa", FUSED)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 2), (2, 40, 128), (13, 35, 129), (29, 17, 401)])
def test_float32_rows_are_summed_by_128_inputs(isa, stored, rows, outputs, inputs):
    rng = np.random.default_rng(inputs)
    x, w = halves(rng, rows, inputs), halves(rng, outputs, inputs)
    wanted = np.zeros((rows, outputs), np.float32)
    for lo in range(0, inputs, BLOCK):
        hi = min(lo + BLOCK, inputs)
        wanted += summed(x, w, range(lo, hi) if stored == "float32" else pairwise_down(lo, hi))
    got = products(isa, x, w, "float32", stored)
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("isa", FUSED)
@pytest.mark.parametrize("kind", ["FP8_128", "FP8_32", "NF4", "FP4_16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 32), (8, 40, 128), (13, 35, 160), (29, 17, 416)])
def test_sums_of_a_group_are_scaled_and_added_upward(isa, kind, dtype, rows, outputs, inputs):
    """FP8 in the order of bfloat16 matrices, 4 bits in that of float32 ones; scales of FP4 are in its numbers."""
    rng, format = np.random.default_rng(inputs), BY_KIND[kind]
    groups = -(-inputs // format.size)
    codes = rng.integers(0, 256, (outputs, groups, format.nbytes - 4), np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN of e4m3
    scales = halves(rng, outputs, groups)
    if kind == "FP4_16":
        scales = np.ones_like(scales)
        codes[..., :4] = np.array([3], np.float32).view(np.uint8)  # by which the scales behind it are divided
    blocks = np.concatenate([scales[..., None].view(np.uint8), codes], -1)
    stored = QuantisedArray(kind, blocks, (outputs, inputs), partial(values_of_blocks, format))
    blocks = np.concatenate([np.ones_like(scales)[..., None].view(np.uint8), codes], -1)
    w = QuantisedArray(kind, blocks, (outputs, inputs), partial(values_of_blocks, format)).dequantise()
    x, wanted = halves(rng, rows, inputs), np.zeros((rows, outputs))
    order = in_pairs if kind.startswith("FP8") else in_order
    order = summed_by_tiles if (isa, dtype) == ("amx", "bfloat16") and kind.startswith("FP8") else order
    for group in range(groups):
        span = slice(group * format.size, min(inputs, (group + 1) * format.size))
        sums = order(x[:, span], w[:, span]).astype(np.float64)
        wanted = (wanted + sums * scales[:, group]).astype(np.float32).astype(np.float64)
    got = products(isa, x, w, dtype, stored)
    np.testing.assert_array_equal(got.view(np.uint32), wanted.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("isa", ISAS)
def test_float32_sums_are_less_than_a_third_as_far_from_exact_as_one_chain(isa):
    rng = np.random.default_rng(4)
    x, w = (rng.standard_normal((n, 3072)).astype(np.float32) for n in (8, 64))
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    ours, chain = (found - exact for found in (products(isa, x, w, "float32"), summed(x, w, range(3072))))
    assert np.sqrt((ours**2).mean()) < np.sqrt((chain**2).mean()) / 3


@pytest.mark.parametrize("isa", CHAINED)
@pytest.mark.parametrize("rows", [1, 7, 12, 13, 25, 50])
def test_tables_agree_bit_for_bit(isa, rows):
    """Whatever the numbers: large, small, infinite, none, and below the normal range, where they count as zero."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 70)) * np.exp2(rng.integers(-60, 60, (rows, 70)))
    w = rng.standard_normal((45, 70)) * np.exp2(rng.integers(-60, 60, (45, 70)))
    x[:, 5], w[::3, 7], w[1::3, 9], w[2::3, 11] = 1e-39, 1e-39, 2e-38, -1e-39
    x[0, 20], w[3, 21], w[4, 22] = np.inf, -np.inf, np.nan
    got, wanted = products(isa, x, w), products(CHAINED[-1], x, w)
    none = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(got), none)
    np.testing.assert_array_equal(got[~none].view(np.uint32), wanted[~none].view(np.uint32))
