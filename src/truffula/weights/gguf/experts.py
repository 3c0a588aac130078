"""GGUF families with experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from truffula.errors import UnsupportedModel
from truffula.weights.gguf.changes import INTERLEAVED, ONE_ROW, STACKED
from truffula.weights.gguf.families import (
    BLOCK,
    CORRECTION,
    DEEPSEEK_EXPERTS,
    EXPERTS_BLOCK,
    GRANITE_EXPERTS,
    HEAD_NORMS_BLOCK,
    LAYER_NORM,
    LLAMA_BLOCK,
    POST_NORM_BLOCK,
    QWEN3_BLOCK,
    RMS_NORM,
    SHARED_EXPERT,
    SIGMOID,
    SOFTMAX,
    Family,
    attention_bias,
    biased,
    chosen_experts,
    expert_count,
    experts,
    experts_block,
    granite,
    implied_head_dim,
    llama_like,
    optional_window,
    partly_rotated,
    routed,
    score,
    shared_block,
    windows,
    with_key,
    without_predictors,
)
from truffula.weights.gguf.hparams import TABLES, HParams

_QWEN2_MOE_BLOCK = {**LLAMA_BLOCK, **EXPERTS_BLOCK, **SHARED_EXPERT}
_QWEN3_MOE_BLOCK = {**QWEN3_BLOCK, **EXPERTS_BLOCK}
_MIXTRAL_BLOCK = {
    **LLAMA_BLOCK, "ffn_gate_inp": "block_sparse_moe.gate",
    **experts_block("block_sparse_moe.experts", "w1", "w2", "w3"),
}  # fmt: skip
_DBRX_BLOCK = {
    "attn_norm": "norm_attn_norm.norm_1", "attn_qkv": "norm_attn_norm.attn.Wqkv",
    "attn_output": "norm_attn_norm.attn.out_proj", "attn_output_norm": "norm_attn_norm.norm_2",
    "ffn_gate_inp": "ffn.router.layer", **experts_block("ffn.experts", "w1", "w2", "v1"),
}  # fmt: skip
_DBRX_KEYS = {
    "max_position_embeddings": "max_seq_len", "intermediate_size": None, "head_dim": None, "num_key_value_heads": None,
    "layer_norm_eps": None,
}  # fmt: skip
_MINIMAX_BLOCK = {**_MIXTRAL_BLOCK, **HEAD_NORMS_BLOCK}
_GRANITE_MOE_BLOCK = {**LLAMA_BLOCK, **GRANITE_EXPERTS}
_GLM4_MOE_BLOCK = {**HEAD_NORMS_BLOCK, **DEEPSEEK_EXPERTS, "post_attention_norm": "post_attention_layernorm"}
_DOTS_BLOCK = {**QWEN3_BLOCK, **DEEPSEEK_EXPERTS}
_LLAMA4_BLOCK = {
    **{name: module.replace("mlp.", "feed_forward.") for name, module in {**LLAMA_BLOCK, **EXPERTS_BLOCK}.items()},
    **shared_block("feed_forward.shared_expert"), "ffn_gate_inp": "feed_forward.router",
}  # fmt: skip
_ERNIE_BLOCK = {**LLAMA_BLOCK, **DEEPSEEK_EXPERTS}
_HUNYUAN_BLOCK = {
    **LLAMA_BLOCK, **EXPERTS_BLOCK, **shared_block("mlp.shared_mlp"), "ffn_gate_inp": "mlp.gate.wg",
    "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm",
}  # fmt: skip
_AFMOE_BLOCK = {
    **HEAD_NORMS_BLOCK, **DEEPSEEK_EXPERTS, "ffn_gate_inp": "mlp.router.gate", "attn_gate": "self_attn.gate_proj",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_mlp_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}  # fmt: skip
_COHERE_BLOCK = {**BLOCK, **DEEPSEEK_EXPERTS}
_LAGUNA_BLOCK = {
    **QWEN3_BLOCK, **EXPERTS_BLOCK, **shared_block("mlp.shared_expert"), "attn_gate": "self_attn.g_proj",
}  # fmt: skip
_GPT_OSS_BLOCK = {**POST_NORM_BLOCK, **EXPERTS_BLOCK, "ffn_gate_inp": "mlp.router"}
_ABSENT = dict.fromkeys(("n_group", "topk_group", "norm_topk_prob"))
_NUMBERS = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
_AFMOE_KEYS = {
    **_NUMBERS, **_ABSENT, "first_k_dense_replace": "num_dense_layers", "routed_scaling_factor": "route_scale"
}  # fmt: skip
_COHERE_KEYS = {**_NUMBERS, **_ABSENT, "norm_topk_prob": "norm_topk_prob", "routed_scaling_factor": None}
_ERNIE_KEYS = {
    **_ABSENT, "n_routed_experts": "moe_num_experts", "num_experts_per_tok": "moe_k", "routed_scaling_factor": None,
    "n_shared_experts": "moe_num_shared_experts", "first_k_dense_replace": "moe_layer_start_index",
}  # fmt: skip
_LAGUNA_KEYS = {
    **_NUMBERS, **_ABSENT, "n_shared_experts": None, "first_k_dense_replace": None,
    "routed_scaling_factor": "moe_routed_scaling_factor",
}  # fmt: skip


def _qwen2_moe(hparams: HParams, config: dict[str, Any]) -> None:
    _qwen3_moe(hparams, config)
    implied_head_dim(hparams, config)
    config["shared_expert_intermediate_size"] = hparams.count("expert_shared_feed_forward_length")
    config["norm_topk_prob"] = False


def _qwen3_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp divides the weights of the chosen experts by their sum: the format has no key for it here."""
    experts(hparams, config)
    config |= {"num_experts": expert_count(hparams), "norm_topk_prob": True}
    if biased(hparams) and config["model_type"] == "qwen3_moe":
        config["attention_bias"] = True


def _granite_moe(hparams: HParams, config: dict[str, Any]) -> None:
    granite(hparams, config)
    chosen_experts(hparams, config)
    if shared := hparams.optional("expert_shared_feed_forward_length"):
        config |= {"shared_intermediate_size": shared, "model_type": "granitemoeshared"}
        config["architectures"] = ["GraniteMoeSharedForCausalLM"]


def _olmoe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp does not divide the weights of the chosen experts by their sum."""
    llama_like(hparams, config)
    config["num_experts"] = expert_count(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["norm_topk_prob"] = False


def _unscaled(hparams: HParams, config: dict[str, Any]) -> None:
    """Refuse what the class does not know: groups of experts, a factor of their weights."""
    hparams.only("expert_group_count", config["n_group"], 1)
    hparams.only("expert_weights_scale", config["routed_scaling_factor"], 1.0)


def _without_groups(hparams: HParams, config: dict[str, Any]) -> None:
    """The experts of a class that knows no groups of them, and always divides their weights by the sum."""
    routed(hparams, config)
    hparams.only("expert_group_count", config["n_group"], 1)
    hparams.only("expert_weights_norm", config["norm_topk_prob"], True)


def _glm4_moe(hparams: HParams, config: dict[str, Any]) -> None:
    score(hparams, (SIGMOID,), SIGMOID)
    without_predictors(hparams, config)
    partly_rotated(hparams, config)
    config["attention_bias"] = biased(hparams)
    config["use_qk_norm"] = hparams.has("attn_q_norm.weight")
    routed(hparams, config)


def _dots1(hparams: HParams, config: dict[str, Any]) -> None:
    score(hparams, (SIGMOID,))
    attention_bias(hparams, config)
    routed(hparams, config)
    config["sliding_window"] = None


def _minimax_m2(hparams: HParams, config: dict[str, Any]) -> None:
    score(hparams, (SIGMOID,))
    partly_rotated(hparams, config)
    config["intermediate_size"] = hparams.count("expert_feed_forward_length")
    chosen_experts(hparams, config)


def _phimoe(hparams: HParams, config: dict[str, Any]) -> None:
    """The sparse mixer's jitter is transformers' default, as in the published model."""
    chosen_experts(hparams, config)
    attention_bias(hparams, config)
    optional_window(hparams, config)
    config["lm_head_bias"] = "output.bias" in hparams.header.tensors
    if config["rope_parameters"]["rope_type"] == "longrope":
        why = "the format has no keys for short_mscale and long_mscale, which phimoe's longrope needs"
        raise UnsupportedModel(f"{TABLES[1]}: {why}. Serve the model from safetensors.", param=TABLES[1])


def _dbrx(hparams: HParams, config: dict[str, Any]) -> None:
    """The fields of the class's nested configs. Its norms have one epsilon."""
    hparams.only(LAYER_NORM[0], config["layer_norm_eps"], 1e-5)
    config["attn_config"] = {
        "kv_n_heads": config["num_key_value_heads"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "clip_qkv": hparams.real("attention.clamp_kqv", 0.0) or None,
    }
    config["ffn_config"] = {
        "ffn_hidden_size": config["intermediate_size"],
        "moe_num_experts": expert_count(hparams),
        "moe_top_k": hparams.count("expert_used_count"),
    }


def _llama4(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp takes what the format has no key for from the published models: chunks of 8192, every fourth layer
    without rotation, its queries tuned; no norms of q and k in the one with 128 experts."""
    hparams.only("attention.sliding_window", hparams.get("attention.sliding_window", 8192), 8192)
    attention_bias(hparams, config)
    config |= {
        "intermediate_size": hparams.count("expert_feed_forward_length"),
        "intermediate_size_mlp": config["intermediate_size"],
        "num_local_experts": hparams.count("expert_count"),
        "num_experts_per_tok": hparams.count("expert_used_count"),
        "interleave_moe_layer_step": hparams.count("interleave_moe_layer_step"),
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "use_qk_norm": hparams.count("expert_count") != 128,
    }


def _ernie4_5_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """The width of the shared experts is that of their tensors; the converter's key for it is not always right."""
    hparams.get("expert_shared_feed_forward_length")
    routed(hparams, config)
    _unscaled(hparams, config)
    config |= {
        "use_bias": biased(hparams),
        "moe_layer_interval": hparams.count("interleave_moe_layer_step"),
        "moe_layer_end_index": -1,
    }


def _hunyuan_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """transformers' class has one width for all experts, and one shared expert."""
    width = hparams.count("expert_feed_forward_length", config["intermediate_size"])
    for key, wanted in (("expert_shared_feed_forward_length", width), ("expert_shared_count", 1)):
        hparams.only(key, hparams.count(key, wanted), wanted)
    attention_bias(hparams, config)
    config |= {"intermediate_size": width, "num_experts": expert_count(hparams)}
    config["moe_topk"] = hparams.count("expert_used_count")


def _afmoe(hparams: HParams, config: dict[str, Any]) -> None:
    """Embeddings are multiplied by the root of their width: llama.cpp has this in its code."""
    score(hparams, (SIGMOID,), SIGMOID)
    attention_bias(hparams, config)
    _without_groups(hparams, config)
    windows(hparams, config)
    config["mup_enabled"] = True


def _exaone_moe(hparams: HParams, config: dict[str, Any]) -> None:
    score(hparams, (SIGMOID,))
    without_predictors(hparams, config)
    routed(hparams, config)
    hparams.get("expert_shared_feed_forward_length")  # that of the tensors: a multiple of an expert's
    windows(hparams, config)


def _cohere2_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """The first, dense layers have a rotation even without a window; norms are of either kind."""
    without_predictors(hparams, config)
    attention_bias(hparams, config)
    for key in ("expert_shared_feed_forward_length", LAYER_NORM[0]):  # no effect beside that of RMS norms
        hparams.get(key)
    made = score(hparams, (SOFTMAX, SIGMOID), SIGMOID)
    routed(hparams, config)
    _unscaled(hparams, config)
    config |= {
        "expert_selection_fn": "softmax" if made == SOFTMAX else "sigmoid",
        "shared_expert_combination_strategy": "average",
        "prefix_dense_intermediate_size": config["intermediate_size"] if config["first_k_dense_replace"] else None,
        "prefix_dense_sliding_window_pattern": 1,
        "intermediate_size": config.pop("moe_intermediate_size"),
        "logit_scale": hparams.real("logit_scale"),
    }
    windows(hparams, config)


def _laguna(hparams: HParams, config: dict[str, Any]) -> None:
    """The number of query heads depends on the layer; full and windowed layers have a rotary table each."""
    score(hparams, (SIGMOID,), SIGMOID)
    _without_groups(hparams, config)
    attention_bias(hparams, config)
    layers, width, full = config["num_hidden_layers"], config["head_dim"], config["rope_parameters"]
    heads, gate = hparams.each("attention.head_count", layers), hparams.header.tensors.get("blk.0.attn_gate.weight")
    kv_heads, name = hparams.each("attention.head_count_kv", layers), "attention.head_count_kv"
    hparams.only(name, max(kv_heads), min(kv_heads))
    full["partial_rotary_factor"] = hparams.count("rope.dimension_count", width) / width
    config |= {"rope_parameters": {"full_attention": full}, "layer_types": ["full_attention"] * layers}
    if hparams.get("attention.sliding_window"):
        windows(hparams, config, full_first=True)
        config["rope_parameters"]["sliding_attention"] = {
            "rope_type": "default",
            "rope_theta": hparams.real("rope.freq_base_swa", full["rope_theta"]),
            "partial_rotary_factor": hparams.count("rope.dimension_count_swa", width) / width,
        }
    config |= {
        "num_attention_heads_per_layer": heads,
        "mlp_layer_types": [("dense", "sparse")[layer >= config["first_k_dense_replace"]] for layer in range(layers)],
        "shared_expert_intermediate_size": hparams.count("expert_shared_feed_forward_length"),
        "gating": "per-head" if gate is not None and gate.shape[0] == heads[0] else "per-element",
    }


def _gpt_oss(hparams: HParams, config: dict[str, Any]) -> None:
    """The borders of its yarn are not rounded, for which the format has no key."""
    config["sliding_window"] = hparams.count("attention.sliding_window")
    chosen_experts(hparams, config)
    config["intermediate_size"] = hparams.count("expert_feed_forward_length", config["intermediate_size"])
    config["attention_bias"] = biased(hparams)
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _MIXTRAL_BLOCK, chosen_experts, changes=INTERLEAVED)
_COHERE_MOE = Family(
    "cohere2_moe", "Cohere2MoeForCausalLM", _COHERE_BLOCK, _cohere2_moe, eps=LAYER_NORM, keys=_COHERE_KEYS
)
FAMILIES: Mapping[str, Family] = {
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN2_MOE_BLOCK, _qwen2_moe,
                       changes={"mlp.shared_expert_gate": ONE_ROW}),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE_BLOCK, _qwen3_moe),
    "glm4moe": Family("glm4_moe", "Glm4MoeForCausalLM", _GLM4_MOE_BLOCK, _glm4_moe, partial=True, whole=CORRECTION),
    "gpt-oss": Family("gpt_oss", "GptOssForCausalLM", _GPT_OSS_BLOCK, _gpt_oss,
                      whole={"attn_sinks.weight": "self_attn.sinks"}),
    "granitemoe": Family("granitemoe", "GraniteMoeForCausalLM", _GRANITE_MOE_BLOCK, _granite_moe,
                         changes={**INTERLEAVED, "shared_mlp.input_linear": STACKED}),
    "olmoe": Family("olmoe", "OlmoeForCausalLM", _QWEN3_MOE_BLOCK, _olmoe),
    "minimax-m2": Family("minimax_m2", "MiniMaxM2ForCausalLM", _MINIMAX_BLOCK, _minimax_m2, partial=True,
                         whole={"exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"}),
    "phimoe": Family("phimoe", "PhimoeForCausalLM", _MIXTRAL_BLOCK, _phimoe, keys={"head_dim": None}),
    "dbrx": Family("dbrx", "DbrxForCausalLM", _DBRX_BLOCK, _dbrx, eps=LAYER_NORM, layers="transformer.blocks.",
                   top={"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
                   keys=_DBRX_KEYS),
    "llama4": Family("llama4_text", "Llama4ForCausalLM", _LLAMA4_BLOCK, _llama4),
    "ernie4_5-moe": Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _ERNIE_BLOCK, _ernie4_5_moe, keys=_ERNIE_KEYS,
                           changes={"mlp.moe_statics": ONE_ROW},
                           whole={"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"}),
    "hunyuan-moe": Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", _HUNYUAN_BLOCK, _hunyuan_moe),
    "dots1": Family("dots1", "Dots1ForCausalLM", _DOTS_BLOCK, _dots1, whole=CORRECTION),
    "afmoe": Family("afmoe", "AfmoeForCausalLM", _AFMOE_BLOCK, _afmoe, keys=_AFMOE_KEYS,
                    whole={"exp_probs_b.bias": "mlp.expert_bias"}),
    "exaone-moe": Family("exaone_moe", "ExaoneMoeForCausalLM", _DOTS_BLOCK, _exaone_moe, keys=_NUMBERS,
                         whole={"exp_probs_b.bias": "mlp.e_score_correction_bias"}),
    "cohere2moe": replace(_COHERE_MOE, variant=with_key(RMS_NORM[0], replace(_COHERE_MOE, eps=RMS_NORM))),
    "laguna": Family("laguna", "LagunaForCausalLM", _LAGUNA_BLOCK, _laguna, partial=True, by_layer=True,
                     keys=_LAGUNA_KEYS, whole={"exp_probs_b.bias": "mlp.experts.e_score_correction_bias"}),
}  # fmt: skip
