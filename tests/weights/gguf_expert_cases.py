"""Cases of GGUF files of families with experts and with latent attention, by names of models."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from gguf_pairs import Case, Convert, Tensors, interleaved, stacked

SLIDING, FULL = "sliding_attention", "full_attention"
THETA: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 6}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 6}
WINDOWS = {"attention.sliding_window": 6, "attention.sliding_window_pattern": [True, False, True]}
ROUTED = {
    "expert_group_count": 1, "expert_group_used_count": 1, "leading_dense_block_count": 1,
    "expert_feed_forward_length": 24, "expert_shared_count": 2, "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
}  # fmt: skip
SIGMOID = {"expert_gating_func": 2}
INDEXER = {"attention.indexer.head_count": 2, "attention.indexer.key_length": 8, "attention.indexer.top_k": 64}
ALONE = {"num_nextn_predict_layers": 0}


def apart(tensors: Tensors, mixer: Any) -> Tensors:
    """Gate and up of all experts apart; of latent attention, keys and values, the keys turned."""
    made: Tensors = {}
    for name, array in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(array, 2, axis=1)
            made |= {name.replace("gate_up", "gate") + ".weight": gate, name.replace("gate_up", "up") + ".weight": up}
        elif name.endswith("kv_b_proj.weight"):
            heads = array.reshape(mixer.heads, -1, mixer.rank)
            made[name.replace("kv_b", "k_b")] = heads[:, : mixer.nope].swapaxes(1, 2)
            made[name.replace("kv_b", "v_b")] = heads[:, mixer.nope :]
        else:
            made[f"{name}.weight" if name.endswith("experts.down_proj") else name] = array
    return made


def named(tensors: Tensors, _: Any) -> Tensors:
    """Under the names that the converter looks up."""
    made = {}
    for name, array in tensors.items():
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        name = name.replace("mlp.expert_bias", "mlp.expert_bias.bias").replace("experts.e_score", "gate.e_score")
        made[re.sub(r"^model\.layers\.(\d+)\.self_attn\.g_proj", r"blk.\1.attn_gate", name)] = array
    return made


def turned(tensors: Tensors, _: Any) -> Tensors:
    """Llama 4's matrices of experts, which are stored by columns."""
    return {name: array.swapaxes(1, 2) if ".experts." in name else array for name, array in tensors.items()}


def fused(tensors: Tensors, _: Any) -> Tensors:
    """Mistral 4's gate and up stay together."""
    return {f"{name}.weight" if name.endswith("experts.gate_up_proj") else name: v for name, v in tensors.items()}


def flat(tensors: Tensors, _: Any) -> Tensors:
    """DBRX's experts, one below another, are stored as a stack."""
    made: Tensors = {}
    for name, array in tensors.items():
        whole = array.reshape(5, 17, -1) if "experts.mlp" in name else array
        key = f"{name}.weight" if "experts.mlp" in name else name
        made[key] = whole.swapaxes(1, 2) if name.endswith("mlp.w2") else whole
    return made


def shared_apart(tensors: Tensors, _: Any) -> Tensors:
    """Gate and up of Granite's shared expert."""
    made: Tensors = {}
    for name, array in tensors.items():
        root = name.replace("shared_mlp.input_linear", "mlp.shared_expert.{}_proj")
        if root != name:
            made[root.format("gate")], made[root.format("up")] = np.split(array, 2)
        else:
            made[name.replace("shared_mlp.output_linear", "mlp.shared_expert.down_proj")] = array
    return made


AS_CONVERTED: tuple[Convert, ...] = (stacked, apart, named)
_CASES: dict[str, Case] = {
    "DeepSeek V3": Case(
        "deepseek2", "deepseek_v3",
        {**ALONE, "n_group": 2, "topk_group": 1, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {**ROUTED, **SIGMOID, **YARN_KEYS, "expert_group_count": 2, "rope.scaling.yarn_log_multiplier": 0.1},
    ),
    "DeepSeek V2": Case(
        "deepseek2", "deepseek_v2",
        {**ALONE, "n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy",
         "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        {**ROUTED, **YARN_KEYS, "expert_gating_func": 1, "expert_group_count": 3,
         "expert_group_used_count": 2, "expert_weights_scale": 1.0, "expert_weights_norm": None,
         "rope.scaling.yarn_log_multiplier": 0.0707},
    ),
    "DeepSeek V2 Lite": Case(
        "deepseek2", "deepseek_v2", {**ALONE, "q_lora_rank": None, "routed_scaling_factor": 1.0},
        {**ROUTED, "expert_weights_scale": None, "expert_weights_norm": None},
    ),
    "GLM-4.7-Flash": Case(
        "deepseek2", "glm4_moe_lite", {**ALONE}, {**ROUTED, "expert_weights_scale": 1.8}
    ),
    "Youtu": Case(
        "deepseek2", "youtu", {},
        {"expert_feed_forward_length": 56, "expert_shared_count": 0, "leading_dense_block_count": 3},
    ),
    "Mistral Large 3": Case(
        "deepseek2", "mistral4", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3, "mscale": 1.0,
                                                      "mscale_all_dim": 1.0}},
        {**ROUTED, **YARN_KEYS, "leading_dense_block_count": 0, "expert_weights_scale": 1.0,
         "expert_gating_func": 1, "attention.temperature_scale": 0.3, "attention.temperature_length": 6,
         "rope.scaling.yarn_log_multiplier": 0.1},
    ),
    "Mistral 4": Case(
        "mistral4", "mistral4", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
        {**ROUTED, **YARN_KEYS, "leading_dense_block_count": 0, "expert_weights_scale": 1.0},
        (fused,),
    ),
    "DeepSeek V3.2": Case("deepseek32", "deepseek_v32", {**ALONE}, {**ROUTED, **SIGMOID, **INDEXER}),
    "GLM-5": Case(
        "glm-dsa", "glm_moe_dsa", {**ALONE},
        {**ROUTED, **SIGMOID, **INDEXER, "attention.indexer.types": [True, False, True]},
    ),
    "MiniMax M2": Case(
        "minimax-m2", "minimax_m2", {}, {**SIGMOID, "rope.dimension_count": 6, "expert_feed_forward_length": 24}
    ),
    "Llama 4": Case(
        "llama4", "llama4_text",
        {"attention_chunk_size": 8192, "floor_scale": 8192, "no_rope_layer_interval": 4, "num_hidden_layers": 5,
         "interleave_moe_layer_step": 2},
        {"feed_forward_length": 40, "expert_feed_forward_length": 24, "interleave_moe_layer_step": 2, "expert_count": 5,
         "expert_used_count": 1, "rope.dimension_count": 8},
        (turned,),
    ),
    "ERNIE 4.5": Case(
        "ernie4_5-moe", "ernie4_5_moe", {},
        {"leading_dense_block_count": 1, "interleave_moe_layer_step": 1, "expert_feed_forward_length": 24,
         "expert_shared_count": 2, "expert_shared_feed_forward_length": 28},
    ),
    "Hunyuan A13B": Case(
        "hunyuan-moe", "hunyuan_v1_moe", {},
        {"expert_feed_forward_length": 24, "expert_shared_feed_forward_length": 24, "expert_shared_count": 1},
    ),
    "dots.llm1": Case(
        "dots1", "dots1", {}, {**ROUTED, **SIGMOID, "expert_group_count": 4, "expert_group_used_count": 2,
                               "expert_weights_scale": 1.0, "expert_weights_norm": False},
    ),
    "Phi-3.5-MoE": Case(
        "phimoe", "phimoe", {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.01},
        {"attention.sliding_window": 0, "rope.dimension_count": 8},
    ),
    "Trinity": Case(
        "afmoe", "afmoe", {"num_hidden_layers": 5, "global_attn_every_n_layers": 4},
        {**ROUTED, **SIGMOID, "attention.sliding_window": 6, "expert_weights_scale": 1.7, "rope.dimension_count": 8},
    ),
    "K-EXAONE": Case(
        "exaone-moe", "exaone_moe", {**ALONE, "layer_types": [SLIDING, FULL, SLIDING]},
        {**ROUTED, **SIGMOID, **WINDOWS, "expert_shared_count": 1, "expert_shared_feed_forward_length": 24,
         "nextn_predict_layers": 0, "rope.scaling.type": "none"},
    ),
    "Command (MoE)": Case(
        "cohere2moe", "cohere2_moe",
        {**ALONE, "layer_types": [FULL, FULL, SLIDING], "num_shared_experts": 2, "first_k_dense_replace": 1,
         "prefix_dense_intermediate_size": 40},
        {**WINDOWS, "attention.sliding_window_pattern": [False, False, True], "attention.layer_norm_rms_epsilon": None,
         "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.4, "feed_forward_length": 40,
         "expert_feed_forward_length": 56, "leading_dense_block_count": 1, "expert_weights_norm": True,
         "expert_shared_count": 2, "expert_shared_feed_forward_length": 112, "expert_gating_func": 1,
         "rope.scaling.type": "none", "rope.dimension_count": 8},
    ),
    "Command (MoE), RMS norms": Case(
        "cohere2moe", "cohere2_moe",
        {**ALONE, "layer_types": [SLIDING, FULL, SLIDING], "rms_norm_eps": 1e-6, "expert_selection_fn": "sigmoid",
         "norm_topk_prob": False},
        {**WINDOWS, "feed_forward_length": None, "attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.4,
         "attention.layer_norm_rms_epsilon": 1e-6, "expert_feed_forward_length": 56, "leading_dense_block_count": 0,
         "expert_weights_norm": False, "rope.scaling.type": "none"},
    ),
    "Laguna XS": Case(
        "laguna", "laguna",
        {"mlp_layer_types": ["dense", "sparse", "sparse"], "gating": True, "moe_routed_scaling_factor": 1.5,
         "rope_parameters": {FULL: {**YARN, "partial_rotary_factor": 0.6}, SLIDING: {**THETA, "rope_theta": 2e3}}},
        {**ROUTED, **SIGMOID, **YARN_KEYS, "attention.head_count": [4, 6, 2], "attention.sliding_window": 7,
         "rope.freq_base_swa": 2e3, "expert_feed_forward_length": 9, "expert_shared_feed_forward_length": 11,
         "expert_weights_scale": 1.5, "expert_shared_count": None, "rope.dimension_count": 6,
         "rope.dimension_count_swa": 10},
    ),
    "Laguna M": Case(
        "laguna", "laguna",
        {"mlp_layer_types": ["dense", "sparse", "sparse"], "gating": "per-element", "layer_types": [FULL] * 3,
         "num_attention_heads_per_layer": [4, 4, 4], "sliding_window": 512, "moe_routed_scaling_factor": 1.5,
         "rope_parameters": {FULL: {**THETA, "partial_rotary_factor": 1.0}}},
        {**ROUTED, "attention.head_count": [4, 4, 4], "expert_feed_forward_length": 9, "expert_weights_scale": 1.5,
         "expert_shared_feed_forward_length": 11, "expert_shared_count": None, "rope.dimension_count": 10},
    ),
    "DBRX": Case(
        "dbrx", "dbrx", {"rope_parameters": {**THETA, "rope_theta": 5e3}},
        {"attention.clamp_kqv": 2.0, "rope.freq_base": 5e3, "attention.layer_norm_rms_epsilon": None,
         "attention.layer_norm_epsilon": 1e-5, "attention.key_length": None, "attention.value_length": None,
         "feed_forward_length": 17},
        (flat,),
    ),
    "Granite 3 (shared)": Case(
        "granitemoe", "granitemoeshared", {},
        {"attention.scale": 0.3, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0,
         "expert_shared_feed_forward_length": 20, "rope.dimension_count": 8},
        (interleaved, shared_apart,),
    ),
}  # fmt: skip
CASES = {name: replace(case, convert=(*case.convert, *AS_CONVERTED)) for name, case in _CASES.items()}
