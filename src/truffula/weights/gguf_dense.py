"""GGUF families with attention and one MLP in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truffula.errors import UnsupportedModel
from truffula.weights.gguf_changes import INTERLEAVED, less_one
from truffula.weights.gguf_families import (
    BLOCK,
    HEAD_NORMS_BLOCK,
    LAYER_NORM,
    LLAMA_BLOCK,
    POST_NORM_BLOCK,
    QWEN3_BLOCK,
    Family,
    attention_bias,
    granite,
    implied_head_dim,
    layer_types,
    llama_like,
)
from truffula.weights.gguf_hparams import HParams

_GEMMA2_BLOCK = {
    **BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA3_BLOCK = {**_GEMMA2_BLOCK, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_OLMO2_BLOCK = {
    **{name: module for name, module in POST_NORM_BLOCK.items() if name != "attn_norm"},
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def _llama(hparams: HParams, config: dict[str, Any]) -> None:
    window = hparams.get("attention.sliding_window")
    if window:  # only Mistral's files of this architecture have one
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)
    attention_bias(hparams, config)
    if "blk.0.ffn_up.bias" in hparams.header.tensors:
        config["mlp_bias"] = True


def _gemma2(hparams: HParams, config: dict[str, Any]) -> None:
    config["sliding_window"] = hparams.count("attention.sliding_window", 4096)
    config["layer_types"] = layer_types(hparams, config["num_hidden_layers"], every=2)
    config["attn_logit_softcapping"] = hparams.real("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = hparams.real("final_logit_softcapping", 30.0)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=46)
    theta, local = config["rope_parameters"]["rope_theta"], hparams.get("rope.freq_base_swa")
    if local is not None and hparams.real("rope.freq_base_swa") != theta:
        name = hparams.name("rope.freq_base_swa")
        raise UnsupportedModel(f"{name} is {local}; gemma2 has one base for all layers, here {theta}.", param=name)


def _gemma3(hparams: HParams, config: dict[str, Any]) -> None:
    config["sliding_window"] = hparams.count("attention.sliding_window")
    config["layer_types"] = layer_types(hparams, config["num_hidden_layers"], every=6)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=62)
    cap = hparams.get("final_logit_softcapping")
    config["final_logit_softcapping"] = hparams.real("final_logit_softcapping") if cap else None
    local = {"rope_type": "default", "rope_theta": hparams.real("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


def _attention_scalar(config: Mapping[str, Any], layers_of_27b: int) -> int:
    """``query_pre_attn_scalar``, for which the format has no key.

    It differs from the head's width in the 27B models only, which llama.cpp also recognises by their number of layers.
    """
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _seed_oss(hparams: HParams, config: dict[str, Any]) -> None:
    tensors = hparams.header.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["attention_out_bias"] = "blk.0.attn_output.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors


def _olmo2(hparams: HParams, config: dict[str, Any]) -> None:
    """OLMo 3 has windows; only its full layers are scaled, which is not read from files."""
    llama_like(hparams, config)
    if hparams.get("attention.sliding_window") is None:
        return
    config.update(model_type="olmo3", architectures=["Olmo3ForCausalLM"])
    config["sliding_window"] = hparams.count("attention.sliding_window")
    config["layer_types"] = layer_types(hparams, config["num_hidden_layers"], every=4)
    rope, name = config["rope_parameters"], hparams.name("rope.scaling.type")
    if rope["rope_type"] != "default":
        raise UnsupportedModel(f"{name} is {rope['rope_type']!r}: not supported in files of OLMo 3.", param=name)
    config["rope_parameters"] = {"full_attention": rope, "sliding_attention": rope}


def _cohere(hparams: HParams, config: dict[str, Any]) -> None:
    attention_bias(hparams, config)
    config["logit_scale"] = hparams.real("logit_scale")
    if config["model_type"] == "cohere2":
        config["sliding_window"] = hparams.count("attention.sliding_window")
        config["layer_types"] = layer_types(hparams, config["num_hidden_layers"], every=4)
        return
    implied_head_dim(hparams, config)
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in hparams.header.tensors


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", LLAMA_BLOCK, _llama, changes=INTERLEAVED),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", LLAMA_BLOCK, implied_head_dim),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", QWEN3_BLOCK, attention_bias),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _GEMMA2_BLOCK, _gemma2,
                     changes=less_one(_GEMMA2_BLOCK), factors=False),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA3_BLOCK, _gemma3, default_theta=None,
                     changes=less_one(_GEMMA3_BLOCK), factors=False),
    "command-r": Family("cohere", "CohereForCausalLM", HEAD_NORMS_BLOCK, _cohere, eps=LAYER_NORM),
    "cohere2": Family("cohere2", "Cohere2ForCausalLM", HEAD_NORMS_BLOCK, _cohere, eps=LAYER_NORM),
    "granite": Family("granite", "GraniteForCausalLM", LLAMA_BLOCK, granite, changes=INTERLEAVED),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _OLMO2_BLOCK, _olmo2),
    "seed_oss": Family("seed_oss", "SeedOssForCausalLM", POST_NORM_BLOCK, _seed_oss),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", LLAMA_BLOCK, llama_like, changes=INTERLEAVED),
}  # fmt: skip
