"""A small llama-like program written by hand, with random weights: for tests and benchmarks of backends alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from truffula.kernels.adapters import SiteTensors, low_rank, make_image
from truffula.kernels.backend import Executable, PullWeight
from truffula.kernels.inputs import StepInputs
from truffula.kernels.program import (
    Attention,
    Buffer,
    BufferDtype,
    Embed,
    Epilogue,
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
    Rope,
    RopeRows,
    RopeTable,
    Rows,
    Site,
    SiteSlice,
    TakeRows,
    WeightDecl,
    WeightPart,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama: the defaults are tiny; ``SMOLLM2`` is the 135M model's."""

    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    feed_forward: int = 48
    vocab: int = 61
    window: int | None = None
    softcap: float | None = None
    max_positions: int = 8192


TINY = Shape()
SMOLLM2 = Shape(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, feed_forward=1536, vocab=49152)


class _Builder:
    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.weights: list[WeightDecl] = []
        self.sites: list[Site] = []
        self.ops: list[Op] = []

    def buffer(self, name: str, width: int, rows: Rows = "T", dtype: BufferDtype = "model") -> Ref:
        self.buffers.append(Buffer(len(self.buffers), name, rows, width, dtype))
        return Ref(self.buffers[-1].id, 0, width)

    def weight(self, name: str, shape: tuple[int, ...], uses: str, rows: tuple[int, ...] = ()) -> int:
        """``rows``: the sizes of the parts it is stacked from."""
        names = [name] if not rows else [f"{name}.{i}" for i in range(len(rows))]
        parts = tuple(WeightPart(part) for part in names)
        self.weights.append(WeightDecl(len(self.weights), name, shape, parts, frozenset(uses.split())))
        return self.weights[-1].id

    def slices(self, layer: int, inputs: int, widths: Mapping[str, int]) -> tuple[SiteSlice, ...]:
        made, lo = [], 0
        for name, width in widths.items():
            module = ModuleSlice(f"model.layers.{layer}.{name}", 0, width, width)
            self.sites.append(Site(len(self.sites), "linear", layer, inputs, width, (module,)))
            made.append(SiteSlice(self.sites[-1].id, lo, lo + width))
            lo += width
        return tuple(made)


def llama_program(shape: Shape = TINY) -> Program:
    """A pre-norm decoder: fused qkv and gate/up, rotary positions, a tied head. All of its linears are sites."""
    s, b = shape, _Builder()
    q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    x, normed = b.buffer("x", s.hidden), b.buffer("normed", s.hidden)
    qkv = b.buffer("qkv", q_width + 2 * kv_width)
    q, k = Ref(qkv.buffer, 0, q_width), Ref(qkv.buffer, q_width, kv_width)
    v = Ref(qkv.buffer, q_width + kv_width, kv_width)
    mixed, gated = b.buffer("mixed", q_width), b.buffer("gated", s.feed_forward)
    rows = b.buffer("rope", s.head_dim, dtype="float32")
    last, logits = b.buffer("last", s.hidden, "R"), b.buffer("logits", s.vocab, "R", "float32")
    table = b.weight("embed", (s.vocab, s.hidden), "rows matmul")
    b.ops += [RopeRows(name="rope", table=0, out=rows), Embed(name="embed", table=table, out=x)]
    planes = []
    for layer in range(s.layers):
        at = f"layers.{layer}"
        norm1, norm2 = (b.weight(f"{at}.norm{i}", (s.hidden,), "vector") for i in (1, 2))
        w_qkv = b.weight(f"{at}.qkv", (q_width + 2 * kv_width, s.hidden), "matmul", (q_width, kv_width, kv_width))
        w_o = b.weight(f"{at}.o", (s.hidden, q_width), "matmul")
        w_gate_up = b.weight(f"{at}.gate_up", (2 * s.feed_forward, s.hidden), "matmul", (s.feed_forward,) * 2)
        w_down = b.weight(f"{at}.down", (s.hidden, s.feed_forward), "matmul")
        planes += [KvPlane(2 * layer, layer, kv_width), KvPlane(2 * layer + 1, layer, kv_width)]
        b.ops += [
            Norm(name=f"{at}.norm1", layer=layer, x=x, out=normed, kind="rms", eps=1e-5, weight=norm1),
            Linear(
                name=f"{at}.qkv", layer=layer, x=normed, weight=w_qkv, out=qkv,
                slices=b.slices(layer, s.hidden, {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}),
            ),
            Rope(
                name=f"{at}.rope", layer=layer, x=Ref(qkv.buffer, 0, q_width + kv_width), rows=rows,
                heads=s.heads + s.kv_heads, head_dim=s.head_dim, start=0, dims=s.head_dim,
            ),
            Attention(
                name=f"{at}.attention", layer=layer, q=q, k=k, v=v, out=mixed,
                group=0, planes=(2 * layer, 2 * layer + 1),
                heads=s.heads, kv_heads=s.kv_heads, dim_k=s.head_dim, dim_v=s.head_dim, scale=s.head_dim**-0.5,
                window=s.window, softcap=s.softcap,
            ),
            Linear(
                name=f"{at}.o", layer=layer, x=mixed, weight=w_o, out=x,
                slices=b.slices(layer, q_width, {"o_proj": s.hidden}), epilogue=Epilogue(residual=x),
            ),
            Norm(name=f"{at}.norm2", layer=layer, x=x, out=normed, kind="rms", eps=1e-5, weight=norm2),
            Linear(
                name=f"{at}.gate_up", layer=layer, x=normed, weight=w_gate_up, out=gated,
                slices=b.slices(layer, s.hidden, {"gate_proj": s.feed_forward, "up_proj": s.feed_forward}),
                epilogue=Epilogue(activation="silu", glu=True),
            ),
            Linear(
                name=f"{at}.down", layer=layer, x=gated, weight=w_down, out=x,
                slices=b.slices(layer, s.feed_forward, {"down_proj": s.hidden}), epilogue=Epilogue(residual=x),
            ),
        ]  # fmt: skip
    norm = b.weight("norm", (s.hidden,), "vector")
    final = b.buffer("final", s.hidden, "R")
    b.ops += [
        TakeRows(name="take", x=x, out=last),
        Norm(name="norm", x=last, out=final, kind="rms", eps=1e-5, weight=norm),
        Logits(name="logits", x=final, weight=table, out=logits),
    ]
    inv_freq = tuple(10000.0 ** (-2 * i / s.head_dim) for i in range(s.head_dim // 2))
    return Program(
        name="llama-like", vocab_size=s.vocab, buffers=tuple(b.buffers), weights=tuple(b.weights), sites=tuple(b.sites),
        rope_tables=(RopeTable(0, inv_freq),), kv_groups=(KvGroup(0, "full", tuple(planes)),), ops=tuple(b.ops),
        result=logits, output=Output("logits", s.vocab), max_positions=s.max_positions,
    )  # fmt: skip


def as_dtype(array: Array, dtype: str) -> Array:
    """numpy array in ``float32``, ``float16`` or ``bfloat16``."""
    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def random_weights(program: Program, *, seed: int = 0, dtype: str = "float32") -> dict[str, list[Array]]:
    """Parts by weight name; matrices at 1/sqrt(I), vectors near 1. Fused weights get one array per part."""
    rng = np.random.default_rng(seed)
    made: dict[str, list[Array]] = {}
    for decl in program.weights:
        if len(decl.shape) == 1:
            whole = 1.0 + 0.1 * rng.standard_normal(decl.shape, np.float32)
        else:
            whole = rng.standard_normal(decl.shape, np.float32) * decl.shape[1] ** -0.5
        rows = _part_rows(program, decl)
        made[decl.name] = [as_dtype(part, dtype) for part in np.split(whole, np.cumsum(rows)[:-1])]
    return made


def _part_rows(program: Program, decl: WeightDecl) -> list[int]:
    if len(decl.parts) == 1:
        return [decl.shape[0]]
    op = next(op for op in program.ops if isinstance(op, Linear) and op.weight == decl.id)
    return [item.hi - item.lo for item in op.slices]


def pull_from(weights: Mapping[str, list[Array]]) -> PullWeight:
    """A ``PullWeight`` over ``random_weights``."""
    return lambda decl: weights[decl.name]


@dataclass(frozen=True)
class AdapterTensors:
    """An adapter as trained: what ``lora.image`` writes and ``attach`` packs."""

    generation: str
    rank: int
    sites: tuple[SiteTensors, ...]


def random_adapter(
    program: Program, *, rank: int = 4, seed: int = 0, dtype: str = "float32", sites: tuple[int, ...] | None = None
) -> AdapterTensors:
    """An adapter on ``sites`` (None: all of them) whose effect shows."""
    rng = np.random.default_rng(seed)
    tensors = []
    for site in program.sites:
        if sites is not None and site.id not in sites:
            continue
        a = rng.standard_normal((rank, site.in_features), np.float32) * site.in_features**-0.5
        b = rng.standard_normal((site.out_features, rank), np.float32) * rank**-0.5
        tensors.append(low_rank(site.id, as_dtype(a, dtype), as_dtype(b, dtype), float(rng.uniform(0.2, 0.5))))
    return AdapterTensors(f"random-{seed}", rank, tuple(tensors))


def attach(executable: Executable, adapter: AdapterTensors) -> int:
    """The slot of ``adapter``, packed in this process for ``executable``."""
    return executable.adapter(make_image(executable.layout, adapter.sites, generation=adapter.generation))


@dataclass(frozen=True)
class Part:
    """One sequence's share of a step: ``ids`` at positions ``start ..`` with its ``blocks``; ``slot`` is its adapter.

    ``logits``: whether the last row's are wanted, or all rows'.
    """

    ids: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    slot: int | None = None
    logits: str = "last"


def fill_step(inputs: StepInputs, parts: list[Part], block_size: int) -> None:
    """Write a step. ``parts`` must already be sorted as ``StepInputs`` wants them: by slot, base last."""
    i = inputs
    i.T = i.R = i.G = 0
    i.N = len(parts)
    for n, part in enumerate(parts):
        count, lo, lo_r = len(part.ids), i.T, i.R
        position = np.arange(part.start, part.start + count)
        i.token_ids[lo : lo + count] = part.ids
        i.position[lo : lo + count] = position
        i.rope_pos[:, lo : lo + count] = position
        blocks = np.asarray(part.blocks)
        i.slot_mapping[:, lo : lo + count] = blocks[position // block_size] * block_size + position % block_size
        i.block_tables[:, n] = -1
        i.block_tables[:, n, : len(blocks)] = blocks
        i.q_start[n], i.q_start[n + 1], i.kv_len[n] = lo, lo + count, part.start + count
        i.seq_slot[n] = n
        wanted = np.arange(lo if part.logits == "all" else lo + count - 1, lo + count)
        i.logit_rows[lo_r : lo_r + len(wanted)] = wanted
        i.T, i.R = lo + count, lo_r + len(wanted)
        if part.slot is None:
            continue
        if i.G and i.seg[i.G - 1, 2] == part.slot:
            i.seg[i.G - 1, 1], i.seg_r[i.G - 1, 1] = i.T, i.R
        else:
            i.seg[i.G], i.seg_r[i.G], i.seg_weight[i.G] = (lo, i.T, part.slot), (lo_r, i.R), 1.0
            i.G += 1
