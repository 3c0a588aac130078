"""StarCoder 2: Llama's attention, with layer norms, a plain MLP and biases."""

from __future__ import annotations

from truffula.model.architectures.pieces import ACTIVATIONS, finish_spec, layer_norm, read_sizes
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.rope import read_rope
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames

NAMES = ModuleNames(up="mlp.c_fc", down="mlp.c_proj")


def starcoder2(view: ConfigView) -> ModelSpec:
    """``use_bias`` is for all linears of a layer. A window, if not null, is on every layer."""
    sizes, bias = read_sizes(view), view.flag("use_bias")
    layer = LayerSpec(
        mixer=AttentionSpec(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            scale=sizes.head_dim**-0.5,
            rope=0,
            window=view.optional_integer("sliding_window"),
            qkv_bias=bias,
            out_bias=bias,
        ),
        mlp=MlpSpec(sizes.mlp, view.choice("hidden_act", ACTIVATIONS), gated=False, in_bias=bias, out_bias=bias),
        before_mixer=layer_norm(view, "input_layernorm", "norm_epsilon"),
        before_mlp=layer_norm(view, "post_attention_layernorm", "norm_epsilon"),
    )
    rope, final = read_rope(view, sizes.head_dim), layer_norm(view, "norm", "norm_epsilon")
    return finish_spec(view, [layer] * sizes.layers, [rope], final, names=NAMES)
