"""Attention over paged keys and values.

Keys are taken in splits of SPLIT positions. A split's sums begin anew; then they are added in order of the splits: in
registers (``attention`` with all splits in one item) or in memory (one split an item, then ``merge``), with equal bits.
So the bits of a row depend on its position alone, not on how a step cuts the prompt, nor on other rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from truffula.kernels.triton.math_kernels import tanh


@triton.jit
def _fold(top, den, acc, top_s, den_s, acc_s):
    """The sums of some splits, and those of the next one, together."""
    new = tl.maximum(top, top_s)
    safe = tl.where(new == float("-inf"), 0.0, new)
    a = tl.exp(top - safe)
    b = tl.exp(top_s - safe)
    return new, den * a + den_s * b, acc * a[:, None] + acc_s * b[:, None]


@triton.jit
def _with_sink(top, den, acc, sink):
    """A column more that takes weight and has no value."""
    new = tl.maximum(top, sink)
    a = tl.exp(top - new)
    return den * a + tl.exp(sink - new), acc * a[:, None]


@triton.jit
def attention(q, k, v, tables, q_start, kv_len, items, count, partial, tops, dens, sinks, slopes, out, scale, softcap,
           stride_q, stride_out, stride_tables,
           HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BDK: tl.constexpr,
           BDV: tl.constexpr, S: tl.constexpr, SPLIT: tl.constexpr, BQ: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr, WINDOW: tl.constexpr, CHUNKED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
           ALIBI: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One item: BQ queries of a sequence from its row ``q0``, and ``splits`` splits from ``s0``. With ``part`` >= 0 the
    sums of its one split go to rows ``part ..`` of ``partial``, else the result to ``out``. BM >= BQ · G rows."""
    G: tl.constexpr = HEADS // KV_HEADS
    for w in range(tl.program_id(0), tl.load(count) * KV_HEADS, tl.num_programs(0)):
        item = items + w // KV_HEADS * 5
        kh = w % KV_HEADS
        n = tl.load(item)
        q0 = tl.load(item + 1)
        s0 = tl.load(item + 2)
        splits = tl.load(item + 3)
        part = tl.load(item + 4)
        first = tl.load(q_start + n)
        nq = tl.load(q_start + n + 1) - first
        end = tl.load(kv_len + n)
        i = tl.arange(0, BM)
        head = kh * G + i % G
        row = q0 + i // G
        ok = (i < BQ * G) & (row < nq)
        pos = end - nq + row
        d = tl.arange(0, BDK)
        e = tl.arange(0, BDV)
        t = (first + row).to(tl.int64)
        qv = tl.load(q + t[:, None] * stride_q + head[:, None] * DK + d[None, :],
                     mask=ok[:, None] & (d < DK)[None, :], other=0.0)  # fmt: skip
        qv = qv.to(k.dtype.element_ty)
        low = end - nq + q0  # the first query's first key: those before may be freed
        if WINDOW > 0:
            low = low // WINDOW * WINDOW if CHUNKED else tl.maximum(low - WINDOW + 1, 0)
        else:
            low = 0
        high = tl.minimum(end, end - nq + q0 + BQ)
        top = tl.full((BM,), float("-inf"), tl.float32)
        den = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BDV), tl.float32)
        for split in range(s0, s0 + splits):
            top_s = tl.full((BM,), float("-inf"), tl.float32)
            den_s = tl.zeros((BM,), tl.float32)
            acc_s = tl.zeros((BM, BDV), tl.float32)
            begin = tl.maximum(split * SPLIT, low // BN * BN)
            for j0 in range(begin, tl.minimum(split * SPLIT + SPLIT, high), BN):
                j = j0 + tl.arange(0, BN)
                there = (j >= low) & (j < high)
                block = tl.load(tables + n.to(tl.int64) * stride_tables + j // S, mask=there, other=0).to(tl.int64)
                slot = block * S + j % S
                kv = tl.load(k + slot[None, :] * (KV_HEADS * DK) + kh * DK + d[:, None],
                             mask=there[None, :] & (d < DK)[:, None], other=0.0)  # fmt: skip
                scores = tl.dot(qv, kv, input_precision=PRECISION) * scale
                if SOFTCAP:
                    scores = tanh(scores / softcap) * softcap
                if ALIBI == 1:
                    scores += tl.load(slopes + head)[:, None] * j[None, :].to(tl.float32)
                elif ALIBI == 2:
                    place = j.to(tl.float32).to(tl.bfloat16).to(tl.float32)
                    bias = (tl.load(slopes + head)[:, None] * place[None, :]).to(tl.bfloat16)
                    scores += bias.to(tl.float32) * scale
                seen = there[None, :] & (j[None, :] <= pos[:, None])
                if WINDOW > 0:
                    if CHUNKED:
                        seen = seen & (j[None, :] // WINDOW == pos[:, None] // WINDOW)
                    else:
                        seen = seen & (j[None, :] > pos[:, None] - WINDOW)
                scores = tl.where(seen, scores, float("-inf"))
                new = tl.maximum(top_s, tl.max(scores, 1))
                safe = tl.where(new == float("-inf"), 0.0, new)
                p = tl.exp(scores - safe[:, None])
                a = tl.exp(top_s - safe)
                den_s = den_s * a + tl.sum(p, 1)
                vv = tl.load(v + slot[:, None] * (KV_HEADS * DV) + kh * DV + e[None, :],
                             mask=there[:, None] & (e < DV)[None, :], other=0.0)  # fmt: skip
                acc_s = tl.dot(p.to(vv.dtype), vv, acc_s * a[:, None], input_precision=PRECISION)
                top_s = new
            top, den, acc = _fold(top, den, acc, top_s, den_s, acc_s)
        to = e[None, :] < DV
        if part >= 0:
            at = (part + row - q0).to(tl.int64) * HEADS + head
            tl.store(partial + at[:, None] * DV + e[None, :], acc, mask=ok[:, None] & to)
            tl.store(tops + at, top, mask=ok)
            tl.store(dens + at, den, mask=ok)
        else:
            if SINKS:
                den, acc = _with_sink(top, den, acc, tl.load(sinks + head, mask=ok, other=0.0))
            y = acc / tl.where(ok, den, 1.0)[:, None]
            tl.store(out + t[:, None] * stride_out + head[:, None] * DV + e[None, :], y.to(out.dtype.element_ty),
                     mask=ok[:, None] & to)  # fmt: skip


@triton.jit
def merge(partial, tops, dens, items, count, sinks, out, stride_out, HEADS: tl.constexpr, DV: tl.constexpr,
          BDV: tl.constexpr, BQ: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """One item: row ``t``, whose sums of ``splits`` splits are BQ rows apart from row ``part`` on."""
    for w in range(tl.program_id(0), tl.load(count) * HEADS, tl.num_programs(0)):
        item = items + w // HEADS * 3
        head = w % HEADS
        t = tl.load(item).to(tl.int64)
        part = tl.load(item + 1)
        e = tl.arange(0, BDV)
        one = tl.arange(0, 1)
        top = tl.full((1,), float("-inf"), tl.float32)
        den = tl.zeros((1,), tl.float32)
        acc = tl.zeros((1, BDV), tl.float32)
        for s in range(0, tl.load(item + 2)):
            at = (part + s * BQ).to(tl.int64) * HEADS + head
            acc_s = tl.load(partial + at * DV + e, mask=e < DV, other=0.0)[None, :]
            top, den, acc = _fold(top, den, acc, tl.load(tops + at + one), tl.load(dens + at + one), acc_s)
        if SINKS:
            den, acc = _with_sink(top, den, acc, tl.load(sinks + head + one))
        y = acc / den[:, None]
        to = out + t * stride_out + head * DV + e[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=(e < DV)[None, :])
