"""Llama 4: chunks of attention with a rotation, full layers without one, and one expert per token beside a shared
one."""

from __future__ import annotations

from dataclasses import replace

from truffula.model.architectures.moe_pieces import read_experts, with_experts
from truffula.model.architectures.pieces import ACTIVATIONS, attention, finish_spec, pre_norm, read_sizes, rms
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import AttentionSpec, PositionScale
from truffula.model.parts.mlp import MlpSpec
from truffula.model.parts.moe import MoeNames, MoeSpec, RouterSpec, SharedSpec
from truffula.model.rope import read_rope
from truffula.model.rows import ExpertLayout, NormSpec
from truffula.model.spec import ModelSpec, ModuleNames

_BLOCK = "feed_forward"
_IN, _OUT = f"{_BLOCK}.experts.gate_up_proj", f"{_BLOCK}.experts.down_proj"
_EXPERTS = MoeNames(
    block=_BLOCK,
    block5=_BLOCK,
    router="router",
    router5="router",
    in_layouts=(ExpertLayout((_IN,), columns=True, parameter=_IN),),
    out_layouts=(ExpertLayout((_OUT,), columns=True, parameter=_OUT),),
    shared=f"{_BLOCK}.shared_expert",
)
_NAMES = ModuleNames(gate=f"{_BLOCK}.gate_proj", up=f"{_BLOCK}.up_proj", gate_up=None, down=f"{_BLOCK}.down_proj")
_SKIP = ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector.")


def llama4(view: ConfigView) -> ModelSpec:
    """The text part of the multimodal class."""
    view.skip("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "image_token_id")
    view.must_be("is_encoder_decoder", (False,), "only decoder-only models are supported.")
    names = replace(_NAMES, body="language_model.model.", skip=_SKIP)
    return llama4_text(view.nested("text_config", "llama4_text"), names)


def llama4_text(view: ConfigView, names: ModuleNames = _NAMES) -> ModelSpec:
    """``moe_layers`` have experts, the others an MLP of ``intermediate_size_mlp``."""
    view.skip("router_jitter_noise")  # of training
    sizes, (experts, top_k) = read_sizes(view), read_experts(view, "num_local_experts")
    if top_k != 1:
        raise view.error("num_experts_per_tok", "one is supported: its weight multiplies the expert's input.", top_k)
    activation = view.choice("hidden_act", ACTIVATIONS)
    shared, router = SharedSpec(sizes.mlp), RouterSpec(experts, 1, score="sigmoid")
    moe = MoeSpec(router, sizes.mlp, activation, shared=shared, weigh="input", names=_EXPERTS)
    step = view.integer("interleave_moe_layer_step")
    sparse = view.raw("moe_layers")
    sparse = list(range(step - 1, sizes.layers, step)) if sparse is None else sparse
    if not isinstance(sparse, list) or any(type(index) is not int for index in sparse):
        raise view.error("moe_layers", "expected a list of layer numbers.", sparse)
    dense = MlpSpec(view.integer("intermediate_size_mlp"), activation)
    layers = [pre_norm(view, mixer, dense) for mixer in _mixers(view)]
    return finish_spec(
        view,
        with_experts(layers, moe, [index in sparse for index in range(sizes.layers)]),
        (read_rope(view, sizes.head_dim),),
        rms(view, "norm"),
        names=names,
    )


def _mixers(view: ConfigView) -> list[AttentionSpec]:
    sizes, bias, chunk = read_sizes(view), view.flag("attention_bias"), view.optional_integer("attention_chunk_size")
    every = view.integer("no_rope_layer_interval")
    rotated = view.numbers("no_rope_layers", sizes.layers) if view.raw("no_rope_layers") else None
    rotated = rotated or tuple(float((layer + 1) % every != 0) for layer in range(sizes.layers))  # 0: no rotation
    kinds = view.strings("layer_types", sizes.layers)
    chunked = [bool(turn) and chunk is not None for turn in rotated]
    if kinds is not None:
        for kind in kinds:
            if kind not in ("chunked_attention", "full_attention"):
                raise view.error("layer_types", f"{kind} is not supported; chunked_attention and full_attention are.")
        chunked = [kind == "chunked_attention" for kind in kinds]
    if chunk is None and any(chunked):
        raise view.error("layer_types", "it asks for chunked_attention, but attention_chunk_size is null.")
    norm = (
        NormSpec("self_attn.qk_norm", view.number("rms_norm_eps"), weight=False) if view.flag("use_qk_norm") else None
    )
    tuned = PositionScale(view.number("attn_scale"), view.number("floor_scale"), 1.0)
    scale = tuned if view.flag("attn_temperature_tuning") else None
    return [
        attention(
            sizes,
            chunk if in_chunks else None,
            chunked=in_chunks,
            rope=0 if turn else None,
            rope_layout="interleaved",
            q_norm=norm if turn else None,
            k_norm=norm if turn else None,
            norm_rotated=True,
            position_scale=None if turn else scale,
            qkv_bias=bias,
            out_bias=bias,
        )
        for turn, in_chunks in zip(rotated, chunked, strict=True)
    ]
