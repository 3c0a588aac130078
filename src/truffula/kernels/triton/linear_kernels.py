"""Kernels of products with weights: ``product`` and the shrinks of adapters, then ``finish``.

``product`` writes float32 sums to a workspace, ``finish`` adds the adapters and applies the epilogue. Both read the
numbers of their items from memory, so that the grid is fixed. A row's sums have one order: K in blocks of BK, these in
SPLIT runs of CHUNK columns, the runs in order. Only how many rows and columns an item has may differ from step to step.

The item lists are those of ``work.py``, the descriptors of a step's adapters those of ``adapters.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from truffula.kernels.triton.math_kernels import activate, clamp, tanh

WORDS = tl.constexpr(8)
"""int64 words of a descriptor: A, B, rank, first column of h, dtypes of A + 4 of B, the bits of the scale, the column
scale, the bias."""
T_ROWS, R_ROWS, T_PIECES, R_PIECES, T_SHRINKS, R_SHRINKS = (tl.constexpr(i) for i in range(6))
"""Places of the step's counts."""


@triton.jit
def _run(x, w, stride_x, m, m_ok, c, c_ok, first, last, I: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
         BK: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Columns ``first .. last`` of the rows ``m`` of x times those of the rows ``c`` of w ``[rows, I]``. Unless of one
    dtype, both are converted to float32 or, with ROUND, x to that of w."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(first, last, BK):
        k = k0 + tl.arange(0, BK)
        xv = tl.load(x + m[:, None] * stride_x + k[None, :], mask=m_ok[:, None] & (k < last)[None, :], other=0.0)
        wv = tl.load(w + c[None, :] * I + k[:, None], mask=c_ok[None, :] & (k < last)[:, None], other=0.0)
        if ROUND or xv.dtype == wv.dtype:
            acc = tl.dot(xv.to(wv.dtype), wv, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(xv.to(tl.float32), wv.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _shrink(x, h, shrinks, entries, item, e0, stride_x, stride_h, plane_h, part_h, part,
            I: tl.constexpr, NS: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr,
            BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x Aᵀ of one slice for the rows of one item of ``shrinks``, over run ``part`` or all of them, into h."""
    at = shrinks + (item // NS) * 4
    lo = tl.load(at)
    hi = tl.load(at + 1)
    plane = tl.load(at + 3)
    d = tl.load(entries + tl.load(at + 2)).to(tl.pointer_type(tl.int64)) + (e0 + item % NS) * WORDS
    a = tl.load(d)
    if a != 0:
        rank = tl.load(d + 2).to(tl.int32)
        kind = tl.load(d + 4).to(tl.int32) % 4
        m = (lo + tl.arange(0, BM)).to(tl.int64)
        m_ok = m < hi
        to = h + part * part_h + plane * plane_h + tl.load(d + 3)
        for r0 in range(0, rank, BR):
            c = (r0 + tl.arange(0, BR)).to(tl.int64)
            c_ok = c < rank
            total = tl.zeros((BM, BR), tl.float32)
            for run in range(0, SPLIT // PARTS):
                first = (part + run) * CHUNK
                last = tl.minimum(first + CHUNK, I)
                if kind == 2:
                    total += _run(x, a.to(tl.pointer_type(tl.bfloat16)), stride_x, m, m_ok, c, c_ok, first, last, I,
                                  BM, BR, BK, False, PRECISION)  # fmt: skip
                elif kind == 1:
                    total += _run(x, a.to(tl.pointer_type(tl.float16)), stride_x, m, m_ok, c, c_ok, first, last, I,
                                  BM, BR, BK, False, PRECISION)  # fmt: skip
                else:
                    total += _run(x, a.to(tl.pointer_type(tl.float32)), stride_x, m, m_ok, c, c_ok, first, last, I,
                                  BM, BR, BK, False, PRECISION)  # fmt: skip
            tl.store(to + m[:, None] * stride_h + c[None, :], total, mask=m_ok[:, None] & c_ok[None, :])


@triton.jit(do_not_specialize=["e0"])
def product(x, w, ws, h, counts, shrinks, entries, e0, stride_x, stride_ws, part_ws, stride_h, plane_h, part_h,
            OF_R: tl.constexpr, O: tl.constexpr, I: tl.constexpr, NS: tl.constexpr, SPLIT: tl.constexpr,
            CHUNK: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            BS: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
            SHRINK_PRECISION: tl.constexpr):  # fmt: skip
    """``ws[part] = x wᵀ`` over run ``part`` (PARTS = SPLIT), or over all runs (PARTS = 1), and the shrinks of the
    adapters into h. ``x [rows, I]``, ``w [O, I]``; NS slices whose descriptors begin at ``e0``."""
    rows = tl.load(counts + (R_ROWS if OF_R else T_ROWS))
    blocks: tl.constexpr = (O + BN - 1) // BN
    tiles = tl.cdiv(rows, BM)
    base = tiles * blocks * PARTS
    total_items = base
    if NS > 0:
        total_items += tl.load(counts + (R_SHRINKS if OF_R else T_SHRINKS)) * NS * PARTS
    for q in range(tl.program_id(0), total_items, tl.num_programs(0)):
        if q < base:
            part = (q // tiles) % PARTS
            m = (q % tiles * BM + tl.arange(0, BM)).to(tl.int64)
            c = (q // tiles // PARTS * BN + tl.arange(0, BN)).to(tl.int64)
            m_ok = m < rows
            c_ok = c < O
            total = tl.zeros((BM, BN), tl.float32)
            for run in range(0, SPLIT // PARTS):
                first = (part + run) * CHUNK
                last = tl.minimum(first + CHUNK, I)
                total += _run(x, w, stride_x, m, m_ok, c, c_ok, first, last, I, BM, BN, BK, True, PRECISION)
            tl.store(ws + part * part_ws + m[:, None] * stride_ws + c[None, :], total,
                     mask=m_ok[:, None] & c_ok[None, :])  # fmt: skip
        else:
            if NS > 0:
                s = q - base
                _shrink(x, h, shrinks, entries, s // PARTS, e0, stride_x, stride_h, plane_h, part_h, s % PARTS, I, NS,
                        PARTS, SPLIT, CHUNK, BS, BR, BK, SHRINK_PRECISION)  # fmt: skip


@triton.jit
def _expand(acc, h, b, m, m_ok, c, c_ok, rank, stride_h, part_h, PARTS: tl.constexpr, BM: tl.constexpr,
            BR: tl.constexpr, HALVES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``acc + h Bᵀ``, h being the sum of its parts in order. HALVES: two bfloat16 products make one of float32 h."""
    for r0 in range(0, rank, BR):
        k = r0 + tl.arange(0, BR)
        hv = tl.zeros((BM, BR), tl.float32)
        for part in tl.static_range(PARTS):
            at = h + part * part_h + m[:, None] * stride_h + k[None, :]
            hv += tl.load(at, mask=m_ok[:, None] & (k < rank)[None, :], other=0.0)
        bv = tl.load(b + c[None, :] * rank + k[:, None], mask=c_ok[None, :] & (k < rank)[:, None], other=0.0)
        if HALVES:
            high = hv.to(tl.bfloat16)
            acc = tl.dot(high, bv, acc)
            acc = tl.dot((hv - high.to(tl.float32)).to(tl.bfloat16), bv, acc)
        else:
            acc = tl.dot(hv, bv.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _adapted(y, h, entries, weights, bounds, e0, entry, count, m, m_ok, c0, stride_h, plane_h, part_h,
             NS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """The base's product ``y`` of columns ``c0 ..`` with what ``count`` adapters from ``entry`` add to it, in order."""
    base = y
    c = c0 + tl.arange(0, BN)
    for j in range(0, count):
        table = tl.load(entries + entry + j).to(tl.pointer_type(tl.int64))
        weight = tl.load(weights + entry + j)
        for i in tl.static_range(NS):
            lo = tl.load(bounds + 2 * i)
            hi = tl.load(bounds + 2 * i + 1)
            if (c0 < hi) & (c0 + BN > lo):
                d = table + (e0 + i) * WORDS
                rank = tl.load(d + 2).to(tl.int32)
                kind = tl.load(d + 4).to(tl.int32) // 4
                pb = tl.load(d + 1)
                at = (c - lo).to(tl.int64)
                ok = (c >= lo) & (c < hi)
                hp = h + j * plane_h + tl.load(d + 3)
                delta = tl.zeros((BM, BN), tl.float32)
                if kind == 2:
                    delta = _expand(delta, hp, pb.to(tl.pointer_type(tl.bfloat16)), m, m_ok, at, ok, rank, stride_h,
                                    part_h, PARTS, BM, BR, PRECISION != "ieee", PRECISION)  # fmt: skip
                elif kind == 1:
                    delta = _expand(delta, hp, pb.to(tl.pointer_type(tl.float16)), m, m_ok, at, ok, rank, stride_h,
                                    part_h, PARTS, BM, BR, False, PRECISION)  # fmt: skip
                else:
                    delta = _expand(delta, hp, pb.to(tl.pointer_type(tl.float32)), m, m_ok, at, ok, rank, stride_h,
                                    part_h, PARTS, BM, BR, False, PRECISION)  # fmt: skip
                delta = tl.load(d + 5).to(tl.int32).to(tl.float32, bitcast=True) * delta
                pc = tl.load(d + 6)
                if pc != 0:
                    factor = tl.load(pc.to(tl.pointer_type(tl.float32)) + at, mask=ok, other=1.0)
                    delta = factor[None, :] * (base + delta) - base
                bias = tl.load(d + 7)
                if bias != 0:
                    delta += tl.load(bias.to(tl.pointer_type(tl.float32)) + at, mask=ok, other=0.0)[None, :]
                y += weight * delta
    return y


@triton.jit
def _sum(ws, m, ok, c, stride_ws, part_ws, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    y = tl.zeros((BM, BN), tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(ws + part * part_ws + m[:, None] * stride_ws + c[None, :], mask=ok, other=0.0)
    return y


@triton.jit(do_not_specialize=["e0"])
def finish(ws, h, counts, pieces, entries, weights, bounds, e0, bias, residual, out, stride_ws, part_ws, stride_h,
           plane_h, part_h, stride_res, stride_out, clip, scale, glu_limit, glu_offset, softcap,
           OF_R: tl.constexpr, O: tl.constexpr, NS: tl.constexpr, PARTS: tl.constexpr, GLU: tl.constexpr,
           BIAS: tl.constexpr, CLIP: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr, RESIDUAL: tl.constexpr,
           SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """``out = epilogue(Σ ws + adapters)``, one item of ``pieces`` (lo, hi, first entry, entries) at a time."""
    W: tl.constexpr = O // 2 if GLU else O
    blocks: tl.constexpr = (W + BN - 1) // BN
    for q in range(tl.program_id(0), tl.load(counts + (R_PIECES if OF_R else T_PIECES)) * blocks, tl.num_programs(0)):
        at = pieces + q // blocks * 4
        entry = tl.load(at + 2)
        count = tl.load(at + 3)
        m = (tl.load(at) + tl.arange(0, BM)).to(tl.int64)
        m_ok = m < tl.load(at + 1)
        c0 = q % blocks * BN
        c = c0 + tl.arange(0, BN)
        c_ok = c < W
        ok = m_ok[:, None] & c_ok[None, :]
        y = _sum(ws, m, ok, c, stride_ws, part_ws, PARTS, BM, BN)
        if NS > 0:
            y = _adapted(y, h, entries, weights, bounds, e0, entry, count, m, m_ok, c0, stride_h, plane_h, part_h,
                         NS, PARTS, BM, BN, BR, PRECISION)  # fmt: skip
        if BIAS:
            y += tl.load(bias + c, mask=c_ok, other=0.0)[None, :]
        if CLIP:
            y = clamp(y, -clip, clip)
        if GLU:
            u = _sum(ws, m, ok, c + W, stride_ws, part_ws, PARTS, BM, BN)
            if NS > 0:
                u = _adapted(u, h, entries, weights, bounds, e0, entry, count, m, m_ok, c0 + W, stride_h, plane_h,
                             part_h, NS, PARTS, BM, BN, BR, PRECISION)  # fmt: skip
            if BIAS:
                u += tl.load(bias + W + c, mask=c_ok, other=0.0)[None, :]
            if CLIP:
                u = clamp(u, -clip, clip)
            if LIMIT:
                y = tl.where(y > glu_limit, glu_limit, y)
                u = clamp(u, -glu_limit, glu_limit)
            y = activate(y, ACT) * (u + glu_offset)
        else:
            y = activate(y, ACT)
        y = y * scale
        if RESIDUAL:
            y += tl.load(residual + m[:, None] * stride_res + c[None, :], mask=ok, other=0.0).to(tl.float32)
        if SOFTCAP:
            y = tanh(y / softcap) * softcap
        tl.store(out + m[:, None] * stride_out + c[None, :], y.to(out.dtype.element_ty), mask=ok)
