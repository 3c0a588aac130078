"""Jamba: Mamba in most layers and attention without positions in some; experts in every few."""

from __future__ import annotations

from truffula.model.architectures.mamba_hybrid import BAMBA_NAMES
from truffula.model.architectures.moe_pieces import read_experts, with_experts
from truffula.model.architectures.pieces import ACTIVATIONS, Sizes, attention, finish_spec, mlp, read_sizes, rms
from truffula.model.config_view import ConfigView
from truffula.model.parts.mamba import MambaSpec
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec
from truffula.model.spec import LayerSpec, ModelSpec

MOE_NAMES = MoeNames(block="feed_forward", block5="feed_forward", router="router", router5="router")


def jamba(view: ConfigView) -> ModelSpec:
    """The weights of a row's experts are their softmax among all. One expert is an MLP."""
    sizes = read_sizes(view)
    # How transformers computes Mamba.
    view.skip("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep")
    attends, sparse = _places(view, "attn_layer", sizes.layers), _places(view, "expert_layer", sizes.layers)
    mixers = _mamba(view, sizes), attention(sizes, rope=None)
    layers = [
        LayerSpec(
            mixer=mixers[attends[index]],
            mlp=mlp(view, sizes),
            before_mixer=rms(view, "input_layernorm"),
            before_mlp=rms(view, "pre_ff_layernorm"),
        )
        for index in range(sizes.layers)
    ]
    if view.integer("num_experts") > 1:
        router = RouterSpec(*read_experts(view, "num_experts"))
        moe = MoeSpec(router, sizes.mlp, view.choice("hidden_act", ACTIVATIONS), names=MOE_NAMES)
        layers = with_experts(layers, moe, sparse)
    view.skip("num_experts_per_tok")
    return finish_spec(view, layers, (), rms(view, "final_layernorm"), names=BAMBA_NAMES)


def _places(view: ConfigView, name: str, layers: int) -> list[bool]:
    """Which layers are of a kind: one in every ``<name>_period``, from the layer ``<name>_offset`` on."""
    period, offset = view.integer(f"{name}_period"), view.integer(f"{name}_offset", minimum=0)
    if offset >= period:
        raise view.error(f"{name}_offset", f"it must be below {name}_period, {period}.", offset)
    return [index % period == offset for index in range(layers)]


def _mamba(view: ConfigView, sizes: Sizes) -> MambaSpec:
    automatic = view.raw("mamba_dt_rank") == "auto"
    return MambaSpec(
        width=view.integer("mamba_expand") * sizes.hidden,
        rank=-(-sizes.hidden // 16) if automatic else view.integer("mamba_dt_rank"),
        state_size=view.integer("mamba_d_state"),
        taps=view.integer("mamba_d_conv", minimum=2),
        eps=view.number("rms_norm_eps"),
        activation=view.choice("hidden_act", ACTIVATIONS),
        bias=view.flag("mamba_proj_bias"),
        conv_bias=view.flag("mamba_conv_bias"),
    )
