"""OPT: learned positions with an offset, layer norms before the parts or, in the 350M model, after the sums."""

from __future__ import annotations

from truffula.model.architectures.pieces import ACTIVATIONS, finish_spec, sizes_of
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames, body_prefixes

NAMES = ModuleNames(
    qkv=None,
    out="self_attn.out_proj",
    up="fc1",
    down="fc2",
    body="model.decoder.",
    prefixes=body_prefixes("model.decoder.", "decoder.", ""),
)


def opt(view: ConfigView) -> ModelSpec:
    """``word_embed_proj_dim``: the width of the tables, where it is not that of the stream."""
    view.skip("dropout", "init_std", "layerdrop")
    sizes = sizes_of(view, None, None, view.integer("ffn_dim"))
    bias, before = view.flag("enable_bias"), view.flag("do_layer_norm_before")
    affine = view.flag("layer_norm_elementwise_affine")
    first, second = _norm("self_attn_layer_norm", affine), _norm("final_layer_norm", affine)
    layer = LayerSpec(
        mixer=AttentionSpec(
            heads=sizes.heads,
            kv_heads=sizes.heads,
            head_dim=sizes.head_dim,
            scale=sizes.head_dim**-0.5,
            rope=None,
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=MlpSpec(
            sizes.mlp, view.choice("activation_function", ACTIVATIONS), gated=False, in_bias=bias, out_bias=bias
        ),
        before_mixer=first if before else None,
        before_mlp=second if before else None,
        after_mixer=None if before else first,
        after_mlp=None if before else second,
        norm_stream=not before,
    )
    width = view.optional_integer("word_embed_proj_dim")
    last = before and not view.flag("_remove_final_layer_norm")
    return finish_spec(
        view,
        [layer] * sizes.layers,
        (),
        _norm("final_layer_norm", affine) if last else None,
        position_offset=2,
        embed_width=None if width == sizes.hidden else width,
        names=NAMES,
    )


def _norm(module: str, affine: bool) -> NormSpec:
    return NormSpec(module, 1e-5, kind="layer", cast="last", weight=affine, bias=affine)
