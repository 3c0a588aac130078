"""``ModelSpec``: the structure of a model, independent of its architecture's name, its tensors and the backend.

An architecture (``model/architectures/``) reads a config into a ``ModelSpec``; ``model/decoder.py`` builds a
``Program`` from it. Later stages do not depend on the architecture.

Shape letters: ``D`` hidden, ``F`` feed-forward, ``V`` vocabulary, ``H`` query heads, ``K`` KV heads, ``E`` head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from truffula.kernels.program import Activation, BufferDtype

RowKind = Literal["embed", "linear", "vector", "head"]
Transform = Literal["none", "plus_one"]


@dataclass(frozen=True)
class NormSpec:
    """A norm and the module that holds its weight, named relative to its layer (the final norm: to the body).

    ``plus_one``: the file stores w, and 1 + w is applied, in float32 (Gemma). ``cast`` as in ``program.Norm``.
    """

    module: str
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    cast: Literal["first", "last"] = "first"
    plus_one: bool = False
    bias: bool = False


@dataclass(frozen=True)
class RopeSpec:
    """A rotary table: ``inv_freq`` one float32 value per rotated pair; cos and sin are multiplied by ``factor``."""

    inv_freq: tuple[float, ...]
    factor: float = 1.0

    @property
    def dims(self) -> int:
        """The number of columns of a head that are rotated."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention. ``window`` None is full attention, w lets query i see keys i - w < j <= i.

    ``rope`` is an index into ``ModelSpec.ropes``, or None for a layer without rotary embedding. ``q_norm`` and
    ``k_norm`` act per head, before the rotation. ``scale`` multiplies q·k, ``softcap`` c makes scores c * tanh(s / c).
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
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.q_width + 2 * self.kv_width


@dataclass(frozen=True)
class MlpSpec:
    """``gated``: down(activation(gate x) * up x); else down(activation(up x)). ``width`` is F."""

    width: int
    activation: Activation
    gated: bool = True
    in_bias: bool = False
    out_bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One block: h += m * after(attention(before(h))), then the same with the MLP. Any norm may be absent."""

    attention: AttentionSpec
    mlp: MlpSpec
    before_attention: NormSpec | None
    before_mlp: NormSpec | None
    after_attention: NormSpec | None = None
    after_mlp: NormSpec | None = None
    residual_multiplier: float = 1.0


@dataclass(frozen=True)
class RowSlice:
    """``rows`` output rows of a logical weight that are one module in checkpoints and one site for adapters.

    ``module`` is relative to the body: ``layers.3.self_attn.q_proj``.
    """

    module: str
    rows: int


@dataclass(frozen=True)
class WeightRow:
    """One logical weight of the model. Loading, adapter matching and slicing all use this row.

    ``slices`` stacked along axis 0 make the weight; the checkpoint holds either ``<slice module>.<param>`` for each or,
    when ``fused`` is given, one ``<fused>.<param>`` with all their rows in this order; LoRA addresses each slice by its
    module and all of them together by ``fused``. ``width`` is the input width I (0 for a vector). ``key`` is its
    name in the decoder. The tying decision assigns the tensors of embedding and head.
    """

    key: str
    kind: RowKind
    slices: tuple[RowSlice, ...]
    width: int
    layer: int | None = None
    param: Literal["weight", "bias"] = "weight"
    fused: str | None = None
    transform: Transform = "none"
    dtype: BufferDtype = "model"

    @property
    def rows(self) -> int:
        return sum(item.rows for item in self.slices)

    @property
    def shape(self) -> tuple[int, ...]:
        """``[O, I]`` or ``[O]``."""
        return (self.rows, self.width) if self.width else (self.rows,)


@dataclass(frozen=True)
class ModuleNames:
    """The paths of a model's modules. ``layer`` contains ``{i}``; names inside a layer are relative to it.

    ``body`` is the body's path in transformers, with the dot, as probes and PEFT use it (``lora/roots.py`` has those
    of other classes that adapters are trained on). ``prefixes`` are the prefixes of the body's names in checkpoints,
    most common first, each with the module of the head. ``skip`` are prefixes of parts that are not served, such as an
    image encoder.
    """

    embed: str = "embed_tokens"
    layer: str = "layers.{i}."
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str | None = "self_attn.qkv_proj"
    out: str = "self_attn.o_proj"
    attention: str = "self_attn"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str | None = "mlp.gate_up_proj"
    down: str = "mlp.down_proj"
    head: str = "lm_head"
    body: str = "model."
    prefixes: tuple[tuple[str, str], ...] = (
        ("model.", "lm_head"),
        ("", "lm_head"),
        ("language_model.model.", "language_model.lm_head"),
        ("model.language_model.", "lm_head"),
    )
    skip: tuple[str, ...] = ()


LLAMA_NAMES = ModuleNames()


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only language model. ``max_positions`` is the maximum length of a sequence.

    ``embed_scale`` multiplies the input rows (rounded to the table's dtype first), never the head; ``logit_scale``
    multiplies logits, then ``logit_softcap``. ``notes`` are for the operator.
    """

    model_type: str
    vocab_size: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    final_norm: NormSpec | None
    max_positions: int
    embed_scale: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    head_bias: bool = False
    names: ModuleNames = LLAMA_NAMES
    notes: tuple[str, ...] = ()

    def layer_prefix(self, index: int) -> str:
        """Path of layer ``index`` relative to the body, with its dot."""
        return self.names.layer.format(i=index)

    @cached_property
    def rows(self) -> tuple[WeightRow, ...]:
        """The table of weights, in the order the program uses them."""
        rows = [WeightRow("embed", "embed", (RowSlice(self.names.embed, self.vocab_size),), self.hidden)]
        for index, layer in enumerate(self.layers):
            rows += _layer_rows(self, index, layer)
        if self.final_norm is not None:
            rows += _norm_rows("final_norm", self.final_norm, "", self.hidden, None)
        rows.append(WeightRow("head", "head", (RowSlice(self.names.head, self.vocab_size),), self.hidden))
        if self.head_bias:
            rows.append(WeightRow("head.bias", "head", (RowSlice(self.names.head, self.vocab_size),), 0, param="bias"))
        return tuple(rows)


def _layer_rows(spec: ModelSpec, index: int, layer: LayerSpec) -> list[WeightRow]:
    names, prefix, attention, mlp = spec.names, spec.layer_prefix(index), layer.attention, layer.mlp
    rows: list[WeightRow] = []

    def norm(key: str, item: NormSpec | None, width: int) -> None:
        if item is not None:
            rows.extend(_norm_rows(f"{prefix}{key}", item, prefix, width, index))

    def linear(key: str, parts: list[tuple[str, int]], width: int, bias: bool, fused: str | None = None) -> None:
        slices = tuple(RowSlice(prefix + module, count) for module, count in parts)
        whole = None if fused is None else prefix + fused
        rows.append(WeightRow(f"{prefix}{key}", "linear", slices, width, index, fused=whole))
        if bias:
            rows.append(WeightRow(f"{prefix}{key}.bias", "linear", slices, 0, index, param="bias", fused=whole))

    norm("before_attention", layer.before_attention, spec.hidden)
    q_k_v = [(names.q, attention.q_width), (names.k, attention.kv_width), (names.v, attention.kv_width)]
    linear("qkv", q_k_v, spec.hidden, attention.qkv_bias, names.qkv)
    norm("q_norm", attention.q_norm, attention.head_dim)
    norm("k_norm", attention.k_norm, attention.head_dim)
    linear("out", [(names.out, spec.hidden)], attention.q_width, attention.out_bias)
    norm("after_attention", layer.after_attention, spec.hidden)
    norm("before_mlp", layer.before_mlp, spec.hidden)
    if mlp.gated:
        linear("mlp_in", [(names.gate, mlp.width), (names.up, mlp.width)], spec.hidden, mlp.in_bias, names.gate_up)
    else:
        linear("mlp_in", [(names.up, mlp.width)], spec.hidden, mlp.in_bias)
    linear("mlp_out", [(names.down, spec.hidden)], mlp.width, mlp.out_bias)
    norm("after_mlp", layer.after_mlp, spec.hidden)
    return rows


def _norm_rows(key: str, norm: NormSpec, prefix: str, width: int, layer: int | None) -> list[WeightRow]:
    slices = (RowSlice(prefix + norm.module, width),)
    # 1 + w is kept in float32: rounding it to bfloat16 would lose the low bits of a small w.
    transform: Transform = "plus_one" if norm.plus_one else "none"
    dtype: BufferDtype = "float32" if norm.plus_one else "model"
    rows = [WeightRow(key, "vector", slices, 0, layer, transform=transform, dtype=dtype)]
    if norm.bias:
        rows.append(WeightRow(f"{key}.bias", "vector", slices, 0, layer, param="bias"))
    return rows
