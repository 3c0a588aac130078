"""gpt-oss: attention sinks, windows in every second layer, experts with biases and clamped gates."""

from __future__ import annotations

from truffula.model.architectures.moe_pieces import read_experts, with_experts
from truffula.model.architectures.pieces import (
    attention,
    finish_spec,
    layer_types,
    mlp,
    pre_norm,
    read_sizes,
    rms_last,
    windows,
)
from truffula.model.config_view import ConfigView
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec
from truffula.model.rope import read_rope
from truffula.model.rows import ExpertLayout
from truffula.model.spec import ModelSpec

_ALPHA = 1.702
# Matrices are stored [I, O]; gates and ups alternate.
_IN, _OUT = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_NAMES = MoeNames(
    router="router",
    router5="router",
    in_layouts=(ExpertLayout((_IN,), columns=True, alternating=True, parameter=_IN, peft_columns=True),),
    out_layouts=(ExpertLayout((_OUT,), columns=True, parameter=_OUT, peft_columns=True),),
    # GGUF files have gate and up apart, as every family's may.
    in_biases=(
        ExpertLayout((f"{_IN}_bias",), alternating=True),
        ExpertLayout(("mlp.experts.gate_proj.bias", "mlp.experts.up_proj.bias")),
    ),
    out_biases=(ExpertLayout((f"{_OUT}_bias",)), ExpertLayout(("mlp.experts.down_proj.bias",))),
)


def gpt_oss(view: ConfigView) -> ModelSpec:
    """The weights of the chosen experts add up to one; ``attention_bias`` is for q, k, v and o."""
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_local_experts")
    view.must_be("swiglu_alpha", (_ALPHA,), f"only {_ALPHA} is supported.")
    view.must_be("hidden_act", ("silu",), "the experts' activation is their own.")
    moe = MoeSpec(
        RouterSpec(experts, top_k, bias=True, norm=1.0),
        sizes.mlp,
        "quick_gelu",
        limit=view.number("swiglu_limit"),
        offset=1.0,
        names=_NAMES,
    )
    bias, kinds = view.flag("attention_bias"), layer_types(view, sizes.layers, lambda layer: bool(layer % 2))
    layers = []
    for window in windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds):
        mixer = attention(sizes, window, sinks="self_attn.sinks", qkv_bias=bias, out_bias=bias)
        layers.append(pre_norm(view, mixer, mlp(view, sizes), rms_last))
    rope = read_rope(view, sizes.head_dim)
    return finish_spec(view, with_experts(layers, moe), (rope,), rms_last(view, "norm"))
