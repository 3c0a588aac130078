"""Tiny models of the dense and older families, as llama.cpp's converter writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf_pairs import VOCAB, Case, Tensors, each, interleaved

from truffula.testing.files import Array

LAYER_EPS = {"attention.layer_norm_epsilon": 1e-5}
NO_WIDTH = {"attention.key_length": None, "attention.value_length": None}
NO_ROPE = {"rope.freq_base": None}
OLDER = {**LAYER_EPS, **NO_WIDTH, **NO_ROPE}
ORIGINAL = "rope.scaling.original_context_length"
SLIDING, FULL = "sliding_attention", "full_attention"
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.25, 3.1],
            "long_factor": [1.0, 4.0, 7.3, 9.0]}  # fmt: skip
LONG_TENSORS = {
    f"rope_factors_{name}.weight": np.array(LONGROPE[f"{name}_factor"], np.float32) for name in ("short", "long")
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, ORIGINAL: 128}


@each
def shifted(name: str, array: Array, _: Any) -> Array:
    """Norms as 1 + weight."""
    return array + np.float32(1) if name.endswith("norm.weight") else array


@each
def turned(name: str, array: Array, _: Any) -> Array:
    """GPT-2's matrices as [out, in]."""
    return array.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else array


@each
def flat(name: str, array: Array, mixer: Any) -> Array:
    """All q, all k, then all v, instead of those of each head or group."""
    if "query_key_value" not in name:
        return array
    groups = array.reshape(mixer.kv_heads, mixer.heads // mixer.kv_heads + 2, mixer.head_dim, *array.shape[1:])
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])


def muse(tensors: Tensors, mixer: Any) -> Tensors:
    """Muse Glimmer's layers in a text model, its factor of q as a norm, and 1 + weight of the norms of layers."""
    made = {}
    for name, array in tensors.items():
        name = name.replace("model.language_model.", "model.").replace("lm_head", "output")
        layer = name.split(".")[2] if ".layers." in name else ""
        if name.endswith("self_attn.gate_proj.weight"):
            name = f"blk.{layer}.attn_gate.weight"
        if name.endswith("self_attn.q_proj.weight"):
            made[f"blk.{layer}.attn_q_norm.weight"] = np.full(mixer.head_dim, 3.87, np.float32)
            made[f"blk.{layer}.attn_k_norm.weight"] = np.ones(mixer.head_dim, np.float32)
        made[name] = array + np.float32(1) if name.endswith("layernorm.weight") else array
    return made


def bare(tensors: Tensors, _: Any) -> Tensors:
    return {name.removeprefix("transformer."): array for name, array in tensors.items()}


def joined_norms(tensors: Tensors, mixer: Any) -> Tensors:
    """StableLM's norms of heads, one below another."""
    made: Tensors = {}
    for name, array in tensors.items():
        root, own, _ = name.partition(".norms.")
        whole = f"{root}.weight" if own else name
        made[whole] = np.stack([*made.get(whole, []), array]) if own else array
    return made


def without_xielu(tensors: Tensors, _: Any) -> Tensors:
    return {name: array for name, array in tensors.items() if ".act_fn." not in name}


def gemma4_names(tensors: Tensors, _: Any) -> Tensors:
    """Names that the converter maps itself."""
    made = {}
    for name, array in tensors.items():
        layer = [*name.split("."), "", ""][2]
        if name.endswith("router.scale"):
            name = f"blk.{layer}.ffn_gate_inp.scale"
        elif name.endswith("router.per_expert_scale"):
            name = f"blk.{layer}.ffn_down_exps.scale"
        elif name.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj")):
            name = f"{name}.weight"
        made[name] = array
    return made


def xielu(name: str) -> Any:
    """The metadata of an activation: a number of each layer."""
    return lambda tensors: [float(tensors[f"model.layers.{layer}.mlp.act_fn.{name}"].reshape(())) for layer in range(3)]


GEMMA4 = {
    "attention.layer_norm_rms_epsilon": 0.5, "attention.key_length_swa": 10, "attention.value_length_swa": 10,
    "attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16,
    "rope.dimension_count_swa": 10, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 7,
    "attention.sliding_window_pattern": [True, False, True, True, False], "attention.shared_kv_layers": 2,
    "embedding_length_per_layer_input": 6,
}  # fmt: skip
GEMMA4_ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
ROTATED_QUARTER = {"rope_freqs.weight": np.array([1.0] * 2 + [1e30] * 6, np.float32)}
GEMMA4_CASES = [
    Case("gemma4", "gemma4_text", {"rope_parameters": GEMMA4_ROPES}, GEMMA4, (gemma4_names,), ROTATED_QUARTER),
    Case("gemma4", "gemma4_text",
         {"rope_parameters": GEMMA4_ROPES, "use_double_wide_mlp": True, "num_key_value_heads": 1,
          "num_kv_shared_layers": 3, "attention_bias": True},
         {**GEMMA4, "feed_forward_length": [56, 56, 112, 112, 112], "attention.shared_kv_layers": 3},
         (gemma4_names,), ROTATED_QUARTER),
    Case("gemma4", "gemma4_text",
         {"rope_parameters": GEMMA4_ROPES, "tie_word_embeddings": False, "enable_moe_block": True, "num_experts": 5,
          "top_k_experts": 2, "moe_intermediate_size": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
          "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 1.5},
         {**GEMMA4, "attention.head_count_kv": [2, 1, 2, 2, 1], "attention.shared_kv_layers": 0,
          "embedding_length_per_layer_input": 0, "final_logit_softcapping": 1.5, "expert_count": 5,
          "expert_used_count": 2, "expert_feed_forward_length": 32},
         (gemma4_names,), ROTATED_QUARTER),
]  # fmt: skip
MUSE = {"attention.sliding_window": 7, "attention.sliding_window_pattern": [False, True, True, True, False],
        "logit_scale": 0.4, "final_logit_softcapping": 1.5, "feed_forward_length": 56}  # fmt: skip
PHI3 = {**NO_WIDTH, "rope.dimension_count": 8, "attention.sliding_window": 7, ORIGINAL: 512}
XIELU = {f" xielu.{name}": xielu(name) for name in ("alpha_n", "alpha_p", "beta", "eps")}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
OLD_ROPE = {"rope_parameters": ""}
CASES = [
    *GEMMA4_CASES,
    Case("muse-glimmer", "muse_glimmer",
         {"num_hidden_layers": 5, "qk_scale_factor": 3.87, "output_multiplier": 0.4, "final_logit_softcapping": 1.5,
          "rms_norm_eps": 1e-5}, MUSE, (interleaved, muse)),
    Case("gemma", "gemma", {}, NO_ROPE, (shifted,)),
    Case("phi3", "phi3", {"original_max_position_embeddings": 512}, PHI3),
    Case("phi3", "phi3",
         {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5}, "num_attention_heads": 2,
          "original_max_position_embeddings": 16, "sliding_window": None, "tie_word_embeddings": True},
         {**PHI3, "attention.sliding_window": 0, ORIGINAL: 16,
          "rope.scaling.attn_factor": 1.5}, tensors=LONG_TENSORS),
    Case("phi3", "phi3",
         {"rope_parameters": {**LONGROPE, "attention_factor": 1.3}, "original_max_position_embeddings": 16},
         {**PHI3, ORIGINAL: 16, "rope.scaling.type": "longrope",
          "rope.scaling.attn_factor": 1.3}, tensors=LONG_TENSORS),
    Case("starcoder2", "starcoder2", {"sliding_window": None}, {**LAYER_EPS, **NO_WIDTH}),
    Case("phi2", "phi", {"num_key_value_heads": 4}, {**OLDER, "rope.dimension_count": 4}),
    Case("mistral3", "ministral3",
         {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}},
         {**YARN_KEYS, "vocab_size": VOCAB, "rope.dimension_count": 10, "rope.scaling.yarn_log_multiplier": 1.0,
          "attention.temperature_scale": 0.3}, (interleaved,)),
    Case("mistral3", "mistral", {"sliding_window": None}, {"vocab_size": VOCAB, "rope.dimension_count": 8},
         (interleaved,)),
    Case("stablelm", "stablelm", {}, {**OLDER, "rope.dimension_count": 4, "use_parallel_residual": True}),
    Case("stablelm", "stablelm",
         {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True, "tie_word_embeddings": True},
         {**OLDER, "rope.dimension_count": 4, "use_parallel_residual": True}, (joined_norms,)),
    Case("glm4", "glm4", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
         {**YARN_KEYS, "rope.dimension_count": 6}),
    Case("chatglm", "glm", {"head_dim": 8, "attention_bias": False}, {**NO_WIDTH, "rope.dimension_count": 4}),
    Case("nemotron", "nemotron",
         {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4,
                                             "partial_rotary_factor": 0.5}},
         {**LAYER_EPS, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": VOCAB, "rope.dimension_count": 4,
          "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, (shifted,)),
    Case("nemotron", "nemotron", {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
         {**LAYER_EPS, "rope.dimension_count": 4, "rope.scaling.type": "none"}, (shifted,)),
    Case("exaone4", "exaone4", {"layer_types": [FULL, SLIDING, FULL]},
         {"attention.sliding_window": 7, "attention.sliding_window_pattern": [False, True, False],
          "vocab_size": VOCAB}),
    Case("exaone4", "exaone4", {"sliding_window": None, "layer_types": [FULL] * 3}),
    Case("ernie4_5", "ernie4_5", {"use_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
         {"rope.freq_base": 5e5}),
    Case("hunyuan-dense", "hunyuan_v1_dense",
         {"head_dim": 8, "max_position_embeddings": 262144,
          "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 1e4}},
         {"rope.freq_base": 1e4 * 50 ** (8 / 6), "rope.scaling.type": "none", "rope.scaling.factor": 1.0,
          ORIGINAL: 262144, "expert_count": 1, "expert_used_count": 1}),
    Case("arcee", "arcee", {"mlp_bias": True}, {"vocab_size": VOCAB, "rope.dimension_count": 8}, (interleaved,)),
    Case("apertus", "apertus", {},
         {"rope.dimension_count": 10, **XIELU}, (without_xielu,)),
    Case("olmo", "olmo", {"clip_qkv": 0.5}, {**LAYER_EPS, **NO_WIDTH, "attention.clamp_kqv": 0.5}, (interleaved,)),
    Case("gpt2", "gpt2", {**OLD_ROPE, "n_inner": 128}, {**OLDER, "attention.head_count_kv": None}, (turned,)),
    Case("starcoder", "gpt_bigcode", {**OLD_ROPE, "tie_word_embeddings": False, "n_inner": 128}, OLDER),
    Case("gptneox", "gpt_neox",
         {"rotary_pct": "", "rope_parameters": HALF},
         {**OLDER, "attention.head_count_kv": None, "rope.dimension_count": 4, "use_parallel_residual": True}, (flat,)),
    Case("gptneox", "gpt_neox", {"rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False},
         {**OLDER, "rope.dimension_count": 8, "use_parallel_residual": False}, (flat,)),
    Case("bloom", "bloom", {**OLD_ROPE, "tie_word_embeddings": False}, OLDER, (flat, bare)),
    Case("falcon", "falcon", {"ffn_hidden_size": 128}, {**OLDER, "tensor_data_layout": "jploski"}, (flat,)),
    Case("falcon", "falcon", {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2}, OLDER,
         (flat,)),
    Case("falcon", "falcon",
         {"ffn_hidden_size": 128, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
         OLDER, (flat,)),
    Case("mpt", "mpt", {**OLD_ROPE, "attn_config": {"clip_qkv": 0.5}},
         {**OLDER, "attention.clamp_kqv": 0.5, "attention.max_alibi_bias": 8.0}),
]  # fmt: skip
