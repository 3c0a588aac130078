"""LFM2: gated short convolutions, and attention in some layers; LFM2 with experts."""

from __future__ import annotations

from collections.abc import Sequence

from truffula.model.architectures.mamba_hybrid import layer_numbers
from truffula.model.architectures.moe_pieces import dense_first, read_experts, with_experts
from truffula.model.architectures.pieces import Sizes, finish_spec, read_sizes
from truffula.model.config_view import MOST, ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec
from truffula.model.parts.short_conv import ShortConvSpec
from truffula.model.rope import read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames

KINDS = ("conv", "full_attention")
NAMES = ModuleNames(
    out="self_attn.out_proj",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    gate_up=None,
    down="feed_forward.w2",
)
MOE_NAMES = MoeNames(
    block="feed_forward", block5="feed_forward", correction="expert_bias", gate="w1", up="w3", down="w2"
)


def lfm2(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head; the final norm is called embedding_norm."""
    sizes = read_sizes(view)
    return _finish(view, sizes, _layers(view, sizes, _mlp_width(view, sizes.mlp), _kinds(view, sizes.layers)))


def lfm2_moe(view: ConfigView) -> ModelSpec:
    """LFM2 with experts in all but the first layers; sigmoids, with a correction of the choice."""
    sizes = read_sizes(view)
    kinds = view.strings("layer_types", sizes.layers)
    if kinds is None:
        raise view.error("layer_types", f"each layer's kind is needed, {' or '.join(KINDS)}.")
    router = RouterSpec(
        *read_experts(view, "num_experts"),
        score="sigmoid",
        correction=view.flag("use_expert_bias"),
        norm=1.0 if view.flag("norm_topk_prob") else None,
        plus=1e-6,
        scale=view.number("routed_scaling_factor"),
    )
    moe = MoeSpec(router, view.integer("moe_intermediate_size"), "silu", names=MOE_NAMES)
    layers = _layers(view, sizes, sizes.mlp, _known(view, kinds))
    return _finish(view, sizes, with_experts(layers, moe, dense_first(view, "num_dense_layers", sizes.layers)))


def _layers(view: ConfigView, sizes: Sizes, width: int, kinds: Sequence[str]) -> list[LayerSpec]:
    """Layers of these ``kinds``, with an MLP of this ``width``."""
    eps = view.number("norm_eps")
    conv = ShortConvSpec(view.integer("conv_L_cache", minimum=2), view.flag("conv_bias"))
    attention = AttentionSpec(
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        rope=0,
        q_norm=NormSpec("self_attn.q_layernorm", eps),
        k_norm=NormSpec("self_attn.k_layernorm", eps),
    )
    return [
        LayerSpec(
            mixer=conv if kind == "conv" else attention,
            mlp=MlpSpec(width, "silu"),
            before_mixer=NormSpec("operator_norm", eps),
            before_mlp=NormSpec("ffn_norm", eps),
        )
        for kind in kinds
    ]


def _finish(view: ConfigView, sizes: Sizes, layers: Sequence[LayerSpec]) -> ModelSpec:
    norm = NormSpec("embedding_norm", view.number("norm_eps"))
    return finish_spec(view, layers, (read_rope(view, sizes.head_dim),), norm, names=NAMES)


def _kinds(view: ConfigView, layers: int) -> tuple[str, ...]:
    """The kind of each layer: ``layer_types``, else ``full_attn_idxs`` (null: all attend)."""
    attend, kinds = layer_numbers(view, "full_attn_idxs"), view.strings("layer_types", layers)
    if kinds is None:
        every = view.raw("full_attn_idxs") is None
        kinds = tuple("full_attention" if every or index in attend else "conv" for index in range(layers))
    return _known(view, kinds)


def _known(view: ConfigView, kinds: tuple[str, ...]) -> tuple[str, ...]:
    for kind in kinds:
        if kind not in KINDS:
            raise view.error("layer_types", f"{kind} is not supported; {' and '.join(KINDS)} are.", kind)
    return kinds


def _mlp_width(view: ConfigView, width: int) -> int:
    """The width of w1: the configured one (``block_ff_dim`` in older files), adjusted as transformers does."""
    width = view.optional_integer("block_ff_dim") or width
    multiplier, multiple = view.number("block_ffn_dim_multiplier"), view.integer("block_multiple_of")
    if not view.flag("block_auto_adjust_ff_dim"):
        return width
    adjusted = multiplier * int(2 * width / 3)
    if adjusted > MOST:
        raise view.error("block_ffn_dim_multiplier", f"it makes the feed-forward wider than {MOST}.", multiplier)
    return multiple * -(-int(adjusted) // multiple)
