"""GGUF families with short convolutions (LFM2) or linear attention (Qwen3-Next and 3.5, Kimi Linear) in most layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from truffula.weights.gguf.changes import (
    ABSORBED,
    CONV,
    LESS_ONE,
    ONE_ROW,
    Change,
    Config,
    Order,
    grouped,
    joined,
    less_one,
    log_of_minus,
)
from truffula.weights.gguf.families import (
    BLOCK,
    EXPERTS_BLOCK,
    HEAD_NORMS_BLOCK,
    LATENT_BLOCK,
    RMS_NORM,
    SHARED_EXPERT,
    SIGMOID,
    Family,
    experts,
    experts_block,
    implied_head_dim,
    partly_rotated,
    routed,
    score,
    shared_block,
    without_predictors,
)
from truffula.weights.gguf.hparams import HParams

_LFM2_BLOCK = {
    **BLOCK, "attn_norm": "operator_norm", "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm", "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj", "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
}  # fmt: skip
_LFM2_MOE_BLOCK = {
    **_LFM2_BLOCK, "ffn_gate_inp": "feed_forward.gate", **experts_block("feed_forward.experts", "w1", "w2", "w3"),
}  # fmt: skip
_LINEAR = {
    **HEAD_NORMS_BLOCK, "post_attention_norm": "post_attention_layernorm", "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj",
}  # fmt: skip
_LINEAR_WHOLE = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
_QWEN35_BLOCK = {
    **_LINEAR, "attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a", "ssm_beta": "linear_attn.in_proj_b",
}  # fmt: skip
# Older files have all of in_proj_qkvz as ssm_in.
_QWEN3_NEXT_BLOCK = {
    **_LINEAR, **EXPERTS_BLOCK, **SHARED_EXPERT, "ssm_in": "linear_attn.in_proj_qkvz",
    "attn_qkv": "linear_attn.in_proj_qkvz", "attn_gate": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
}  # fmt: skip
_KIMI_BLOCK = {
    **LATENT_BLOCK, **{f"ssm_conv1d_{name}": f"self_attn.{name}_conv1d" for name in "qkv"},
    **{f"ssm_{name}": f"self_attn.{name}_proj" for name in ("f_a", "f_b", "g_a", "g_b")},
    "ssm_beta": "self_attn.b_proj", "ssm_norm": "self_attn.o_norm", "ffn_gate_inp": "block_sparse_moe.gate",
    **experts_block("block_sparse_moe.experts", "w1", "w2", "w3"), **shared_block("block_sparse_moe.shared_experts"),
}  # fmt: skip


# Orders of rows. llama.cpp stores the value heads of Qwen3.5 so that those of one key head are far from each other.


def _value_heads(config: Config, n: int) -> Order:
    keys = config["linear_num_key_heads"]
    return grouped(keys, config["linear_num_value_heads"] // keys)


def _of_values(config: Config, n: int) -> Order:
    """Of q, k and v, of which the heads of v are in another order."""
    before, width = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"], config["linear_value_head_dim"]
    if before + config["linear_num_value_heads"] * width != n:
        raise ValueError
    heads = _value_heads(config, n)[:, None] * width + np.arange(width)
    return np.concatenate([np.arange(before), before + heads.reshape(-1)])


def _by_key_head(config: Config, n: int) -> Order:
    """q, k, v and the gate of a key head together, of rows stored as the gate, q, k and v of all."""
    keys, dim = config["linear_num_key_heads"], config["linear_key_head_dim"]
    share = config["linear_num_value_heads"] // keys * config["linear_value_head_dim"]
    if 2 * keys * (dim + share) != n:
        raise ValueError
    starts = (keys * share, dim), (keys * (share + dim), dim), (keys * (share + 2 * dim), share), (0, share)
    return np.concatenate([start + np.arange(keys * width).reshape(keys, -1) for start, width in starts], 1).reshape(-1)


_RATE = Change(values=log_of_minus)
_DELTA_NORMS = {name: LESS_ONE for name in less_one(_LINEAR) if not name.startswith("linear_attn.norm")}
_QWEN35_CHANGES = {
    **_DELTA_NORMS, "mlp.shared_expert_gate": ONE_ROW, "linear_attn.conv1d": replace(CONV, rows=_of_values),
    "linear_attn.in_proj_qkv": Change(rows=_of_values),
    **{f"linear_attn.{name}": Change(rows=_value_heads) for name in ("in_proj_z", "in_proj_a", "in_proj_b", "dt_bias")},
    "linear_attn.A_log": replace(_RATE, rows=_value_heads), "linear_attn.out_proj": Change(columns=_value_heads),
}  # fmt: skip
_QWEN3_NEXT_CHANGES = {
    **_DELTA_NORMS, "mlp.shared_expert_gate": ONE_ROW, "linear_attn.conv1d": CONV,
    "linear_attn.in_proj_qkvz": joined(_by_key_head), "linear_attn.A_log": _RATE,
}  # fmt: skip
_KIMI_CHANGES = {
    "self_attn.kv_b_proj": replace(ABSORBED, joins=True),
    **{f"self_attn.{name}_conv1d": CONV for name in "qkv"},
    "self_attn.A_log": Change(lambda config, shape: (1, 1, math.prod(shape), 1), values=log_of_minus),
}


def _lfm2(hparams: HParams, config: dict[str, Any]) -> None:
    """Layers without KV heads have a convolution. The width of the MLP is the adjusted one."""
    config["layer_types"] = ["full_attention" if attends else "conv" for attends in hparams.attends()]
    config["conv_L_cache"] = hparams.count("shortconv.l_cache")
    if config["model_type"] == "lfm2":
        config["block_auto_adjust_ff_dim"] = False
    implied_head_dim(hparams, config)


def _lfm2_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """The weights of a row's experts are divided by their sum."""
    _lfm2(hparams, config)
    score(hparams, (SIGMOID,), SIGMOID)
    experts(hparams, config)
    config |= {
        "num_dense_layers": hparams.optional("leading_dense_block_count"),
        "routed_scaling_factor": hparams.real("expert_weights_scale", 1.0),
        "norm_topk_prob": True,
        "use_expert_bias": hparams.has("exp_probs_b.bias"),
    }


def _qwen35(hparams: HParams, config: dict[str, Any]) -> None:
    """``rope.dimension_sections`` are of images: the three positions of a token of text are equal."""
    hparams.get("rope.dimension_sections")
    without_predictors(hparams, config)
    config |= {
        "linear_num_value_heads": hparams.count("ssm.time_step_rank"),
        "linear_num_key_heads": hparams.count("ssm.group_count"),
        "linear_key_head_dim": hparams.count("ssm.state_size"),
        "linear_value_head_dim": hparams.quotient("ssm.inner_size", "ssm.time_step_rank"),
        "linear_conv_kernel_dim": hparams.count("ssm.conv_kernel"),
        "attention_bias": hparams.has("attn_q.bias"),
    }
    partly_rotated(hparams, config)
    layers, interval = config["num_hidden_layers"], hparams.count("full_attention_interval", 4)
    recurrent = [(index + 1) % interval != 0 for index in range(layers)]
    if hparams.get("attention.recurrent_layers") is not None:
        recurrent = hparams.listed("attention.recurrent_layers", bool)[:layers]
    config["layer_types"] = ["linear_attention" if found else "full_attention" for found in recurrent]


def _qwen35_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp divides the weights of the chosen experts by their sum: the format has no key for it here."""
    _qwen35(hparams, config)
    experts(hparams, config)
    config["shared_expert_intermediate_size"] = hparams.count("expert_shared_feed_forward_length")
    if config["model_type"] == "qwen3_next":
        config["norm_topk_prob"] = True


def _kimi_linear(hparams: HParams, config: dict[str, Any]) -> None:
    """Layers without KV heads have linear attention, of as many heads. Nothing is rotated.

    Latents are written as the one KV head of these layers; the widths of their heads are under further keys.
    """
    score(hparams, (SIGMOID,), SIGMOID)
    routed(hparams, config)
    heads, rank, rope = config["num_attention_heads"], hparams.count("attention.kv_lora_rank"), config["head_dim"]
    hparams.only("attention.key_length", hparams.count("attention.key_length", rank + rope), rank + rope)
    hparams.get("attention.value_length")  # of no head
    key = hparams.count("attention.key_length_mla")
    if key <= rope:
        why = f"is {key}; expected more than rope.dimension_count, {rope}."
        raise hparams.error("attention.key_length_mla", why)
    queries = hparams.has("attn_q_a.weight")
    config |= {
        "num_key_value_heads": heads,
        "kv_lora_rank": rank,
        "q_lora_rank": hparams.count("attention.q_lora_rank") if queries else None,
        "qk_nope_head_dim": key - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": hparams.count("attention.value_length_mla"),
        "linear_attn_config": {
            "full_attn_layers": [index + 1 for index, attends in enumerate(hparams.attends()) if attends],
            "head_dim": hparams.count("kda.head_dim"),
            "num_heads": heads,
            "short_conv_kernel_size": hparams.count("ssm.conv_kernel"),
        },
        "norm_topk_prob": True,
    }


_KIMI_KEYS = {
    "n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_token", "n_group": "num_expert_group",
    "n_shared_experts": "num_shared_experts", "norm_topk_prob": "moe_renormalize", "rope_parameters": None,
    "head_dim": None,
}  # fmt: skip
_NO_PREDICTIONS = {"num_nextn_predict_layers": None}
_NORM_EPS = (RMS_NORM[0], "norm_eps")
_LFM2_NORM = {"token_embd_norm.weight": "model.embedding_norm.weight"}
FAMILIES: Mapping[str, Family] = {
    "lfm2": Family("lfm2", "Lfm2ForCausalLM", _LFM2_BLOCK, _lfm2, eps=_NORM_EPS, changes={"conv.conv": CONV},
                   whole=_LFM2_NORM),
    "lfm2moe": Family("lfm2_moe", "Lfm2MoeForCausalLM", _LFM2_MOE_BLOCK, _lfm2_moe, eps=_NORM_EPS,
                      changes={"conv.conv": CONV},
                      whole={**_LFM2_NORM, "exp_probs_b.bias": "feed_forward.expert_bias"}),
    "qwen35": Family("qwen3_5_text", "Qwen3_5ForCausalLM", _QWEN35_BLOCK, _qwen35, changes=_QWEN35_CHANGES,
                     whole=_LINEAR_WHOLE, keys=_NO_PREDICTIONS, partial=True, factors=False),
    "qwen35moe": Family("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM",
                        {**_QWEN35_BLOCK, **EXPERTS_BLOCK, **SHARED_EXPERT},
                        _qwen35_moe, changes=_QWEN35_CHANGES, whole=_LINEAR_WHOLE,
                        keys={**_NO_PREDICTIONS, "intermediate_size": None}, partial=True, factors=False),
    "qwen3next": Family("qwen3_next", "Qwen3NextForCausalLM", _QWEN3_NEXT_BLOCK, _qwen35_moe,
                        changes=_QWEN3_NEXT_CHANGES, whole=_LINEAR_WHOLE, keys=_NO_PREDICTIONS, partial=True,
                        factors=False),
    "kimi-linear": Family("kimi_linear", "KimiLinearForCausalLM", _KIMI_BLOCK, _kimi_linear, changes=_KIMI_CHANGES,
                          whole={"ssm_a": "self_attn.A_log", "ssm_dt.bias": "self_attn.dt_bias",
                                 "exp_probs_b.bias": "block_sparse_moe.gate.e_score_correction_bias"},
                          keys=_KIMI_KEYS, latent=True, factors=False),
}  # fmt: skip
