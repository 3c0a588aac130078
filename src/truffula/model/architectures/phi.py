"""Phi 1 to 2, and Phi 3 to 4: a parallel layer with layer norms, and Llama's layer with fused modules and longrope."""

from __future__ import annotations

from truffula.model.architectures.pieces import (
    ACTIVATIONS,
    finish_spec,
    layer_norm,
    llama_layer,
    read_sizes,
    rms,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.rope import RopeKeys, read_rope
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames

PHI_NAMES = ModuleNames(out="self_attn.dense", up="mlp.fc1", down="mlp.fc2")
PHI3_NAMES = ModuleNames(qkv_order="flat", gate_up_fused=True)


def phi(view: ConfigView) -> ModelSpec:
    """Attention and MLP read one norm; a part of each head is rotated; every linear has a bias, the head too."""
    sizes, norm = read_sizes(view), layer_norm(view, "input_layernorm", "layer_norm_eps")
    qk_norm = view.flag("qk_layernorm")
    layer = LayerSpec(
        mixer=AttentionSpec(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            scale=sizes.head_dim**-0.5,
            rope=0,
            q_norm=layer_norm(view, "self_attn.q_layernorm", "layer_norm_eps") if qk_norm else None,
            k_norm=layer_norm(view, "self_attn.k_layernorm", "layer_norm_eps") if qk_norm else None,
            qkv_bias=True,
            out_bias=True,
        ),
        mlp=MlpSpec(sizes.mlp, view.choice("hidden_act", ACTIVATIONS), gated=False, in_bias=True, out_bias=True),
        before_mixer=norm,
        before_mlp=None,
        parallel=True,
    )
    rope = read_rope(view, sizes.head_dim, partial=True)
    final = layer_norm(view, "final_layernorm", "layer_norm_eps")
    return finish_spec(view, [layer] * sizes.layers, [rope], final, head_bias=True, names=PHI_NAMES)


def phi3(view: ConfigView) -> ModelSpec:
    """Llama's layer; q, k and v are one module, and so are gate and up. A window, if not null, is on every layer."""
    view.skip("original_max_position_embeddings")
    sizes = read_sizes(view)
    keys = RopeKeys(aliases=(("su", "longrope"), ("yarn", "longrope")))
    rope = read_rope(view, sizes.head_dim, partial=True, keys=keys)
    per_layer = windows(view, sizes.layers, view.optional_integer("sliding_window"), None)
    layers = [llama_layer(view, sizes, window) for window in per_layer]
    return finish_spec(view, layers, [rope], rms(view, "norm"), names=PHI3_NAMES)
