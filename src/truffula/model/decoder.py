"""Builds the ``Program`` of a ``ModelSpec``: the only implementation of the forward pass.

A pre-norm layer of six linears becomes seven ops: norm, qkv, rope, attention, output + residual, norm, gate-up with its
gated product, down + residual (the two residual sums ride in the linears' epilogues). A layer with norms after its
parts adds the residual in that norm instead. The rows whose logits are needed are selected before the last norm.

Each op has a probe, the place of the same value in transformers. The output of a fused linear is at the modules of its
slices; a gated product or a residual sum is the input of the next module; q and k after rope are the inputs of the
attention module.
"""

from __future__ import annotations

from collections.abc import Sequence

from truffula.errors import KernelError
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
    Pointwise,
    Probe,
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
from truffula.model.names import WeightNames
from truffula.model.spec import AttentionSpec, LayerSpec, ModelSpec, NormSpec, WeightRow
from truffula.weights.tying import Tie, TyingDecision


def build_program(spec: ModelSpec, names: WeightNames, tie: TyingDecision) -> Program:
    """The program of a model.

    Args:
        spec: The structure of the model.
        names: The tensor names of its weights in the checkpoint.
        tie: The tensors of embedding and head.

    Raises:
        KernelError: The spec is inconsistent, an internal error.
    """
    return _Builder(spec, names, tie).build()


class _Builder:
    def __init__(self, spec: ModelSpec, names: WeightNames, tie: TyingDecision) -> None:
        self.spec, self.names, self.tie = spec, names, tie
        self.buffers: list[Buffer] = []  # shared by all layers
        self.weights: list[WeightDecl] = []
        self.sites: list[Site] = []
        self.ops: list[Op] = []
        self.rows = {row.key: row for row in spec.rows}
        self.weight_ids: dict[str, int] = {}
        self.site_slices: dict[str, tuple[SiteSlice, ...]] = {}
        self.group_windows = _group_windows(spec)

    def build(self) -> Program:
        spec = self.spec
        embed, head = self._declare_tables()
        embed_site = self._table_site("embed")
        self.hidden = self._buffer("hidden", spec.hidden)
        self.normed = self._buffer("normed", spec.hidden)
        if any(layer.after_attention or layer.after_mlp for layer in spec.layers):
            self.branch = self._buffer("branch", spec.hidden)
        self.qkv = self._buffer("qkv", max(layer.attention.qkv_width for layer in spec.layers))
        self.attended = self._buffer("attended", max(layer.attention.q_width for layer in spec.layers))
        self.mlp = self._buffer("mlp", max(layer.mlp.width for layer in spec.layers))
        self.rope_rows = [self._buffer(f"rope{i}", table.dims) for i, table in enumerate(spec.ropes)]
        path = self._module(spec.names.embed)
        self._op(Embed(name="embed", table=embed, out=self.hidden, scale=spec.embed_scale, site=embed_site,
                       probe=Probe(path, "out")))  # fmt: skip
        for index, rows in enumerate(self.rope_rows):
            self._op(RopeRows(name=f"rope{index}", table=index, out=rows))
        for index, layer in enumerate(spec.layers):
            self._layer(index, layer)
        logits = self._logits(head)
        return Program(
            name=spec.model_type,
            vocab_size=spec.vocab_size,
            buffers=tuple(self.buffers),
            weights=tuple(self.weights),
            sites=tuple(self.sites),
            rope_tables=tuple(RopeTable(i, table.inv_freq, table.factor) for i, table in enumerate(spec.ropes)),
            kv_groups=_kv_groups(spec, self.group_windows),
            ops=tuple(self.ops),
            result=logits,
            output=Output("logits", spec.vocab_size),
            max_positions=spec.max_positions,
            notes=(self.tie.reason,),
        )

    def _buffer(self, name: str, width: int, rows: Rows = "T", dtype: BufferDtype = "model") -> Ref:
        self.buffers.append(Buffer(len(self.buffers), name, rows, width, dtype))
        return Ref(len(self.buffers) - 1, 0, width)

    # Declarations

    def _declare_tables(self) -> tuple[int, int]:
        """The weight ids of embedding and head, which are equal when tied."""
        tied, shape = self.tie.tie is not Tie.SEPARATE, self.rows["embed"].shape
        if tied:
            source = self.names.head if self.tie.tie is Tie.REVERSED else self.names.embed
            both = self._declare("embed", shape, (WeightPart(source),), frozenset({"rows", "matmul"}))
            return both, both
        embed = self._declare("embed", shape, (WeightPart(self.names.embed),), frozenset({"rows"}))
        return embed, self._declare("head", shape, (WeightPart(self.names.head),), frozenset({"matmul"}))

    def _declare(
        self, key: str, shape: tuple[int, ...], parts: tuple[WeightPart, ...], uses: frozenset[str],
        dtype: BufferDtype = "model",
    ) -> int:  # fmt: skip
        row = self.rows[key]
        name = row.slices[0].module if len(row.slices) == 1 else (row.fused or row.key)
        decl = WeightDecl(len(self.weights), f"{name}.{row.param}", shape, parts, uses, dtype)
        self.weights.append(decl)
        self.weight_ids[key] = decl.id
        return decl.id

    def _weight(self, key: str) -> int:
        """The id of a row's weight, which is declared with its sites at the first use."""
        if key in self.weight_ids:
            return self.weight_ids[key]
        row = self.rows[key]
        matrix = row.kind == "linear" and row.param == "weight"
        uses = frozenset({"matmul"}) if matrix else frozenset({"vector"})
        weight = self._declare(key, row.shape, self.names.parts[key], uses, row.dtype)
        if matrix:
            self.site_slices[key] = tuple(self._site(row, item.module, lo, hi) for item, lo, hi in row.spans)
        return weight

    def _bias(self, key: str) -> int | None:
        return self._weight(f"{key}.bias") if f"{key}.bias" in self.rows else None

    def _site(self, row: WeightRow, module: str, lo: int, hi: int) -> SiteSlice:
        count, root = hi - lo, self.spec.names.body
        modules = [ModuleSlice(root + module, 0, count, count)]
        if row.fused is not None:
            modules.append(ModuleSlice(root + row.fused, lo, hi, row.rows))
        site = Site(len(self.sites), "linear", row.layer, row.width, count, tuple(modules))
        self.sites.append(site)
        return SiteSlice(site.id, lo, hi)

    def _table_site(self, key: str) -> int:
        """Tables are sites of their own, on each side, even when they are one tensor (tying belongs to the base)."""
        vocab, hidden, names = self.spec.vocab_size, self.spec.hidden, self.spec.names
        if key == "embed":
            module = ModuleSlice(names.body + names.embed, 0, hidden, hidden)
            site = Site(len(self.sites), "embed", None, vocab, hidden, (module,))
        else:
            site = Site(len(self.sites), "head", None, hidden, vocab, (ModuleSlice(names.head, 0, vocab, vocab),))
        self.sites.append(site)
        return site.id

    def _module(self, path: str) -> str:
        return self.spec.names.body + path

    def _op(self, op: Op) -> None:
        self.ops.append(op)

    # Operations

    def _layer(self, index: int, layer: LayerSpec) -> None:
        prefix = self.spec.layer_prefix(index)
        source = self._norm(index, "before_attention", layer.before_attention, self.hidden, self.normed)
        self._attention(index, layer.attention, source)
        out = Ref(self.attended.buffer, 0, layer.attention.q_width)
        next_module = layer.before_mlp.module if layer.before_mlp is not None else self.spec.names.gate
        self._output(index, layer, "out", out, "attention", Probe(self._module(prefix + next_module), "in"))
        source = self._norm(index, "before_mlp", layer.before_mlp, self.hidden, self.normed)
        inner = self._mlp(index, layer, source)
        self._output(index, layer, "mlp_out", inner, "mlp", self._after_layer(index))

    def _norm(self, index: int, key: str, norm: NormSpec | None, x: Ref, out: Ref) -> Ref:
        """The buffer of the normed value: ``out``, or ``x`` when there is no norm."""
        if norm is None:
            return x
        prefix = self.spec.layer_prefix(index)
        self._op(self._norm_op(prefix + key, norm, x, out, index, Probe(self._module(prefix + norm.module), "out")))
        return out

    def _norm_op(
        self, key: str, norm: NormSpec, x: Ref, out: Ref, layer: int | None, probe: Probe,
        groups: int = 1, plus: Ref | None = None,
    ) -> Norm:  # fmt: skip
        return Norm(
            name=key, layer=layer, probe=probe, x=x, out=out, kind=norm.kind, eps=norm.eps, weight=self._weight(key),
            bias=self._bias(key), cast=norm.cast, groups=groups, plus=plus,
        )  # fmt: skip

    def _attention(self, index: int, spec: AttentionSpec, source: Ref) -> None:
        names, prefix = self.spec.names, self.spec.layer_prefix(index)
        attention = self._module(prefix + names.attention)
        qkv = Ref(self.qkv.buffer, 0, spec.qkv_width)
        q = Ref(qkv.buffer, 0, spec.q_width)
        k = Ref(qkv.buffer, spec.q_width, spec.kv_width)
        v = Ref(qkv.buffer, spec.q_width + spec.kv_width, spec.kv_width)
        self._linear(index, "qkv", source, qkv, Probe(self._module(prefix + names.q), "out"))
        for key, norm, ref, heads in (
            ("q_norm", spec.q_norm, q, spec.heads),
            ("k_norm", spec.k_norm, k, spec.kv_heads),
        ):
            if norm is not None:
                probe = Probe(self._module(prefix + norm.module), "out")
                self._op(self._norm_op(prefix + key, norm, ref, ref, index, probe, groups=heads))
        if spec.rope is not None:
            # q and k are adjacent and rotated in the same way, by one op over the heads of both.
            table = self.spec.ropes[spec.rope]
            self._op(Rope(name=f"{prefix}rope", layer=index, probe=Probe(attention, "in"),
                          x=Ref(qkv.buffer, 0, spec.q_width + spec.kv_width), rows=self.rope_rows[spec.rope],
                          heads=spec.heads + spec.kv_heads, head_dim=spec.head_dim, start=0, dims=table.dims,
                          layout=spec.rope_layout))  # fmt: skip
        self._op(Attention(name=f"{prefix}attention", layer=index, probe=Probe(self._module(prefix + names.out), "in"),
                           q=q, k=k, v=v, out=Ref(self.attended.buffer, 0, spec.q_width),
                           group=self.group_windows.index(_kept_window(self.spec, spec)),
                           planes=(2 * index, 2 * index + 1), heads=spec.heads, kv_heads=spec.kv_heads,
                           dim_k=spec.head_dim, dim_v=spec.head_dim, scale=spec.scale, window=spec.window,
                           softcap=spec.softcap))  # fmt: skip

    def _mlp(self, index: int, layer: LayerSpec, source: Ref) -> Ref:
        mlp, prefix = layer.mlp, self.spec.layer_prefix(index)
        inner = Ref(self.mlp.buffer, 0, mlp.width)
        epilogue = Epilogue(activation=mlp.activation, glu=mlp.gated)
        probe = Probe(self._module(prefix + self.spec.names.down), "in")
        self._linear(index, "mlp_in", source, inner, probe, epilogue)
        return inner

    def _linear(self, index: int, key: str, x: Ref, out: Ref, probe: Probe, more: Epilogue | None = None) -> None:
        name = self.spec.layer_prefix(index) + key
        weight, more = self._weight(name), more or Epilogue()
        epilogue = Epilogue(bias=self._bias(name), activation=more.activation, glu=more.glu, scale=more.scale,
                            residual=more.residual)  # fmt: skip
        self._op(Linear(name=name, layer=index, probe=probe, x=x, weight=weight, out=out,
                        slices=self.site_slices[name], epilogue=epilogue))  # fmt: skip

    def _output(self, index: int, layer: LayerSpec, key: str, x: Ref, part: str, after: Probe) -> None:
        """The output linear of attention or MLP, its norm if any, and the residual sum into ``hidden``."""
        norm = layer.after_attention if part == "attention" else layer.after_mlp
        if norm is None:
            self._linear(
                index, key, x, self.hidden, after, Epilogue(scale=layer.residual_multiplier, residual=self.hidden)
            )
            return
        prefix = self.spec.layer_prefix(index)
        module = self.spec.names.out if part == "attention" else self.spec.names.down
        self._linear(index, key, x, self.branch, Probe(self._module(prefix + module), "out"))
        name = f"{prefix}after_{part}"
        if layer.residual_multiplier == 1.0:
            self._op(self._norm_op(name, norm, self.branch, self.hidden, index, after, plus=self.hidden))
            return
        probe = Probe(self._module(prefix + norm.module), "out")
        self._op(self._norm_op(name, norm, self.branch, self.branch, index, probe))
        self._op(Pointwise(name=f"{name}.scale", layer=index, kind="scale", x=self.branch, out=self.branch,
                           params=(layer.residual_multiplier,)))  # fmt: skip
        self._op(Pointwise(name=f"{name}.add", layer=index, probe=after, kind="add", x=self.hidden, y=self.branch,
                           out=self.hidden))  # fmt: skip

    def _after_layer(self, index: int) -> Probe:
        """The probe of the residual stream after layer ``index``: the input of the next module."""
        if index + 1 < len(self.spec.layers):
            norm = self.spec.layers[index + 1].before_attention
            next_module = self.spec.layer_prefix(index + 1) + (norm.module if norm is not None else self.spec.names.q)
            return Probe(self._module(next_module), "in")
        final = self.spec.final_norm
        return Probe(self._module(final.module) if final is not None else self.spec.names.head, "in")

    def _logits(self, head: int) -> Ref:
        spec = self.spec
        if spec.vocab_size != self.weights[head].shape[0]:
            raise KernelError(f"The head has {self.weights[head].shape[0]} rows for {spec.vocab_size} ids.")
        last = self._buffer("last", spec.hidden, "R")
        logits = self._buffer("logits", spec.vocab_size, "R", "float32")
        self._op(TakeRows(name="take_rows", x=self.hidden, out=last, probe=self._after_layer(len(spec.layers) - 1)))
        if spec.final_norm is not None:
            normed = self._buffer("last_normed", spec.hidden, "R")
            norm_probe = Probe(self._module(spec.final_norm.module), "out")
            self._op(self._norm_op("final_norm", spec.final_norm, last, normed, None, norm_probe))
            last = normed
        bias = self._head_bias()
        # transformers applies scale and softcap after the head, so the output of its module differs then.
        plain = spec.logit_softcap is None and spec.logit_scale == 1.0
        probe = Probe(spec.names.head, "out") if plain else None
        self._op(Logits(name="logits", x=last, weight=head, out=logits, bias=bias, scale=spec.logit_scale,
                        softcap=spec.logit_softcap, site=self._table_site("head"), probe=probe))  # fmt: skip
        return logits

    def _head_bias(self) -> int | None:
        if not self.spec.head_bias:
            return None
        name = self.names.head.removesuffix(".weight") + ".bias"
        return self._declare("head.bias", (self.spec.vocab_size,), (WeightPart(name),), frozenset({"vector"}))


def _kept_window(spec: ModelSpec, attention: AttentionSpec) -> int | None:
    """The window of a layer's KV group: None when the window is not shorter than the longest sequence."""
    window = attention.window
    return None if window is None or window >= spec.max_positions else window


def _group_windows(spec: ModelSpec) -> list[int | None]:
    """The window of each KV group: one group per distinct window, full attention first."""
    return sorted({_kept_window(spec, layer.attention) for layer in spec.layers}, key=lambda w: (w is not None, w or 0))


def _kv_groups(spec: ModelSpec, windows: Sequence[int | None]) -> tuple[KvGroup, ...]:
    planes: list[list[KvPlane]] = [[] for _ in windows]
    for index, layer in enumerate(spec.layers):
        planes[windows.index(_kept_window(spec, layer.attention))] += _planes(index, layer.attention)
    return tuple(KvGroup(i, tuple(planes[i]), window) for i, window in enumerate(windows))


def _planes(index: int, attention: AttentionSpec) -> Sequence[KvPlane]:
    return tuple(KvPlane(2 * index + side, index, attention.kv_width) for side in (0, 1))
