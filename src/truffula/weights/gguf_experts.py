"""GGUF families with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truffula.errors import UnsupportedModel
from truffula.weights.gguf_changes import INTERLEAVED, ONE_ROW
from truffula.weights.gguf_families import (
    EXPERTS_BLOCK,
    GRANITE_EXPERTS,
    HEAD_NORMS_BLOCK,
    LLAMA_BLOCK,
    POST_NORM_BLOCK,
    QWEN3_BLOCK,
    SHARED_EXPERT,
    Family,
    chosen_experts,
    expert_count,
    granite,
    implied_head_dim,
    llama_like,
    without_predictions,
)
from truffula.weights.gguf_hparams import HParams

_QWEN2_MOE_BLOCK = {
    **LLAMA_BLOCK,
    **EXPERTS_BLOCK,
    **SHARED_EXPERT,
}
_QWEN3_MOE_BLOCK = {
    **QWEN3_BLOCK,
    **EXPERTS_BLOCK,
}
# Mixtral's files are of the architecture llama.
_MIXTRAL_BLOCK = {
    **LLAMA_BLOCK,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.w1",
    "ffn_up_exps": "block_sparse_moe.experts.w3",
    "ffn_down_exps": "block_sparse_moe.experts.w2",
}
_GRANITE_MOE_BLOCK = {**LLAMA_BLOCK, **GRANITE_EXPERTS}
_GLM4_MOE_BLOCK = {
    **HEAD_NORMS_BLOCK,
    **EXPERTS_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_GPT_OSS_BLOCK = {**POST_NORM_BLOCK, **EXPERTS_BLOCK, "ffn_gate_inp": "mlp.router"}


def _qwen2_moe(hparams: HParams, config: dict[str, Any]) -> None:
    _qwen3_moe(hparams, config)
    implied_head_dim(hparams, config)
    config["shared_expert_intermediate_size"] = hparams.count("expert_shared_feed_forward_length")
    config["norm_topk_prob"] = False


def _qwen3_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp divides the weights of the chosen experts by their sum: the format has no key for it here."""
    config["num_experts"] = expert_count(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["moe_intermediate_size"] = hparams.count("expert_feed_forward_length")
    config["norm_topk_prob"] = True
    if "blk.0.attn_q.bias" in hparams.header.tensors and config["model_type"] == "qwen3_moe":
        config["attention_bias"] = True


def _granite_moe(hparams: HParams, config: dict[str, Any]) -> None:
    granite(hparams, config)
    chosen_experts(hparams, config)


def _olmoe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp does not divide the weights of the chosen experts by their sum."""
    llama_like(hparams, config)
    config["num_experts"] = expert_count(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["norm_topk_prob"] = False


def _glm4_moe(hparams: HParams, config: dict[str, Any]) -> None:
    tensors, name = hparams.header.tensors, hparams.name("expert_gating_func")
    if hparams.get("expert_gating_func", 2) != 2:
        raise UnsupportedModel(
            f"{name} is {hparams.get('expert_gating_func')}; only 2, sigmoid, is supported.", param=name
        )
    without_predictions(hparams, config)
    config["num_nextn_predict_layers"] = 0
    rotated = hparams.count("rope.dimension_count", config["head_dim"])
    config["rope_parameters"]["partial_rotary_factor"] = rotated / config["head_dim"]
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    dense, shared = hparams.get("leading_dense_block_count", 0), hparams.get("expert_shared_count", 0)
    config |= {
        "first_k_dense_replace": hparams.count("leading_dense_block_count") if dense else 0,
        "n_routed_experts": hparams.count("expert_count"),
        "num_experts_per_tok": hparams.count("expert_used_count"),
        "n_shared_experts": hparams.count("expert_shared_count") if shared else 0,
        "moe_intermediate_size": hparams.count("expert_feed_forward_length"),
        "n_group": hparams.count("expert_group_count", 1),
        "topk_group": hparams.count("expert_group_used_count", 1),
        "norm_topk_prob": bool(hparams.get("expert_weights_norm", False)),
        "routed_scaling_factor": hparams.real("expert_weights_scale", 1.0),
    }


def _gpt_oss(hparams: HParams, config: dict[str, Any]) -> None:
    """The borders of its yarn are not rounded, for which the format has no key."""
    config["sliding_window"] = hparams.count("attention.sliding_window")
    config["num_local_experts"] = expert_count(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["intermediate_size"] = hparams.count("expert_feed_forward_length", config["intermediate_size"])
    config["attention_bias"] = "blk.0.attn_q.bias" in hparams.header.tensors
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _MIXTRAL_BLOCK, chosen_experts, changes=INTERLEAVED)


FAMILIES: Mapping[str, Family] = {
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN2_MOE_BLOCK, _qwen2_moe,
                       changes={"mlp.shared_expert_gate": ONE_ROW}),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE_BLOCK, _qwen3_moe),
    "glm4moe": Family("glm4_moe", "Glm4MoeForCausalLM", _GLM4_MOE_BLOCK, _glm4_moe, partial=True,
                      whole={"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}),
    "gpt-oss": Family("gpt_oss", "GptOssForCausalLM", _GPT_OSS_BLOCK, _gpt_oss,
                      whole={"attn_sinks.weight": "self_attn.sinks"}),
    "granitemoe": Family("granitemoe", "GraniteMoeForCausalLM", _GRANITE_MOE_BLOCK, _granite_moe, changes=INTERLEAVED),
    "olmoe": Family("olmoe", "OlmoeForCausalLM", _QWEN3_MOE_BLOCK, _olmoe),
}  # fmt: skip
