"""Programs that repeat one op over weights of its own each time: how an op is timed through an executable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from truffula.kernels.backend import PullWeight, QuantisedArray
from truffula.kernels.program import (
    Attention,
    Buffer,
    Embed,
    KvGroup,
    KvPlane,
    Linear,
    Logits,
    ModuleSlice,
    Norm,
    Op,
    Output,
    Program,
    Ref,
    Site,
    SiteSlice,
    TakeRows,
    WeightDecl,
    WeightPart,
)
from truffula.testing.programs import Array, as_dtype, random_blocks

IDS = 64
"""Rows of the table that feeds the op: token ids are below it."""


@dataclass(frozen=True)
class Repeated:
    """A program in which one op stands ``count`` times, and its weights, which are stored as ``stored``."""

    program: Program
    pull: PullWeight
    count: int


def repeated_linear(outputs: int, inputs: int, stored: str, count: int) -> Repeated:
    """``count`` Linears [outputs, inputs], each with a weight and a site; ``stored``: a dtype or a kind of blocks."""
    ops, sites = [], []
    for i in range(count):
        sites.append(Site(i, "linear", i, inputs, outputs, (ModuleSlice(f"layers.{i}.l", 0, outputs, outputs),)))
        ops.append(
            Linear(
                name=f"l{i}", layer=i, x=Ref(0, 0, inputs), weight=i, out=Ref(1, 0, outputs),
                slices=(SiteSlice(i, 0, outputs),),
            )
        )  # fmt: skip
    matrix = random_matrix(outputs, inputs, stored)
    shapes: list[tuple[int, ...]] = [(outputs, inputs)] * count
    return _program(inputs, outputs, ops, shapes, [matrix], sites=sites)


def repeated_norm(width: int, count: int) -> Repeated:
    """``count`` RMS norms, each with its vector."""
    ops = [
        Norm(name=f"n{i}", x=Ref(0, 0, width), out=Ref(1, 0, width), kind="rms", eps=1e-5, weight=i)
        for i in range(count)
    ]
    return _program(width, width, ops, [(width,)] * count, [np.ones(width, np.float32)])


def repeated_attention(heads: int, kv_heads: int, dim: int, count: int) -> Repeated:
    """``count`` attentions over caches of their own; queries, keys and values are columns of one buffer."""
    width = (heads + 2 * kv_heads) * dim
    q, k = Ref(0, 0, heads * dim), Ref(0, heads * dim, kv_heads * dim)
    v = Ref(0, (heads + kv_heads) * dim, kv_heads * dim)
    planes = tuple(KvPlane(i, i // 2, kv_heads * dim) for i in range(2 * count))
    ops = [
        Attention(
            name=f"a{i}", layer=i, q=q, k=k, v=v, out=Ref(1, 0, heads * dim), group=0, planes=(2 * i, 2 * i + 1),
            heads=heads, kv_heads=kv_heads, dim_k=dim, dim_v=dim, scale=dim**-0.5,
        )
        for i in range(count)
    ]  # fmt: skip
    return _program(width, heads * dim, ops, [], [], groups=(KvGroup(0, planes),))


def head(vocab: int, inputs: int, stored: str) -> Repeated:
    """Logits over ``vocab`` ids, once: they are a program's last op."""
    return _program(inputs, 1, [], [(vocab, inputs)], [random_matrix(vocab, inputs, stored)], vocab=vocab)


def random_matrix(outputs: int, inputs: int, stored: str) -> Array | QuantisedArray:
    """Numbers near zero in ``stored``: float32, bfloat16, or blocks of random bits with ordinary scales."""
    if stored in ("float32", "bfloat16"):
        rng = np.random.default_rng(0)
        return as_dtype(rng.standard_normal((outputs, inputs), np.float32) * inputs**-0.5, stored)
    return random_blocks(stored, outputs, inputs)


def _program(
    inputs: int, outputs: int, ops: Sequence[Op], shapes: Sequence[tuple[int, ...]],
    values: Sequence[Array | QuantisedArray], *, sites: Sequence[Site] = (), groups: tuple[KvGroup, ...] = (),
    vocab: int = 0,
) -> Repeated:  # fmt: skip
    """Around the ops: a table that feeds buffer 0, and logits, which are as small as can be unless ``vocab`` is."""
    taken = inputs if vocab else 2
    buffers = (
        Buffer(0, "x", "T", inputs), Buffer(1, "out", "T", outputs), Buffer(2, "taken", "R", taken),
        Buffer(3, "logits", "R", vocab or 2, "float32"),
    )  # fmt: skip
    weights = [
        WeightDecl(i, f"w{i}", shape, (WeightPart(f"w{i}"),), frozenset({"vector" if len(shape) == 1 else "matmul"}))
        for i, shape in enumerate(shapes)
    ]
    table, small = len(weights), len(weights) + 1
    weights.append(WeightDecl(table, "table", (IDS, inputs), (WeightPart("table"),), frozenset({"rows"})))
    weights.append(WeightDecl(small, "small", (2, 2), (WeightPart("small"),), frozenset({"matmul"})))
    rows = random_matrix(IDS, inputs, "bfloat16")
    logits = Logits(name="logits", x=Ref(2, 0, taken), weight=0 if vocab else small, out=Ref(3, 0, vocab or 2))
    program = Program(
        name="repeated", vocab_size=vocab or 2, buffers=buffers, weights=tuple(weights), sites=tuple(sites),
        rope_tables=(), kv_groups=groups, result=logits.out, output=Output("logits", vocab or 2), max_positions=1 << 20,
        ops=(
            Embed(name="embed", table=table, out=Ref(0, 0, inputs)), *ops,
            TakeRows(name="take", x=Ref(0, 0, taken), out=Ref(2, 0, taken)), logits,
        ),
    )  # fmt: skip

    def pull(decl: WeightDecl) -> list[Array | QuantisedArray]:
        if decl.id == small:
            return [np.ones((2, 2), np.float32)]
        return [rows if decl.id == table else values[0]]

    return Repeated(program, pull, max(1, len(ops)))
