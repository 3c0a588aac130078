"""A small llama-like program written by hand, without the decoder: for tests of backends alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny llama. ``window`` is that of every layer, or a tuple that is repeated over the layers."""

    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    feed_forward: int = 48
    vocab: int = 61
    window: int | tuple[int | None, ...] | None = None
    softcap: float | None = None
    max_positions: int = 8192

    def windows(self) -> list[int | None]:
        """The window of each layer."""
        pattern = self.window if isinstance(self.window, tuple) else (self.window,)
        return [pattern[layer % len(pattern)] for layer in range(self.layers)]


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


def llama_program(shape: Shape | None = None) -> Program:
    """A pre-norm decoder: fused qkv and gate/up, rotary positions, a tied head. All of its linears are sites."""
    s, b = shape or Shape(), _Builder()
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
    windows = s.windows()
    groups: dict[int | None, list[KvPlane]] = {
        window: [] for window in sorted(set(windows), key=lambda w: (w is not None, w or 0))
    }
    for layer, window in enumerate(windows):
        at = f"layers.{layer}"
        norm1, norm2 = (b.weight(f"{at}.norm{i}", (s.hidden,), "vector") for i in (1, 2))
        w_qkv = b.weight(f"{at}.qkv", (q_width + 2 * kv_width, s.hidden), "matmul", (q_width, kv_width, kv_width))
        w_o = b.weight(f"{at}.o", (s.hidden, q_width), "matmul")
        w_gate_up = b.weight(f"{at}.gate_up", (2 * s.feed_forward, s.hidden), "matmul", (s.feed_forward,) * 2)
        w_down = b.weight(f"{at}.down", (s.hidden, s.feed_forward), "matmul")
        groups[window] += [KvPlane(2 * layer, layer, kv_width), KvPlane(2 * layer + 1, layer, kv_width)]
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
                group=list(groups).index(window), planes=(2 * layer, 2 * layer + 1),
                heads=s.heads, kv_heads=s.kv_heads, dim_k=s.head_dim, dim_v=s.head_dim, scale=s.head_dim**-0.5,
                window=window, softcap=s.softcap,
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
        rope_tables=(RopeTable(0, inv_freq),), ops=tuple(b.ops),
        kv_groups=tuple(KvGroup(i, tuple(planes), window) for i, (window, planes) in enumerate(groups.items())),
        result=logits, output=Output("logits", s.vocab), max_positions=s.max_positions,
    )  # fmt: skip
