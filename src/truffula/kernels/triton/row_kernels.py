"""Kernels of ops on rows alone. Each program takes rows until there are none; ``counts`` holds their number."""

from __future__ import annotations

import triton
import triton.language as tl

from truffula.kernels.triton.linear_kernels import R_ROWS, T_ROWS
from truffula.kernels.triton.math_kernels import activate, clamp, sigmoid, tanh


@triton.jit
def embed(table, ids, add, out, counts, scale, last, stride_add, stride_out, D: tl.constexpr, B: tl.constexpr,
          OFFSET: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """``table[ids + OFFSET] * scale + add``; ids behind ``last`` are read as ``last``."""
    for t in range(tl.program_id(0), tl.load(counts + T_ROWS), tl.num_programs(0)):
        i = tl.arange(0, B)
        row = tl.minimum(tl.load(ids + t) + OFFSET, last).to(tl.int64)
        v = tl.load(table + row * D + i, mask=i < D, other=0.0).to(tl.float32)
        if SCALE:
            v = v * scale
        if ADD:
            v += tl.load(add + tl.cast(t, tl.int64) * stride_add + i, mask=i < D, other=0.0).to(tl.float32)
        tl.store(out + tl.cast(t, tl.int64) * stride_out + i, v.to(out.dtype.element_ty), mask=i < D)


@triton.jit
def take_rows(x, rows, out, counts, stride_x, stride_out, D: tl.constexpr, B: tl.constexpr):
    for r in range(tl.program_id(0), tl.load(counts + R_ROWS), tl.num_programs(0)):
        i = tl.arange(0, B)
        v = tl.load(x + tl.load(rows + r).to(tl.int64) * stride_x + i, mask=i < D, other=0.0)
        tl.store(out + tl.cast(r, tl.int64) * stride_out + i, v.to(out.dtype.element_ty), mask=i < D)


@triton.jit
def norm(x, weight, bias, gate, plus, out, counts, stride_x, stride_gate, stride_plus, stride_out, eps,
         OF_R: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, B: tl.constexpr, RMS: tl.constexpr,
         FIRST: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SHARED: tl.constexpr, GATE: tl.constexpr,
         PLUS: tl.constexpr):  # fmt: skip
    """See ``program.Norm``: D columns a group, SHARED: of one weight; FIRST: rounded before the weight."""
    rounded: tl.constexpr = out.dtype.element_ty
    for q in range(tl.program_id(0), tl.load(counts + (R_ROWS if OF_R else T_ROWS)) * GROUPS, tl.num_programs(0)):
        t = tl.cast(q // GROUPS, tl.int64)
        i = tl.arange(0, B)
        ok = i < D
        c = q % GROUPS * D + i
        v = tl.load(x + t * stride_x + c, mask=ok, other=0.0).to(tl.float32)
        if RMS:
            v = v * tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        else:
            v = tl.where(ok, v - tl.sum(v, 0) / D, 0.0)
            v = v * tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        if FIRST:
            v = v.to(rounded).to(tl.float32)
        if WEIGHT:
            v = v * tl.load(weight + (i if SHARED else c), mask=ok, other=0.0)
        if BIAS:
            v += tl.load(bias + (i if SHARED else c), mask=ok, other=0.0)
        if GATE is not None:
            if FIRST:
                v = v.to(rounded).to(tl.float32)
            v = v * activate(tl.load(gate + t * stride_gate + c, mask=ok, other=0.0).to(tl.float32), GATE)
        if PLUS:
            v = v.to(rounded).to(tl.float32)
            v += tl.load(plus + t * stride_plus + c, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + t * stride_out + c, v.to(rounded), mask=ok)


@triton.jit
def rope_rows(positions, inv_freq, out, counts, factor, stride_out, P: tl.constexpr, B: tl.constexpr):
    """[cos | sin] of position · inv_freq, times ``factor``."""
    for t in range(tl.program_id(0), tl.load(counts + T_ROWS), tl.num_programs(0)):
        i = tl.arange(0, B)
        angle = tl.load(positions + t).to(tl.float32) * tl.load(inv_freq + i, mask=i < P, other=0.0)
        to = out + tl.cast(t, tl.int64) * stride_out + i
        tl.store(to, tl.cos(angle) * factor, mask=i < P)
        tl.store(to + P, tl.sin(angle) * factor, mask=i < P)


@triton.jit
def rope(x, rows, counts, stride_x, stride_rows, HEADS: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
         PAIRS: tl.constexpr, B: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Rotates in place."""
    for q in range(tl.program_id(0), tl.load(counts + T_ROWS) * HEADS, tl.num_programs(0)):
        t = tl.cast(q // HEADS, tl.int64)
        i = tl.arange(0, B)
        ok = i < PAIRS
        a = x + t * stride_x + q % HEADS * WIDTH + START + (i if HALF else 2 * i)
        b = a + (PAIRS if HALF else 1)
        cos = tl.load(rows + t * stride_rows + i, mask=ok, other=0.0).to(tl.float32)
        sin = tl.load(rows + t * stride_rows + PAIRS + i, mask=ok, other=0.0).to(tl.float32)
        u = tl.load(a, mask=ok, other=0.0).to(tl.float32)
        v = tl.load(b, mask=ok, other=0.0).to(tl.float32)
        tl.store(a, (u * cos - v * sin).to(x.dtype.element_ty), mask=ok)
        tl.store(b, (v * cos + u * sin).to(x.dtype.element_ty), mask=ok)


@triton.jit
def pointwise(x, y, out, weight, positions, counts, stride_x, stride_y, stride_out, p0, p1, p2, OF_R: tl.constexpr,
              D: tl.constexpr, B: tl.constexpr, KIND: tl.constexpr, ACT: tl.constexpr, WEIGHT: tl.constexpr,
              SHARE: tl.constexpr):  # fmt: skip
    """See ``program.Pointwise``; a column of y is for SHARE columns of x."""
    blocks: tl.constexpr = (D + B - 1) // B
    for q in range(tl.program_id(0), tl.load(counts + (R_ROWS if OF_R else T_ROWS)) * blocks, tl.num_programs(0)):
        t = tl.cast(q // blocks, tl.int64)
        c = q % blocks * B + tl.arange(0, B)
        ok = c < D
        v = tl.load(x + t * stride_x + c, mask=ok, other=0.0).to(tl.float32)
        if KIND == "act":
            v = activate(v, ACT)
        elif KIND == "scale":
            v = v * (tl.load(weight) if WEIGHT else p0)
        elif KIND == "clip":
            v = clamp(v, -p0, p0)
        elif KIND == "softcap":
            v = tanh(v / p0) * p0
        elif KIND == "position_scale":
            steps = tl.floor((tl.load(positions + t).to(tl.float32) + p2) / p1)
            v = v * (1.0 + p0 * tl.log(1.0 + steps))
        else:
            other = tl.load(y + t * stride_y + c // SHARE, mask=ok, other=0.0).to(tl.float32)
            if KIND == "add":
                v += other
            elif KIND == "mul":
                v = v * activate(other, ACT)
            else:
                v = v * sigmoid(other)
        tl.store(out + t * stride_out + c, v.to(out.dtype.element_ty), mask=ok)


@triton.jit
def write_rows(x, slots, plane, counts, stride_x, W: tl.constexpr, B: tl.constexpr):
    """Row t to row ``slots[t]`` of a plane ``[slots, W]``."""
    for t in range(tl.program_id(0), tl.load(counts + T_ROWS), tl.num_programs(0)):
        i = tl.arange(0, B)
        v = tl.load(x + tl.cast(t, tl.int64) * stride_x + i, mask=i < W, other=0.0)
        at = plane + tl.load(slots + t).to(tl.int64) * W + i
        tl.store(at, v.to(plane.dtype.element_ty), mask=i < W)
