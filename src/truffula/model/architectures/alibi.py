"""BLOOM, Falcon and MPT: attention with linear biases (ALiBi), which Falcon has as an option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from truffula.model.architectures.pieces import ACTIVATIONS, finish_spec, layer_norm, sizes_of
from truffula.model.config_view import INERT, ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.rope import read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames, body_prefixes

_EPS = "layer_norm_epsilon"
_PREFIXES = body_prefixes("transformer.", "")
FUSED_NAMES = ModuleNames(
    embed="word_embeddings",
    layer="h.{i}.",
    qkv="self_attention.query_key_value",
    qkv_order="grouped",
    out="self_attention.dense",
    attention=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    body="transformer.",
    prefixes=_PREFIXES,
)
MPT_NAMES = ModuleNames(
    embed="wte",
    layer="blocks.{i}.",
    qkv="attn.Wqkv",
    qkv_order="flat",
    out="attn.out_proj",
    attention=None,
    up="ffn.up_proj",
    down="ffn.down_proj",
    body="transformer.",
    prefixes=_PREFIXES,
)
BLOOM_LENGTH = 2048
"""The length BLOOM was trained with; its class has no key for it, but the files do."""
# Keys of attn_config: those that are read, those without effect, and those that transformers has but does not read.
_MPT_READ = ("clip_qkv", "softmax_scale")
_MPT_INERT = ("attn_impl", "attn_pdrop", "attn_uses_sequence_id", "is_encoder_decoder")
_MPT_FIXED = MappingProxyType(
    {"alibi": True, "alibi_bias_max": 8, "attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False}
)


def bloom(view: ConfigView) -> ModelSpec:
    """The input rows are normed. The norms may replace the residual stream."""
    view.skip("slow_but_exact")  # the order of sums
    sizes = sizes_of(view, None, None, None)
    layer = LayerSpec(
        mixer=AttentionSpec(
            heads=sizes.heads,
            kv_heads=sizes.heads,
            head_dim=sizes.head_dim,
            scale=sizes.head_dim**-0.5,
            rope=None,
            qkv_bias=True,
            out_bias=True,
            alibi=slopes(sizes.heads),
        ),
        mlp=MlpSpec(sizes.mlp, "gelu_tanh", gated=False, in_bias=True, out_bias=True),
        before_mixer=layer_norm(view, "input_layernorm", _EPS),
        before_mlp=layer_norm(view, "post_attention_layernorm", _EPS),
        norm_stream=view.flag("apply_residual_connection_post_layernorm"),
    )
    return finish_spec(
        view,
        [layer] * sizes.layers,
        (),
        layer_norm(view, "ln_f", _EPS),
        positions=view.optional_integer("seq_length") or BLOOM_LENGTH,
        embed_norm=layer_norm(view, "word_embeddings_layernorm", _EPS),
        names=FUSED_NAMES,
    )


def falcon(view: ConfigView) -> ModelSpec:
    """Three forms of q, k and v; one norm or two in a parallel layer; rotary embedding or ALiBi."""
    view.must_be("apply_residual_connection_post_layernorm", (None, False), "transformers does not do that.")
    grouped, shared, parallel = (view.flag(key) for key in ("new_decoder_architecture", "multi_query", "parallel_attn"))
    written, heads = view.optional_integer("num_kv_heads"), view.integer("num_attention_heads")
    if not grouped and not shared and written not in (None, heads):
        raise view.error("num_kv_heads", "it has an effect only with new_decoder_architecture.", written)
    kv_heads = (written or heads) if grouped or not shared else 1
    if heads % kv_heads:
        raise view.error("num_kv_heads", f"it does not divide the {heads} attention heads.", kv_heads)
    sizes = sizes_of(view, kv_heads, None, view.optional_integer("ffn_hidden_size"))
    before_mixer, before_mlp = _falcon_norms(view, grouped, parallel)
    bias, alibi = view.flag("bias"), view.flag("alibi")
    layer = LayerSpec(
        mixer=AttentionSpec(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            scale=sizes.head_dim**-0.5,
            rope=None if alibi else 0,
            qkv_bias=bias,
            out_bias=bias,
            alibi=_rounded(slopes(sizes.heads)) if alibi else (),
            alibi_rounded=alibi,
        ),
        mlp=MlpSpec(sizes.mlp, view.choice("activation", ACTIVATIONS), gated=False, in_bias=bias, out_bias=bias),
        before_mixer=before_mixer,
        before_mlp=before_mlp,
        parallel=parallel,
    )
    rope, final = read_rope(view, sizes.head_dim), layer_norm(view, "ln_f", _EPS)
    return finish_spec(view, [layer] * sizes.layers, () if alibi else (rope,), final, names=FUSED_NAMES)


def mpt(view: ConfigView) -> ModelSpec:
    """No biases, layer norms without bias; q, k and v may be clipped; slopes in an order of their own."""
    view.skip(
        "emb_pdrop", "embedding_fraction", "init_device", "learned_pos_emb", "no_bias"
    )  # not used by transformers
    view.must_be("expansion_ratio", (4,), "transformers computes with 4.")
    view.must_be("logit_scale", (None,), "transformers does not scale logits.")
    view.must_be("norm_type", ("low_precision_layernorm", "layernorm"), "transformers computes a layer norm.")
    attn = _attn_config(view)
    sizes = sizes_of(view, None, None, None)
    layer = LayerSpec(
        mixer=AttentionSpec(
            heads=sizes.heads,
            kv_heads=sizes.heads,
            head_dim=sizes.head_dim,
            scale=attn.get("softmax_scale") or sizes.head_dim**-0.5,
            rope=None,
            clip=attn.get("clip_qkv"),
            alibi=mpt_slopes(sizes.heads),
        ),
        mlp=MlpSpec(sizes.mlp, "gelu", gated=False),
        before_mixer=layer_norm(view, "norm_1", _EPS, bias=False),
        before_mlp=layer_norm(view, "norm_2", _EPS, bias=False),
    )
    final = layer_norm(view, "norm_f", _EPS, bias=False)
    return finish_spec(view, [layer] * sizes.layers, (), final, positions="max_seq_len", names=MPT_NAMES)


def slopes(heads: int) -> tuple[float, ...]:
    """ALiBi's slopes (Press et al. 2022): powers of 2 ** (-8 / n), n the power of two below ``heads``; then every
    second one of those of 2 n heads."""
    below = 2 ** int(math.log2(heads))
    powers = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    powers += [2 ** (-4 * i / below) for i in range(1, 2 * (heads - below) + 1, 2)]
    return tuple(float(np.float32(power)) for power in powers)


def mpt_slopes(heads: int) -> tuple[float, ...]:
    """The first ``heads`` of the slopes of the next power of two; where there are more, every second one first."""
    above = 2 ** math.ceil(math.log2(heads))
    powers = [float(np.float32(2 ** (-8 * i / above))) for i in range(1, above + 1)]
    return tuple(powers if above == heads else (powers[1::2] + powers[::2])[:heads])


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    """``values`` in bfloat16."""
    return tuple(float(ml_dtypes.bfloat16(value)) for value in values)


def _falcon_norms(view: ConfigView, grouped: bool, parallel: bool) -> tuple[NormSpec, NormSpec | None]:
    """The norms before attention and MLP; None: the MLP reads the norm of the attention."""
    key = "num_ln_in_parallel_attn"
    count = view.optional_integer(key) or (2 if grouped else 1)
    if grouped and not parallel:
        raise view.error("parallel_attn", "new_decoder_architecture needs it.", False)
    if parallel and (count > 2 or (count == 2 and not grouped)):
        raise view.error(key, "1 is supported, and 2 with new_decoder_architecture.", count)
    if parallel and count == 2:
        return layer_norm(view, "ln_attn", _EPS), layer_norm(view, "ln_mlp", _EPS)
    second = None if parallel else layer_norm(view, "post_attention_layernorm", _EPS)
    return layer_norm(view, "input_layernorm", _EPS), second


def _attn_config(view: ConfigView) -> Mapping[str, Any]:
    """MPT's ``attn_config``, checked: clip_qkv and softmax_scale where they are given."""
    values, found = view.mapping("attn_config") or {}, {}
    for key, value in values.items():
        if key not in (*_MPT_READ, *_MPT_INERT, *_MPT_FIXED) and key not in INERT:
            raise view.error(f"attn_config.{key}", "transformers has no such key.", value)
    for key, wanted in _MPT_FIXED.items():
        if values.get(key, wanted) != wanted:
            raise view.error(f"attn_config.{key}", f"only {wanted!r} is supported.", values[key])
    for key in ("clip_qkv", "softmax_scale"):
        if values.get(key) is not None:
            found[key] = view.number_value(f"attn_config.{key}", values[key])
    return found
