"""Mistral, Ministral, whose ``layer_types`` mixes windowed and full layers, and Ministral 3; Mistral 3 (text)."""

from __future__ import annotations

from truffula.model.architectures.deepseek import mistral4
from truffula.model.architectures.pieces import attention, finish_spec, llama_model, mlp, pre_norm, read_sizes, rms
from truffula.model.architectures.pieces import windows as layer_windows
from truffula.model.config_view import ConfigView
from truffula.model.parts.attention import PositionScale
from truffula.model.rope import read_rope, rope_parameter
from truffula.model.spec import LLAMA_NAMES, ModelSpec, ModuleNames

_BETA, _ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
# The multimodal class has the same body under language_model.
MULTIMODAL_NAMES = ModuleNames(
    body="model.language_model.",
    skip=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)


def mistral(view: ConfigView, names: ModuleNames = LLAMA_NAMES) -> ModelSpec:
    """Llama without biases and with a window, if not null, on every layer or on those of ``layer_types``."""
    sizes = read_sizes(view)
    # transformers reads a mistral config with layer_types as a ministral one; otherwise the two are the same.
    kinds = view.strings("layer_types", sizes.layers)
    windows = layer_windows(view, sizes.layers, view.optional_integer("sliding_window"), kinds)
    return llama_model(view, sizes, windows, names=names)


def ministral3(view: ConfigView, names: ModuleNames = LLAMA_NAMES) -> ModelSpec:
    """Mistral with queries that grow with the logarithm of their position, in steps of the original length."""
    sizes, window = read_sizes(view), view.optional_integer("sliding_window")
    rope = read_rope(view, sizes.head_dim, more=(_BETA, _ORIGINAL, "max_position_embeddings"))
    step = rope_parameter(view, _ORIGINAL)
    scale = PositionScale(rope_parameter(view, _BETA), step)
    layer = pre_norm(view, attention(sizes, window, position_scale=scale), mlp(view, sizes))
    return finish_spec(view, [layer] * sizes.layers, (rope,), rms(view, "norm"), names=names)


def mistral3(view: ConfigView) -> ModelSpec:
    """The text part of the multimodal class: text_config is a mistral, a ministral3 or a mistral4 config."""
    view.skip("vision_config", "image_token_index", "image_token_id", "projector_hidden_act", "vision_feature_layer")
    view.skip("multimodal_projector_bias", "spatial_merge_size")
    view.must_be("is_encoder_decoder", (False,), "only decoder-only models are supported.")
    readers = {"mistral": mistral, "ministral3": ministral3, "mistral4": mistral4}
    text = view.nested("text_config", *readers)
    return readers[text.model_type](text, MULTIMODAL_NAMES)
