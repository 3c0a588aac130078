"""GPT-2, GPT-BigCode (StarCoder 1), GPT-Neo, GPT-J and GPT-NeoX (Pythia): layer norms, plain MLPs, fused modules."""

from __future__ import annotations

from typing import Any

from truffula.model.architectures.pieces import ACTIVATIONS, MOST_LAYERS, Sizes, finish_spec, layer_norm, sizes_of
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.rope import MOST_WIDTH, RopeKeys, default_rope, read_rope
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames, body_prefixes

_EPS = "layer_norm_epsilon"
_TRANSFORMER: dict[str, Any] = {
    "embed": "wte",
    "positions": "wpe",
    "layer": "h.{i}.",
    "attention": "attn",
    "body": "transformer.",
    "prefixes": body_prefixes("transformer.", ""),
}
_FUSED: dict[str, Any] = {
    **_TRANSFORMER,
    "qkv": "attn.c_attn",
    "qkv_order": "flat",
    "out": "attn.c_proj",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
    "buffers": ("attn.bias", "attn.masked_bias"),
}
GPT2_NAMES = ModuleNames(**_FUSED, transposed=True)
BIGCODE_NAMES = ModuleNames(**_FUSED)
BIGCODE_HEADS_NAMES = ModuleNames(**{**_FUSED, "qkv_order": "grouped"})
_NEO = "attn.attention."
NEO_NAMES = ModuleNames(
    **{**_TRANSFORMER, "attention": None},
    q=f"{_NEO}q_proj",
    k=f"{_NEO}k_proj",
    v=f"{_NEO}v_proj",
    qkv=None,
    out=f"{_NEO}out_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    buffers=(f"{_NEO}bias", f"{_NEO}masked_bias"),
)
GPTJ_NAMES = ModuleNames(
    **_TRANSFORMER,
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    qkv=None,
    out="attn.out_proj",
    up="mlp.fc_in",
    down="mlp.fc_out",
    buffers=("attn.bias", "attn.masked_bias"),
)
NEOX_NAMES = ModuleNames(
    embed="embed_in",
    qkv="attention.query_key_value",
    qkv_order="grouped",
    out="attention.dense",
    attention="attention",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    body="gpt_neox.",
    prefixes=body_prefixes("gpt_neox.", "", old_head=True),
    buffers=("attention.bias", "attention.masked_bias"),
)


def gpt2(view: ConfigView) -> ModelSpec:
    """Learned positions; linears stored as [in, out]; scores optionally divided by the number of the layer."""
    # How attention is computed in 16 bits, and a head that is not a language model's.
    view.skip("reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation")
    view.skip("summary_proj_to_labels", "summary_first_dropout")
    return _learned(view, GPT2_NAMES, _sizes(view), by_layer=view.flag("scale_attn_by_inverse_layer_idx"))


def gpt_bigcode(view: ConfigView) -> ModelSpec:
    """GPT-2 with ordinary linears, and with one KV head unless ``multi_query`` is false."""
    view.skip("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")  # it always is in float32
    view.skip("num_key_value_heads")  # written, but made from multi_query
    shared = view.flag("multi_query")
    return _learned(view, BIGCODE_NAMES if shared else BIGCODE_HEADS_NAMES, _sizes(view, 1 if shared else None))


def gpt_neo(view: ConfigView) -> ModelSpec:
    """GPT-2 with split linears, unscaled scores, and a window on the layers of type ``local``."""
    sizes, window = sizes_of(view, None, None, view.optional_integer("intermediate_size")), view.integer("window_size")
    mixers = [
        _attention(sizes, scale=1.0, window=window if kind == "local" else None, out_bias=True)
        for kind in _attention_types(view, sizes.layers)
    ]
    layers = [_sequential(view, mixer, _mlp(view, sizes, "activation_function")) for mixer in mixers]
    return finish_spec(view, layers, (), layer_norm(view, "ln_f", _EPS), names=NEO_NAMES, position_offset=0)


def gptj(view: ConfigView) -> ModelSpec:
    """Attention and MLP read one norm; the first ``rotary_dim`` columns of a head are rotated; the head has a bias."""
    sizes, dims = _sizes(view), view.integer("rotary_dim")
    if dims % 2 or dims > min(sizes.head_dim, MOST_WIDTH):
        raise view.error("rotary_dim", f"it must be even and at most the {sizes.head_dim} columns of a head.", dims)
    layer = LayerSpec(
        mixer=_attention(sizes, rope=0, rope_layout="interleaved"),
        mlp=_mlp(view, sizes, "activation_function"),
        before_mixer=layer_norm(view, "ln_1", _EPS),
        before_mlp=None,
        parallel=True,
    )
    ropes, final = (default_rope(1e4, dims),), layer_norm(view, "ln_f", _EPS)
    longest = view.integer("max_position_embeddings")
    layers = [layer] * sizes.layers
    return finish_spec(view, layers, ropes, final, positions=longest, head_bias=True, names=GPTJ_NAMES)


def gpt_neox(view: ConfigView) -> ModelSpec:
    """A part of each head is rotated; attention and MLP are parallel, each with a norm, or follow each other."""
    view.skip("is_decoder")
    sizes, eps = sizes_of(view, None, None, view.integer("intermediate_size")), "layer_norm_eps"
    bias = view.flag("attention_bias")
    layer = LayerSpec(
        mixer=_attention(sizes, rope=0, qkv_bias=bias, out_bias=bias),
        mlp=_mlp(view, sizes, "hidden_act"),
        before_mixer=layer_norm(view, "input_layernorm", eps),
        before_mlp=layer_norm(view, "post_attention_layernorm", eps),
        parallel=view.flag("use_parallel_residual"),
    )
    rope = read_rope(view, sizes.head_dim, partial=True, keys=RopeKeys("rotary_emb_base", "rotary_pct"))
    final = layer_norm(view, "final_layer_norm", eps)
    return finish_spec(view, [layer] * sizes.layers, [rope], final, names=NEOX_NAMES)


def _sizes(view: ConfigView, kv_heads: int | None = None) -> Sizes:
    return sizes_of(view, kv_heads, None, view.optional_integer("n_inner"))


def _learned(view: ConfigView, names: ModuleNames, sizes: Sizes, *, by_layer: bool = False) -> ModelSpec:
    """A model of GPT-2's layers, with learned positions. ``by_layer``: scores of layer i are divided by i + 1."""
    view.must_be("add_cross_attention", (False,), "only decoder-only models are supported.")
    scale = sizes.head_dim**-0.5 if view.flag("scale_attn_weights") else 1.0
    feed_forward = _mlp(view, sizes, "activation_function")
    scales = [scale / (index + 1) if by_layer else scale for index in range(sizes.layers)]
    mixers = [_attention(sizes, scale=scale, qkv_bias=True, out_bias=True) for scale in scales]
    layers = [_sequential(view, mixer, feed_forward) for mixer in mixers]
    return finish_spec(view, layers, (), layer_norm(view, "ln_f", _EPS), names=names, position_offset=0)


def _sequential(view: ConfigView, mixer: AttentionSpec, mlp: MlpSpec) -> LayerSpec:
    return LayerSpec(mixer, mlp, layer_norm(view, "ln_1", _EPS), layer_norm(view, "ln_2", _EPS))


def _attention(sizes: Sizes, **fields: Any) -> AttentionSpec:
    fields = {"scale": sizes.head_dim**-0.5, "rope": None} | fields
    return AttentionSpec(heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, **fields)


def _mlp(view: ConfigView, sizes: Sizes, key: str) -> MlpSpec:
    """A plain MLP with biases, its activation under ``key``."""
    return MlpSpec(sizes.mlp, view.choice(key, ACTIVATIONS), gated=False, in_bias=True, out_bias=True)


def _attention_types(view: ConfigView, layers: int) -> list[str]:
    """The type of each layer: ``attention_types`` is a list of [types, repeats]."""
    key = "attention_types"
    view.skip("attention_layers")  # the same, expanded, as older versions wrote it
    given, found = view.raw(key), list[str]()
    for item in [[["global", "local"], 12]] if given is None else given if isinstance(given, list) else [given]:
        kinds, count = item if isinstance(item, list) and len(item) == 2 else (None, None)
        if not isinstance(kinds, list) or not all(kind in ("global", "local") for kind in kinds):
            raise view.error(key, "expected a list of [types, repeats], with the types global and local.", given)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= MOST_LAYERS:
            raise view.error(key, f"the repeats must be 1 to {MOST_LAYERS}.", given)
        found += [*kinds] * count
    if len(found) != layers:
        raise view.error(key, f"it describes {len(found)} layers; num_layers is {layers}.", given)
    return found
