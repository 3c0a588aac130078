"""Nemotron-H: each layer is one part, Mamba-2, attention, an MLP or experts, behind one norm."""

from __future__ import annotations

import math

from truffula.kernels.program import Activation
from truffula.model.architectures.mamba_hybrid import newer_kind
from truffula.model.architectures.moe_pieces import read_experts, sigmoid_router
from truffula.model.architectures.pieces import ACTIVATIONS, MOST_LAYERS, finish_spec
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mamba2 import Mamba2Spec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeNames, MoeSpec, SharedSpec
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames, Part, body_prefixes

NAMES = ModuleNames(
    embed="embeddings",
    q="mixer.q_proj",
    k="mixer.k_proj",
    v="mixer.v_proj",
    qkv=None,
    out="mixer.o_proj",
    attention="mixer",
    up="mixer.up_proj",
    gate_up=None,
    down="mixer.down_proj",
    prefixes=body_prefixes("backbone.", "model."),
    unused=("mtp.",),
)
MOE_NAMES = MoeNames(block="mixer", block5="mixer", shared="mixer.shared_experts", shared_in=("up_proj",))
_PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
# Of layers with experts.
_EXPERTS = (
    *("n_routed_experts", "num_local_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("moe_latent_size", "num_experts_per_tok", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob"),
)
# Of heads that predict further tokens, of a rotary embedding, and of how Mamba is trained or its sums divided.
_WITHOUT_EFFECT = (
    *("n_shared_experts", "moe_shared_expert_overlap", "mtp_layers_block_type", "mtp_hybrid_override_pattern"),
    "num_hidden_layers",
    *("use_mamba_kernels", "expand", "mamba_expand", "time_step_max", "mamba_dt_max", "time_step_limit"),
    *("mamba_dt_limit", "time_step_floor", "mamba_dt_init_floor", "chunk_size", "mamba_chunk_size"),
    *("mamba_proj_bias", "mamba_ssm_cache_dtype", "rescale_prenorm_residual", "residual_in_fp32"),
    *(
        "num_nextn_predict_layers",
        "num_logits_to_keep",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "partial_rotary_factor",
    ),
)


def nemotron_h(view: ConfigView) -> ModelSpec:
    """Attention without positions; ``use_bias`` is of the linears of Mamba, attention has none."""
    view.skip(*_WITHOUT_EFFECT)
    view.must_be("attention_bias", (False,), "transformers ignores it: attention has no biases.")
    view.must_be("sliding_window", (None,), "transformers ignores it: attention is full.")
    eps = view.number("layer_norm_epsilon")
    heads, kv_heads, head_dim = (
        view.integer("num_attention_heads"),
        view.integer("num_key_value_heads"),
        view.integer("head_dim"),
    )
    if heads % kv_heads:
        raise view.error("num_key_value_heads", f"it does not divide the {heads} attention heads.", kv_heads)
    bias, activation, kinds = view.flag("mlp_bias"), view.choice("mlp_hidden_act", ACTIVATIONS), _kinds(view)
    parts: dict[str, Part] = {
        "linear_attention": _mamba2(view, eps),
        "full_attention": AttentionSpec(heads, kv_heads, head_dim, scale=head_dim**-0.5, rope=None),
        "mlp": MlpSpec(view.integer("intermediate_size"), activation, gated=False, in_bias=bias, out_bias=bias),
    }
    if "moe" in kinds:
        parts["moe"] = _experts(view, bias, activation)
    view.skip(*_EXPERTS)
    norm = NormSpec("norm", eps, cast="last")
    layers = [
        LayerSpec(None, parts[kind], None, norm) if kind in ("mlp", "moe") else LayerSpec(parts[kind], None, norm, None)
        for kind in kinds
    ]
    return finish_spec(view, layers, (), NormSpec("norm_f", eps, cast="last"), names=NAMES)


def _experts(view: ConfigView, bias: bool, activation: Activation) -> MoeSpec:
    """Experts without a gate, which may read and write a narrower stream; one shared expert, however many are said."""
    return MoeSpec(
        sigmoid_router(view, *read_experts(view, "n_routed_experts")),
        view.integer("moe_intermediate_size"),
        activation,
        shared=SharedSpec(view.integer("moe_shared_expert_intermediate_size"), bias=bias),
        gated=False,
        latent=view.optional_integer("moe_latent_size"),
        latent_bias=bias,
        names=MOE_NAMES,
    )


def _mamba2(view: ConfigView, eps: float) -> Mamba2Spec:
    bias = view.flag("use_bias")
    heads, groups = view.integer("mamba_num_heads"), view.integer(_written(view, "mamba_n_groups", "n_groups"))
    if heads % groups:
        raise view.error("n_groups", f"it does not divide the {heads} heads.", groups)
    return Mamba2Spec(
        heads=heads,
        head_dim=view.integer("mamba_head_dim"),
        groups=groups,
        state_size=view.integer("ssm_state_size"),
        taps=view.integer(_written(view, "mamba_d_conv", "conv_kernel"), minimum=2),
        norm=NormSpec("mixer.norm", eps),
        activation=view.choice("mamba_hidden_act", ACTIVATIONS),
        in_bias=bias,
        out_bias=bias,
        conv_bias=view.flag(_written(view, "mamba_conv_bias", "use_conv_bias")),
        # Only transformers' form for whole prompts has this bound, and not that for one token.
        dt_limit=(view.number(_written(view, "mamba_dt_min", "time_step_min")), math.inf),
        module="mixer",
    )


def _written(view: ConfigView, old: str, key: str) -> str:
    """The older spelling of ``key`` where the file has it: it wins, as in transformers."""
    view.skip(old, key)
    return old if view.written(old) else key


def _kinds(view: ConfigView) -> tuple[str, ...]:
    """The kind of each layer, from a list, or from a string with a letter for each."""
    key = "layer_types" if view.written("layer_types") else "layers_block_type"
    pattern, kinds = view.raw("hybrid_override_pattern"), view.raw(key)
    if kinds is None and pattern is not None:
        key = "hybrid_override_pattern"
        if not isinstance(pattern, str) or set(pattern) - set(_PATTERN):
            raise view.error(key, f"expected a string of {' '.join(_PATTERN)}.", pattern)
        kinds = [_PATTERN[letter] for letter in pattern]
    if kinds is None:
        kinds = ["linear_attention", "moe", "full_attention", "mlp"]
    if not isinstance(kinds, list) or not 0 < len(kinds) <= MOST_LAYERS:
        raise view.error(key, f"expected a list of 1 to {MOST_LAYERS} layers.", kinds)
    return tuple(newer_kind(view, key, kind, tuple(_PATTERN.values())) for kind in kinds)
