"""Faults of Triton's interpreter that would hide those of a kernel: each was seen, and fails here if it returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_backends import HAS_TRITON, interpreted

if not HAS_TRITON:
    pytest.skip("triton is not installed: make test-triton does it", allow_module_level=True)

import triton
import triton.language as tl

interpreted()
pytestmark = pytest.mark.triton


@triton.jit
def dot(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y))


@triton.jit
def convert(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def store(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def add(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + tl.load(x + i))


@triton.jit
def total(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(len(x), y.shape[1])
    dot[(1,)](x, y, out, M=len(x), N=y.shape[1], K=len(y))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_the_numbers(dtype: torch.dtype) -> None:
    x, y = torch.randn(16, 32).to(dtype), torch.randn(32, 16).to(dtype)
    torch.testing.assert_close(product(x, y), x.float() @ y.float(), rtol=1e-5, atol=1e-5)


def test_a_rows_product_does_not_depend_on_the_shape_of_its_tile() -> None:
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    whole = product(x, y)
    for rows, columns in ((16, 16), (32, 64), (64, 32)):
        assert torch.equal(product(x[:rows], y[:, :columns].contiguous()), whole[:rows, :columns])


@pytest.mark.parametrize("kernel", [convert, store])
def test_bfloat16_is_rounded_to_the_nearest_even(kernel: Any) -> None:
    random = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << 32, 1 << 13, np.uint32).view(np.float32))
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -0.0, 1e-40, 3.4e38, float("nan"), -1e-39])
    for x in (random, halves):
        out = torch.zeros(len(x), dtype=torch.bfloat16)
        kernel[(1,)](x, out, N=len(x))
        torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_every_bfloat16_number_is_read_as_it_is() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.zeros(len(x))
    convert[(1,)](x, out, N=len(x))
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", [add, total])
def test_arithmetic_on_bfloat16_is_refused(kernel: Any) -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="convert them to float32"):
        kernel[(1,)](x, torch.zeros(16, dtype=torch.bfloat16), N=16)
