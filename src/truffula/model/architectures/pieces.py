"""Common parts of the architectures: the sizes that all configs have, norms, and Llama's layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from truffula.kernels.program import Activation
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.rope import extended_positions, read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LLAMA_NAMES, LayerSpec, ModelSpec, ModuleNames, RopeSpec

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

MakeNorm = Callable[[ConfigView, str], NormSpec]
MOST_LAYERS = 4096
"""Far above the number of any model; bounds the lists that an invalid file can create."""


@dataclass(frozen=True)
class Sizes:
    """Counts and widths of the config. ``kv_heads`` divides ``heads``."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int


def read_sizes(view: ConfigView, mlp: str = "intermediate_size") -> Sizes:
    """Read and check the sizes. An absent or null head_dim is hidden / heads; null KV heads are as many as heads.

    ``mlp`` is the key of the MLP's width.
    """
    kv_heads = None
    if not (view.written("num_key_value_heads") and view.raw("num_key_value_heads") is None):
        kv_heads = view.optional_integer("num_key_value_heads")
    return sizes_of(view, kv_heads, view.optional_integer("head_dim"), view.integer(mlp))


def sizes_of(view: ConfigView, kv_heads: int | None, head_dim: int | None, mlp: int | None) -> Sizes:
    """The sizes, with what configs have under several keys: KV heads (None: as many as heads), the width of a head
    (None: hidden / heads) and that of the MLP (None: 4 hidden)."""
    hidden, heads = view.integer("hidden_size"), view.integer("num_attention_heads")
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise view.error("num_key_value_heads", f"it does not divide the {heads} attention heads.", kv_heads)
    if head_dim is None:
        if hidden % heads:
            raise view.error("hidden_size", f"{heads} heads do not divide it and head_dim is not given.", hidden)
        head_dim = hidden // heads
    layers = view.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise view.error("num_hidden_layers", f"at most {MOST_LAYERS} layers are served.", layers)
    return Sizes(layers, hidden, heads, kv_heads, head_dim, 4 * hidden if mlp is None else mlp)


def rms(view: ConfigView, module: str) -> NormSpec:
    """Llama's norm: the weight times the rounded normalised value."""
    return NormSpec(module, view.number("rms_norm_eps"))


def rms_last(view: ConfigView, module: str) -> NormSpec:
    """OLMo 2's norm: the weight times the normalised value, rounded once at the end."""
    return NormSpec(module, view.number("rms_norm_eps"), cast="last")


def layer_norm(view: ConfigView, module: str, eps: str, **fields: Any) -> NormSpec:
    """torch's LayerNorm with weight and bias; ``eps`` is the key of its epsilon. ``fields``: others of ``NormSpec``."""
    defaults: dict[str, Any] = {"kind": "layer", "cast": "last", "bias": True}
    return NormSpec(module, view.number(eps), **(defaults | fields))


def gemma_rms(view: ConfigView, module: str) -> NormSpec:
    """Gemma's norm: 1 + w in float32, rounded once at the end."""
    return NormSpec(module, view.number("rms_norm_eps"), cast="last", plus_one=True)


def attention(sizes: Sizes, window: int | None = None, **fields: Any) -> AttentionSpec:
    """Llama's attention; ``fields``: other fields of ``AttentionSpec``."""
    fields = {"scale": sizes.head_dim**-0.5, "rope": 0} | fields
    return AttentionSpec(heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, window=window, **fields)


def mlp(view: ConfigView, sizes: Sizes, *, bias: bool = False, key: str = "hidden_act", **fields: Any) -> MlpSpec:
    """Llama's gated MLP, its activation under ``key``, with ``bias`` on all its linears; ``fields`` of ``MlpSpec``."""
    return MlpSpec(sizes.mlp, view.choice(key, ACTIVATIONS), in_bias=bias, out_bias=bias, **fields)


def pre_norm(
    view: ConfigView, mixer: AttentionSpec, feed_forward: MlpSpec, norm: MakeNorm = rms, **fields: Any
) -> LayerSpec:
    """Llama's layer of these parts, with ``norm`` before each; ``fields``: other fields of ``LayerSpec``."""
    before = {"before_mixer": norm(view, "input_layernorm"), "before_mlp": norm(view, "post_attention_layernorm")}
    return LayerSpec(mixer, feed_forward, **(before | fields))


def post_norm(view: ConfigView, mixer: AttentionSpec, feed_forward: MlpSpec, norm: MakeNorm = rms) -> LayerSpec:
    """A layer with ``norm`` after each part and none before."""
    after, after_mlp = norm(view, "post_attention_layernorm"), norm(view, "post_feedforward_layernorm")
    return LayerSpec(mixer, feed_forward, None, None, after_mixer=after, after_mlp=after_mlp)


def llama_layer(
    view: ConfigView, sizes: Sizes, window: int | None = None, *, mlp_bias: bool = False, qk_norm: bool = False,
    **fields: Any,
) -> LayerSpec:  # fmt: skip
    """Llama's layer; with ``qk_norm``, norms of q and k per head. ``fields``: other fields of ``AttentionSpec``."""
    if qk_norm:
        fields |= {"q_norm": rms(view, "self_attn.q_norm"), "k_norm": rms(view, "self_attn.k_norm")}
    return pre_norm(view, attention(sizes, window, **fields), mlp(view, sizes, bias=mlp_bias))


def llama_model(
    view: ConfigView, sizes: Sizes, windows: Sequence[int | None], names: ModuleNames = LLAMA_NAMES, **options: Any
) -> ModelSpec:
    """A model of Llama's layers, one for each window, with one rope. ``options`` as of ``llama_layer``."""
    layers = [llama_layer(view, sizes, window, **options) for window in windows]
    return finish_spec(view, layers, (read_rope(view, sizes.head_dim),), rms(view, "norm"), names=names)


def layer_types(view: ConfigView, layers: int, full: Callable[[int], bool]) -> tuple[str, ...]:
    """``layer_types``; where it is missing, the layers for which ``full`` holds are full and the others windowed."""
    kinds = view.strings("layer_types", layers)
    return kinds or tuple("full_attention" if full(index) else "sliding_attention" for index in range(layers))


def windows(view: ConfigView, layers: int, window: int | None, kinds: Sequence[str] | None) -> tuple[int | None, ...]:
    """Each layer's window from ``kinds`` (``layer_types``); without kinds every layer has ``window``."""
    if kinds is None:
        return (window,) * layers
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise view.error("layer_types", f"{kind} is not supported; full_attention and sliding_attention are.", kind)
    if window is None and "sliding_attention" in kinds:
        raise view.error("layer_types", "it asks for sliding_attention, but no sliding window is in force.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def finish_spec(
    view: ConfigView, layers: Sequence[LayerSpec], ropes: Sequence[RopeSpec], final_norm: NormSpec | None, *,
    positions: str | int = "max_position_embeddings", **more: Any,
) -> ModelSpec:  # fmt: skip
    """The spec of these layers. ``positions`` is the longest length, or its key, which scaled ropes extend; ``more``:
    other fields of ``ModelSpec``."""
    view.must_be("is_encoder_decoder", (False,), "only decoder-only models are supported.")
    limit = view.integer(positions) if isinstance(positions, str) else positions
    if isinstance(positions, str) and ropes:
        limit = extended_positions(view, limit)
    return ModelSpec(
        model_type=view.model_type,
        vocab_size=view.integer("vocab_size"),
        hidden=view.integer("hidden_size"),
        layers=tuple(layers),
        ropes=tuple(ropes),
        final_norm=final_norm,
        max_positions=limit,
        **more,
    )
