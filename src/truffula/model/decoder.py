"""Builds the ``Program`` of a ``ModelSpec``: the only implementation of the forward pass.

A pre-norm layer of six linears becomes seven ops: norm, qkv, rope, attention, output + residual, norm, gate-up with its
gated product, down + residual (the two residual sums ride in the linears' epilogues). A layer with norms after its
parts adds the residual in that norm instead. The rows whose logits are needed are selected before the last norm.

Each op has a probe, the place of the same value in transformers. The output of a fused linear is at the modules of its
slices; a gated product or a residual sum is the input of the next module; q and k after rope are the inputs of the
attention module.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

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
from truffula.model.spec import AttentionSpec, LayerSpec, ModelSpec, NormSpec
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


_PLAIN = Epilogue()


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
        # One KV group per distinct window, full attention first. A window that no sequence exceeds is full attention.
        windows = [layer.attention.window for layer in spec.layers]
        self.windows = [None if window is None or window >= spec.max_positions else window for window in windows]
        self.groups = sorted(set(self.windows), key=lambda window: (window is not None, window or 0))

    def build(self) -> Program:
        spec, names, layers = self.spec, self.spec.names, self.spec.layers
        embed, head = self._declare_tables()
        module = self._module(names.embed)
        embed_site = self._site("embed", None, spec.vocab_size, spec.hidden, [(module, 0, spec.hidden, spec.hidden)])
        self.hidden = self._buffer("hidden", spec.hidden)
        self.normed = self._buffer("normed", spec.hidden)
        if any(layer.after_attention or layer.after_mlp for layer in layers):
            self.branch = self._buffer("branch", spec.hidden)
        self.qkv = self._buffer("qkv", max(layer.attention.qkv_width for layer in layers))
        self.attended = self._buffer("attended", max(layer.attention.q_width for layer in layers))
        self.mlp = self._buffer("mlp", max(layer.mlp.width for layer in layers))
        self.rope_rows = [self._buffer(f"rope{i}", table.dims) for i, table in enumerate(spec.ropes)]
        self.ops.append(Embed(name="embed", table=embed, out=self.hidden, scale=spec.embed_scale, site=embed_site,
                              probe=Probe(module, "out")))  # fmt: skip
        self.ops += [RopeRows(name=f"rope{i}", table=i, out=rows) for i, rows in enumerate(self.rope_rows)]
        for index, layer in enumerate(layers):
            self._layer(index, layer)
        logits = self._logits(head)
        return Program(
            name=spec.model_type,
            vocab_size=spec.vocab_size,
            buffers=tuple(self.buffers),
            weights=tuple(self.weights),
            sites=tuple(self.sites),
            rope_tables=tuple(RopeTable(i, table.inv_freq, table.factor) for i, table in enumerate(spec.ropes)),
            kv_groups=self._kv_groups(),
            ops=tuple(self.ops),
            result=logits,
            output=Output("logits", spec.vocab_size),
            max_positions=spec.max_positions,
            notes=(self.tie.reason,),
        )

    # Declarations

    def _buffer(self, name: str, width: int, rows: Rows = "T", dtype: BufferDtype = "model") -> Ref:
        self.buffers.append(Buffer(len(self.buffers), name, rows, width, dtype))
        return Ref(len(self.buffers) - 1, 0, width)

    def _kv_groups(self) -> tuple[KvGroup, ...]:
        planes: dict[int | None, list[KvPlane]] = {window: [] for window in self.groups}
        for index, layer in enumerate(self.spec.layers):
            width = layer.attention.kv_width
            planes[self.windows[index]] += [KvPlane(2 * index, index, width), KvPlane(2 * index + 1, index, width)]
        return tuple(KvGroup(i, tuple(planes[window]), window) for i, window in enumerate(self.groups))

    def _declare_tables(self) -> tuple[int, int]:
        """The weight ids of embedding and head, which are equal when tied."""
        tied, shape = self.tie.tie is not Tie.SEPARATE, self.rows["embed"].shape
        if tied:
            source = self.names.head if self.tie.tie is Tie.REVERSED else self.names.embed
            both = self._declare("embed", shape, (WeightPart(source),), "rows", "matmul")
            return both, both
        embed = self._declare("embed", shape, (WeightPart(self.names.embed),), "rows")
        return embed, self._declare("head", shape, (WeightPart(self.names.head),), "matmul")

    def _declare(self, key: str, shape: tuple[int, ...], parts: tuple[WeightPart, ...], *uses: str) -> int:
        row = self.rows[key]
        name = row.slices[0].module if len(row.slices) == 1 else (row.fused or row.key)
        decl = WeightDecl(len(self.weights), f"{name}.{row.param}", shape, parts, frozenset(uses), row.dtype)
        self.weights.append(decl)
        self.weight_ids[key] = decl.id
        return decl.id

    def _weight(self, key: str) -> int:
        """The id of a row's weight, which is declared with its sites at the first use."""
        if key in self.weight_ids:
            return self.weight_ids[key]
        row, body = self.rows[key], self.spec.names.body
        matrix = row.kind == "linear" and row.param == "weight"
        weight = self._declare(key, row.shape, self.names.parts[key], "matmul" if matrix else "vector")
        if matrix:
            slices, lo = [], 0
            for item in row.slices:
                hi = lo + item.rows
                modules = [(body + item.module, 0, item.rows, item.rows)]
                if row.fused is not None:
                    modules.append((body + row.fused, lo, hi, row.rows))
                slices.append(SiteSlice(self._site("linear", row.layer, row.width, item.rows, modules), lo, hi))
                lo = hi
            self.site_slices[key] = tuple(slices)
        return weight

    def _bias(self, key: str) -> int | None:
        return self._weight(f"{key}.bias") if f"{key}.bias" in self.rows else None

    def _site(
        self, kind: Literal["linear", "embed", "head"], layer: int | None, width_in: int, width_out: int,
        modules: list[tuple[str, int, int, int]],
    ) -> int:  # fmt: skip
        """The id of a new site. Tables are sites on each side even when they are one tensor: tying is of the base."""
        slices = tuple(ModuleSlice(*module) for module in modules)
        self.sites.append(Site(len(self.sites), kind, layer, width_in, width_out, slices))
        return len(self.sites) - 1

    def _module(self, path: str) -> str:
        return self.spec.names.body + path

    # Operations

    def _layer(self, index: int, layer: LayerSpec) -> None:
        names, prefix, mlp = self.spec.names, self.spec.layer_prefix(index), layer.mlp
        x = self._input_norm(index, "before_attention", layer.before_attention)
        self._attention(index, layer.attention, x)
        next_module = layer.before_mlp.module if layer.before_mlp is not None else names.gate
        self._output(index, layer, "out", Ref(self.attended.buffer, 0, layer.attention.q_width), "attention",
                     Probe(self._module(prefix + next_module), "in"))  # fmt: skip
        x = self._input_norm(index, "before_mlp", layer.before_mlp)
        inner = Ref(self.mlp.buffer, 0, mlp.width)
        probe = Probe(self._module(prefix + names.down), "in")
        self._linear(index, "mlp_in", x, inner, probe, Epilogue(activation=mlp.activation, glu=mlp.gated))
        self._output(index, layer, "mlp_out", inner, "mlp", self._after_layer(index))

    def _input_norm(self, index: int, key: str, norm: NormSpec | None) -> Ref:
        """The input of attention or MLP: the normed ``hidden``, or ``hidden`` itself when there is no norm."""
        if norm is None:
            return self.hidden
        self._norm(index, key, norm, self.hidden, self.normed)
        return self.normed

    def _norm(
        self, layer: int | None, key: str, norm: NormSpec, x: Ref, out: Ref, *,
        probe: Probe | None = None, groups: int = 1, plus: Ref | None = None,
    ) -> None:  # fmt: skip
        prefix = "" if layer is None else self.spec.layer_prefix(layer)
        name, probe = prefix + key, probe or Probe(self._module(prefix + norm.module), "out")
        self.ops.append(Norm(name=name, layer=layer, probe=probe, x=x, out=out, kind=norm.kind, eps=norm.eps,
                             weight=self._weight(name), bias=self._bias(name), cast=norm.cast, groups=groups,
                             plus=plus))  # fmt: skip

    def _attention(self, index: int, spec: AttentionSpec, x: Ref) -> None:
        names, prefix = self.spec.names, self.spec.layer_prefix(index)
        qkv = Ref(self.qkv.buffer, 0, spec.qkv_width)
        q = Ref(qkv.buffer, 0, spec.q_width)
        k = Ref(qkv.buffer, spec.q_width, spec.kv_width)
        v = Ref(qkv.buffer, spec.q_width + spec.kv_width, spec.kv_width)
        self._linear(index, "qkv", x, qkv, Probe(self._module(prefix + names.q), "out"))
        if spec.q_norm is not None:
            self._norm(index, "q_norm", spec.q_norm, q, q, groups=spec.heads)
        if spec.k_norm is not None:
            self._norm(index, "k_norm", spec.k_norm, k, k, groups=spec.kv_heads)
        if spec.rope is not None:
            # q and k are adjacent and rotated in the same way, by one op over the heads of both.
            self.ops.append(Rope(name=f"{prefix}rope", layer=index,
                                 probe=Probe(self._module(prefix + names.attention), "in"),
                                 x=Ref(qkv.buffer, 0, spec.q_width + spec.kv_width), rows=self.rope_rows[spec.rope],
                                 heads=spec.heads + spec.kv_heads, head_dim=spec.head_dim, start=0,
                                 dims=self.spec.ropes[spec.rope].dims, layout=spec.rope_layout))  # fmt: skip
        self.ops.append(Attention(name=f"{prefix}attention", layer=index,
                                  probe=Probe(self._module(prefix + names.out), "in"),
                                  q=q, k=k, v=v, out=Ref(self.attended.buffer, 0, spec.q_width),
                                  group=self.groups.index(self.windows[index]), planes=(2 * index, 2 * index + 1),
                                  heads=spec.heads, kv_heads=spec.kv_heads, dim_k=spec.head_dim, dim_v=spec.head_dim,
                                  scale=spec.scale, window=spec.window, softcap=spec.softcap))  # fmt: skip

    def _linear(self, index: int, key: str, x: Ref, out: Ref, probe: Probe, epilogue: Epilogue = _PLAIN) -> None:
        name = self.spec.layer_prefix(index) + key
        weight = self._weight(name)
        epilogue = replace(epilogue, bias=self._bias(name))
        self.ops.append(Linear(name=name, layer=index, probe=probe, x=x, weight=weight, out=out,
                               slices=self.site_slices[name], epilogue=epilogue))  # fmt: skip

    def _output(self, index: int, layer: LayerSpec, key: str, x: Ref, part: str, after: Probe) -> None:
        """The output linear of attention or MLP, its norm if any, and the residual sum into ``hidden``."""
        norm, scale = layer.after_attention if part == "attention" else layer.after_mlp, layer.residual_multiplier
        if norm is None:
            self._linear(index, key, x, self.hidden, after, Epilogue(scale=scale, residual=self.hidden))
            return
        prefix = self.spec.layer_prefix(index)
        module = self.spec.names.out if part == "attention" else self.spec.names.down
        self._linear(index, key, x, self.branch, Probe(self._module(prefix + module), "out"))
        if scale == 1.0:
            self._norm(index, f"after_{part}", norm, self.branch, self.hidden, probe=after, plus=self.hidden)
            return
        self._norm(index, f"after_{part}", norm, self.branch, self.branch)
        self.ops.append(Pointwise(name=f"{prefix}after_{part}.scale", layer=index, kind="scale", x=self.branch,
                                  out=self.branch, params=(scale,)))  # fmt: skip
        self.ops.append(Pointwise(name=f"{prefix}after_{part}.add", layer=index, probe=after, kind="add",
                                  x=self.hidden, y=self.branch, out=self.hidden))  # fmt: skip

    def _after_layer(self, index: int) -> Probe:
        """The probe of the residual stream after layer ``index``: the input of the next module."""
        if index + 1 < len(self.spec.layers):
            norm = self.spec.layers[index + 1].before_attention
            next_module = self.spec.layer_prefix(index + 1) + (norm.module if norm is not None else self.spec.names.q)
            return Probe(self._module(next_module), "in")
        final = self.spec.final_norm
        return Probe(self._module(final.module) if final is not None else self.spec.names.head, "in")

    def _logits(self, head: int) -> Ref:
        spec, vocab, module = self.spec, self.spec.vocab_size, self.spec.names.head
        if vocab != self.weights[head].shape[0]:
            raise KernelError(f"The head has {self.weights[head].shape[0]} rows for {vocab} ids.")
        last = self._buffer("last", spec.hidden, "R")
        logits = self._buffer("logits", vocab, "R", "float32")
        after = self._after_layer(len(spec.layers) - 1)
        self.ops.append(TakeRows(name="take_rows", x=self.hidden, out=last, probe=after))
        if spec.final_norm is not None:
            normed = self._buffer("last_normed", spec.hidden, "R")
            self._norm(None, "final_norm", spec.final_norm, last, normed)
            last = normed
        bias = None
        if spec.head_bias:
            name = self.names.head.removesuffix(".weight") + ".bias"
            bias = self._declare("head.bias", (vocab,), (WeightPart(name),), "vector")
        # transformers applies scale and softcap after the head, so the output of its module differs then.
        plain = spec.logit_softcap is None and spec.logit_scale == 1.0
        site = self._site("head", None, spec.hidden, vocab, [(module, 0, vocab, vocab)])
        self.ops.append(Logits(name="logits", x=last, weight=head, out=logits, bias=bias, scale=spec.logit_scale,
                               softcap=spec.logit_softcap, site=site,
                               probe=Probe(module, "out") if plain else None))  # fmt: skip
        return logits
