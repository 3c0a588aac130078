"""Functions of float32 blocks that several kernels use. A NaN stays one: a row that holds any is reported."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """1 - 2 / (1 + exp(2x)), of the absolute value, so that no exponential overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def clamp(x, low, high):
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """``reference.ops.activation``; None: x."""
    if KIND == "silu":
        return x * sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif KIND == "relu2":
        return tl.where(x < 0.0, 0.0, x * x)
    elif KIND == "quick_gelu":
        return x * sigmoid(1.702 * x)
    elif KIND == "sigmoid":
        return sigmoid(x)
    elif KIND == "softplus":
        return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.where(x > 20.0, 20.0, x))))
    else:
        return x
