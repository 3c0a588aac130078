"""GGUF families with attention and one MLP in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from truffula.weights.checkpoint import Array
from truffula.weights.gguf.changes import INTERLEAVED, Config, less_one
from truffula.weights.gguf.experts import MIXTRAL
from truffula.weights.gguf.families import (
    BLOCK,
    HEAD_NORMS_BLOCK,
    LAYER_NORM,
    LLAMA_BLOCK,
    POST_NORM_BLOCK,
    QWEN3_BLOCK,
    RMS_NORM,
    TOP,
    Family,
    attention_bias,
    biased,
    granite,
    implied_head_dim,
    llama_biases,
    llama_like,
    optional_window,
    partly_rotated,
    windows,
    with_key,
)
from truffula.weights.gguf.hparams import HParams

_PHI2_BLOCK = {**BLOCK, "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
_STARCODER2_BLOCK = {**LLAMA_BLOCK, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_FUSED_BLOCK = {**LLAMA_BLOCK, "ffn_up": "mlp.gate_up_proj"}  # gate and up are one tensor
_GLM4_BLOCK = {
    **_FUSED_BLOCK, "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm",
}  # fmt: skip
_STABLELM_BLOCK = {**LLAMA_BLOCK, "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm"}
_HUNYUAN_BLOCK = {**LLAMA_BLOCK, "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
_APERTUS_BLOCK = {**HEAD_NORMS_BLOCK, "attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"}
_OLMO2_BLOCK = {
    **{name: module for name, module in HEAD_NORMS_BLOCK.items() if name != "attn_norm"},
    "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def _llama(hparams: HParams, config: dict[str, Any]) -> None:
    if window := hparams.optional("attention.sliding_window"):  # only Mistral's files of this architecture have one
        config |= {**_MISTRAL, "sliding_window": window}
    llama_biases(hparams, config)


def _granite(hparams: HParams, config: dict[str, Any]) -> None:
    """Of a Granite 4 model without experts, the MLP is the shared expert."""
    granite(hparams, config)
    shared, width = "expert_shared_feed_forward_length", config["intermediate_size"]
    hparams.only(shared, hparams.count(shared, width), width)


def _seed_oss(hparams: HParams, config: dict[str, Any]) -> None:
    config |= {
        "attention_bias": biased(hparams),
        "attention_out_bias": hparams.has("attn_output.bias"),
        "mlp_bias": hparams.has("ffn_up.bias"),
    }


def _olmo2(hparams: HParams, config: dict[str, Any]) -> None:
    """OLMo 3 has windows; only its full layers are scaled, which is not read from files."""
    llama_like(hparams, config)
    if not hparams.get("attention.sliding_window"):
        return
    config |= {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"]}
    windows(hparams, config)
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        raise hparams.unsupported("rope.scaling.type", f"is {rope['rope_type']!r}: not supported in files of OLMo 3.")
    config["rope_parameters"] = {"full_attention": rope, "sliding_attention": rope}


def _cohere(hparams: HParams, config: dict[str, Any]) -> None:
    attention_bias(hparams, config)
    config["logit_scale"] = hparams.real("logit_scale")
    if config["model_type"] == "cohere2":
        windows(hparams, config)
        return
    implied_head_dim(hparams, config)
    config["use_qk_norm"] = hparams.has("attn_q_norm.weight")


def _phi3(hparams: HParams, config: dict[str, Any]) -> None:
    partly_rotated(hparams, config)
    implied_head_dim(hparams, config)
    optional_window(hparams, config)
    original = "rope.scaling.original_context_length"
    config["original_max_position_embeddings"] = hparams.count(original, config["max_position_embeddings"])


def _starcoder2(hparams: HParams, config: dict[str, Any]) -> None:
    """Files have no window: llama.cpp attends to everything before a token."""
    implied_head_dim(hparams, config)
    config["use_bias"] = biased(hparams)


def _mistral3(hparams: HParams, config: dict[str, Any]) -> None:
    """Ministral 3, whose queries grow with their position, else Mistral Small 3."""
    beta = "attention.temperature_scale"
    optional_window(hparams, config)
    if not hparams.get(beta):
        config |= _MISTRAL
        return
    rope, log = config["rope_parameters"], hparams.real("rope.scaling.yarn_log_multiplier", 0.0, least=0.0)
    if rope["rope_type"] != "yarn":
        raise hparams.unsupported(beta, f"is {hparams.get(beta)}, in a file without yarn.")
    rope["llama_4_scaling_beta"] = hparams.real(beta)
    if log:  # llama.cpp has no key for mscale either, and computes with 1
        rope |= {"mscale": 1.0, "mscale_all_dim": log}


def _stablelm(hparams: HParams, config: dict[str, Any]) -> None:
    """Whether the parts are parallel is seen from the norms, as in llama.cpp: its converter guesses the key."""
    partly_rotated(hparams, config)
    implied_head_dim(hparams, config)
    hparams.get("use_parallel_residual")
    config |= {
        "use_parallel_residual": not hparams.has("ffn_norm.weight"),
        "use_qkv_bias": biased(hparams),
        "qk_layernorm": hparams.has("attn_q_norm.weight"),
    }


def _glm(hparams: HParams, config: dict[str, Any]) -> None:
    partly_rotated(hparams, config)
    config["attention_bias"] = biased(hparams)


def _nemotron(hparams: HParams, config: dict[str, Any]) -> None:
    hparams.get(RMS_NORM[0])  # the converter writes the same number under both keys
    partly_rotated(hparams, config)
    llama_like(hparams, config)


def _exaone4(hparams: HParams, config: dict[str, Any]) -> None:
    """With a window, layers without it are not rotated."""
    implied_head_dim(hparams, config)
    if hparams.get("attention.sliding_window"):
        windows(hparams, config)
    else:
        config |= {"sliding_window": None, "layer_types": ["full_attention"] * config["num_hidden_layers"]}


def _ernie(hparams: HParams, config: dict[str, Any]) -> None:
    config["use_bias"] = biased(hparams)


def _hunyuan(hparams: HParams, config: dict[str, Any]) -> None:
    """Dense files may have one expert, as their configs, which llama.cpp takes for none."""
    for key in ("expert_count", "expert_used_count"):
        hparams.only(key, hparams.get(key) or 1, 1)
    attention_bias(hparams, config)


def _xielu(hparams: HParams, config: Config) -> dict[str, Array]:
    """The numbers of each layer's activation, which are tensors of a checkpoint and metadata of a file."""
    layers, made = config["num_hidden_layers"], {}
    for name in ("alpha_n", "alpha_p", "beta", "eps"):
        shape = (1,) if name.startswith("alpha") else ()
        for layer, number in enumerate(hparams.numbers(f"xielu.{name}", layers)):
            made[f"model.layers.{layer}.mlp.act_fn.{name}"] = np.full(shape, number, np.float32)
    return made


def _olmo(hparams: HParams, config: dict[str, Any]) -> None:
    """Norms without weights, whose epsilon no config changes. Biases are not in files."""
    hparams.only(LAYER_NORM[0], config.pop("layer_norm_eps"), 1e-5)
    implied_head_dim(hparams, config)
    config["clip_qkv"] = hparams.real("attention.clamp_kqv", 0.0) or None


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", LLAMA_BLOCK, _llama, changes=INTERLEAVED,
                    variant=with_key("expert_count", MIXTRAL)),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", LLAMA_BLOCK, implied_head_dim),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", QWEN3_BLOCK, attention_bias),
    "command-r": Family("cohere", "CohereForCausalLM", HEAD_NORMS_BLOCK, _cohere, eps=LAYER_NORM),
    "cohere2": Family("cohere2", "Cohere2ForCausalLM", HEAD_NORMS_BLOCK, _cohere, eps=LAYER_NORM),
    "granite": Family("granite", "GraniteForCausalLM", LLAMA_BLOCK, _granite, changes=INTERLEAVED),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _OLMO2_BLOCK, _olmo2),
    "seed_oss": Family("seed_oss", "SeedOssForCausalLM", POST_NORM_BLOCK, _seed_oss),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", LLAMA_BLOCK, llama_like, changes=INTERLEAVED),
    "phi2": Family("phi", "PhiForCausalLM", _PHI2_BLOCK, partly_rotated, eps=LAYER_NORM, partial=True,
                   top={**TOP, "output_norm": "model.final_layernorm"}),
    "phi3": Family("phi3", "Phi3ForCausalLM", _FUSED_BLOCK, _phi3, partial=True),
    "starcoder2": Family("starcoder2", "Starcoder2ForCausalLM", _STARCODER2_BLOCK, _starcoder2,
                         eps=(LAYER_NORM[0], "norm_epsilon")),
    "mistral3": Family("ministral3", "Ministral3ForCausalLM", LLAMA_BLOCK, _mistral3, changes=INTERLEAVED),
    "stablelm": Family("stablelm", "StableLmForCausalLM", _STABLELM_BLOCK, _stablelm, eps=LAYER_NORM, partial=True,
                       split=dict.fromkeys(("self_attn.q_layernorm", "self_attn.k_layernorm"), "norms.{h}")),
    "glm4": Family("glm4", "Glm4ForCausalLM", _GLM4_BLOCK, _glm, partial=True),
    "chatglm": Family("glm", "GlmForCausalLM", _FUSED_BLOCK, _glm, partial=True),
    "nemotron": Family("nemotron", "NemotronForCausalLM", LLAMA_BLOCK, _nemotron, partial=True,
                       eps=(LAYER_NORM[0], "norm_eps"), changes=less_one(LLAMA_BLOCK)),
    "exaone4": Family("exaone4", "Exaone4ForCausalLM", _OLMO2_BLOCK, _exaone4),
    "ernie4_5": Family("ernie4_5", "Ernie4_5ForCausalLM", LLAMA_BLOCK, _ernie),
    "hunyuan-dense": Family("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", _HUNYUAN_BLOCK, _hunyuan),
    "arcee": Family("arcee", "ArceeForCausalLM", LLAMA_BLOCK, llama_like, changes=INTERLEAVED),
    "apertus": Family("apertus", "ApertusForCausalLM", _APERTUS_BLOCK, llama_like, made=_xielu),
    "olmo": Family("olmo", "OlmoForCausalLM", BLOCK, _olmo, changes=INTERLEAVED, eps=LAYER_NORM),
}  # fmt: skip
