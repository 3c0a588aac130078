"""``AttentionSpec``: attention with one KV cache per layer, its weights and its operations."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal

from truffula.kernels.program import Activation, Attention, Epilogue, Pointwise, Ref, Rope, RowOrder
from truffula.model.rows import LayerRows, NormSpec, RowPart

if TYPE_CHECKING:
    from truffula.model.builder import LayerBuilder
    from truffula.model.spec import ModuleNames


@dataclass(frozen=True)
class PositionScale:
    """Queries at position p are multiplied by 1 + beta * ln(1 + floor((p + offset) / step))."""

    beta: float
    step: float
    offset: float = 0.0


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention. ``window`` None is full attention, w lets query i see keys i - w < j <= i.

    ``rope`` is an index into ``ModelSpec.ropes``, or None for a layer without rotary embedding. ``q_norm`` and
    ``k_norm`` act per head, or over all heads with ``norm_over`` width; before the rotation, or after it with
    ``norm_rotated``. ``v_norm`` acts per head. ``keys_as_values``: v is k before its norm. ``kv_layer`` is the layer
    whose keys and values are attended to; then this one has none. ``clip`` bounds q, k and v before all that.
    ``key_scale`` multiplies k before the rotation, ``position_scale`` q last. ``scale`` multiplies q·k, ``softcap`` c
    makes scores c * tanh(s / c). ``chunked``: the window is a chunk of positions, see ``program.Attention``. ``sinks``
    is the tensor of a logit per head, which only counts in the softmax's denominator. ``gated``: the q module has the
    rows of q and of a gate for each head; the result is multiplied by sigmoid(gate). ``gate``: the same with a module
    of its own, of the part's input, and with ``gate_activation``; with ``gate_per_head`` it has one row per head.
    ``alibi`` and ``alibi_rounded``: see ``program.Attention``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: int | None
    window: int | None = None
    rope_layout: Literal["half", "interleaved"] = "half"
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    norm_over: Literal["head", "width"] = "head"
    norm_rotated: bool = False
    v_norm: NormSpec | None = None
    keys_as_values: bool = False
    kv_layer: int | None = None
    clip: float | None = None
    key_scale: float = 1.0
    position_scale: PositionScale | None = None
    softcap: float | None = None
    chunked: bool = False
    sinks: str | None = None
    gated: bool = False
    gate: str | None = None
    gate_activation: Activation = "sigmoid"
    gate_per_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    alibi: tuple[float, ...] = ()
    alibi_rounded: bool = False

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def gate_width(self) -> int:
        return self.q_width if self.gated else 0

    @property
    def qkv_width(self) -> int:
        own = 0 if self.kv_layer is not None else 1 if self.keys_as_values else 2
        return self.q_width + self.gate_width + own * self.kv_width

    @property
    def kind(self) -> str:
        limit = "full" if self.window is None else "chunked" if self.chunked else "sliding"
        return f"{limit} attention" + (f" of {self.window} tokens" if self.window is not None else "")

    @property
    def kv_widths(self) -> tuple[int, ...]:
        return () if self.kv_layer is not None else (self.kv_width, self.kv_width)

    def first_module(self, names: ModuleNames) -> str:
        return names.q if names.qkv_order == "split" else str(names.qkv)

    def last_module(self, names: ModuleNames) -> str:
        return names.out

    def rows(self, rows: LayerRows) -> None:
        names, width, order = rows.names, rows.hidden, None
        if names.qkv_order == "split":
            order = RowOrder(self.heads, (self.head_dim, self.head_dim)) if self.gated else None
            q_k_v: list[RowPart] = [(names.q, self.q_width + self.gate_width, order)]
            if self.kv_layer is None:
                q_k_v += [(name, self.kv_width) for name in (names.k, names.v)[: 1 if self.keys_as_values else 2]]
            fused = names.qkv if len(q_k_v) == 3 and not self.gated else None
            rows.linear("qkv", q_k_v, width, bias=self.qkv_bias, fused=fused)
        else:
            if names.qkv_order == "grouped" and self.kv_heads > 1:
                share = self.heads // self.kv_heads
                order = RowOrder(self.kv_heads, (share * self.head_dim, self.head_dim, self.head_dim))
            rows.linear("qkv", [(str(names.qkv), self.qkv_width, order)], width, bias=self.qkv_bias)
        rows.norm("q_norm", self.q_norm, self.q_width // self._groups(self.heads), self._groups(self.heads))
        rows.norm("k_norm", self.k_norm, self.kv_width // self._groups(self.kv_heads), self._groups(self.kv_heads))
        rows.norm("v_norm", self.v_norm, self.head_dim, self.kv_heads)
        if self.sinks is not None:
            rows.vector("sinks", self.sinks, self.heads)
        if self.gate is not None:
            rows.linear("gate", [(self.gate, self.heads if self.gate_per_head else self.q_width)], rows.hidden)
        rows.linear("out", [(names.out, rows.hidden)], self.q_width, bias=self.out_bias)

    def write(self, build: LayerBuilder, x: Ref) -> None:
        names = build.names
        qkv = build.buffer("qkv", self.qkv_width)
        q, k, v = Ref(qkv.buffer, 0, self.q_width), None, None
        gate = Ref(qkv.buffer, self.q_width, self.gate_width)
        if self.kv_layer is None:
            k = Ref(qkv.buffer, self.q_width + self.gate_width, self.kv_width)
            v = Ref(qkv.buffer, k.start + self.kv_width, self.kv_width)
        # transformers clips what its modules return.
        probe = build.probe(self.first_module(names), "out") if self.clip is None else None
        build.linear("qkv", x, qkv, probe, Epilogue(clip=self.clip))
        if k is not None and v is not None and self.v_norm is not None:
            source, v = (k, build.buffer("values", self.kv_width)) if self.keys_as_values else (v, v)
            build.norm("v_norm", self.v_norm, source, v, groups=self.kv_heads)
        if not self.norm_rotated:
            self._write_norms(build, q, k)
        if k is not None and self.key_scale != 1.0:
            build.append(Pointwise(name="key_scale", kind="scale", x=k, out=k, params=(self.key_scale,)))
        if self.rope is not None:
            self._rotate(build, self.rope, q, k)
        if self.norm_rotated:
            self._write_norms(build, q, k)
        if self.position_scale is not None:
            params = astuple(self.position_scale)
            build.append(Pointwise(name="position_scale", kind="position_scale", x=q, out=q, params=params))
        attended, probe = build.buffer("attended", self.q_width), build.probe(names.out, "in")
        group, planes = build.kv_planes(self.kv_layer)
        whole = not self.gated and self.gate is None
        build.append(Attention(name="attention", probe=probe if whole else None, q=q, k=k, v=v, out=attended,
                               group=group, planes=(planes[0], planes[1]), heads=self.heads, kv_heads=self.kv_heads,
                               dim_k=self.head_dim, dim_v=self.head_dim, scale=self.scale, window=self.window,
                               softcap=self.softcap, chunked=self.chunked, alibi=self.alibi,
                               alibi_rounded=self.alibi_rounded,
                               sinks=build.weight("sinks") if self.sinks is not None else None))  # fmt: skip
        if self.gate is not None:
            gate = build.buffer("gate", self.heads if self.gate_per_head else self.q_width)
            build.linear("gate", x, gate, build.probe(self.gate, "out"))
        if not whole:
            build.append(Pointwise(name="gated", probe=probe, kind="mul", activation=self.gate_activation, x=attended,
                                   y=gate, out=attended))  # fmt: skip
        build.output("out", attended)

    def _groups(self, heads: int) -> int:
        """The number of norms over the columns of ``heads`` heads."""
        return heads if self.norm_over == "head" else 1

    def _rotate(self, build: LayerBuilder, rope: int, q: Ref, k: Ref | None) -> None:
        """Append the rotation: where q and k are adjacent, one op for the heads of both."""
        last = not self.norm_rotated and self.position_scale is None and not self.gated and k is not None
        module = build.names.attention if last else None
        probe = None if module is None else build.probe(module, "in")
        if k is None:
            rotated = [q]
        else:
            rotated = [q, k] if self.gated else [Ref(q.buffer, q.start, q.width + k.width)]
        for x in rotated:
            build.append(Rope(name="rope", probe=probe, x=x, rows=build.rope_rows(rope),
                              heads=x.width // self.head_dim, head_dim=self.head_dim, start=0,
                              dims=build.spec.ropes[rope].dims, layout=self.rope_layout))  # fmt: skip

    def _write_norms(self, build: LayerBuilder, q: Ref, k: Ref | None) -> None:
        # One module for both is called twice, so that its output is not that of either.
        own = self.q_norm is None or self.k_norm is None or self.q_norm.module != self.k_norm.module
        if self.q_norm is not None:
            build.norm("q_norm", self.q_norm, q, q, groups=self._groups(self.heads), compared=own)
        if self.k_norm is not None and k is not None:
            build.norm("k_norm", self.k_norm, k, k, groups=self._groups(self.kv_heads), compared=own)
