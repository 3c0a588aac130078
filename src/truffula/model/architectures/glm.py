"""GLM 4 (9B, 32B; not 4.5): a part of each head rotated in pairs, gate and up as one module; 0414 has four norms."""

from __future__ import annotations

from typing import Any

from truffula.model.architectures.pieces import attention, finish_spec, mlp, pre_norm, read_sizes, rms
from truffula.model.config_view import ConfigView
from truffula.model.rope import read_rope
from truffula.model.spec import ModelSpec, ModuleNames

NAMES = ModuleNames(gate_up_fused=True)


def glm(view: ConfigView) -> ModelSpec:
    """Llama's norms; ``attention_bias`` is for q, k and v."""
    return _model(view)


def glm4(view: ConfigView) -> ModelSpec:
    """Norms after the parts, too."""
    after_mixer, after_mlp = rms(view, "post_self_attn_layernorm"), rms(view, "post_mlp_layernorm")
    return _model(view, after_mixer=after_mixer, after_mlp=after_mlp)


def _model(view: ConfigView, **norms: Any) -> ModelSpec:
    sizes = read_sizes(view)
    mixer = attention(sizes, rope_layout="interleaved", qkv_bias=view.flag("attention_bias"))
    layer = pre_norm(view, mixer, mlp(view, sizes), **norms)
    rope = read_rope(view, sizes.head_dim, partial=True)
    return finish_spec(view, [layer] * sizes.layers, (rope,), rms(view, "norm"), names=NAMES)
