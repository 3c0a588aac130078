"""Mixtral: Mistral with experts instead of the MLP."""

from __future__ import annotations

from truffula.model.architectures.moe_pieces import moe_model, read_experts
from truffula.model.architectures.pieces import ACTIVATIONS, read_sizes
from truffula.model.config_view import ConfigView
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec
from truffula.model.spec import ModelSpec

# w1 is the gate, w3 the up, w2 the down projection.
MIXTRAL_NAMES = MoeNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")


def mixtral(view: ConfigView) -> ModelSpec:
    """The weights of the chosen experts add up to one. The window, if not null, is on every layer."""
    view.skip("router_jitter_noise")  # of training
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_local_experts")
    moe = MoeSpec(
        RouterSpec(experts, top_k, norm=1.0), sizes.mlp, view.choice("hidden_act", ACTIVATIONS), names=MIXTRAL_NAMES
    )
    return moe_model(view, sizes, [view.optional_integer("sliding_window")] * sizes.layers, moe)
