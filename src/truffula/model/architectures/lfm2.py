"""LFM2: gated short convolutions, and attention in some layers."""

from __future__ import annotations

from truffula.model.architectures.mamba_hybrid import layer_numbers
from truffula.model.architectures.pieces import finish_spec, read_sizes
from truffula.model.config_view import MOST, ConfigView
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.short_conv import ShortConvSpec
from truffula.model.rope import read_rope
from truffula.model.rows import NormSpec
from truffula.model.spec import LayerSpec, ModelSpec, ModuleNames

KINDS = ("conv", "full_attention")
NAMES = ModuleNames(
    qkv=None,
    out="self_attn.out_proj",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    gate_up=None,
    down="feed_forward.w2",
)


def lfm2(view: ConfigView) -> ModelSpec:
    """Norms of q and k per head; the final norm is called embedding_norm."""
    sizes, eps = read_sizes(view), view.number("norm_eps")
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
    layers = [
        LayerSpec(
            mixer=conv if kind == "conv" else attention,
            mlp=MlpSpec(_mlp_width(view, sizes.mlp), "silu"),
            before_mixer=NormSpec("operator_norm", eps),
            before_mlp=NormSpec("ffn_norm", eps),
        )
        for kind in _kinds(view, sizes.layers)
    ]
    ropes = (read_rope(view, sizes.head_dim),)
    return finish_spec(view, layers, ropes, NormSpec("embedding_norm", eps), names=NAMES)


def _kinds(view: ConfigView, layers: int) -> tuple[str, ...]:
    """The kind of each layer: ``layer_types``, else ``full_attn_idxs`` (null: all attend)."""
    attend, kinds = layer_numbers(view, "full_attn_idxs"), view.strings("layer_types", layers)
    if kinds is None:
        every = view.raw("full_attn_idxs") is None
        kinds = tuple("full_attention" if every or index in attend else "conv" for index in range(layers))
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
