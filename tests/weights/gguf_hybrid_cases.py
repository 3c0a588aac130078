"""Tiny models whose layers keep a state, as llama.cpp's converter writes them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from gguf_pairs import VOCAB, Case, Convert, Tensors, each, interleaved, stacked

from truffula.testing.files import Array

# Value heads, key heads and their width, of ``tiny_config``.
HEADS, KEYS, DIM_K = 4, 2, 6
NO_ROPE = {"rope_parameters": ""}
NO_WIDTH = {"attention.key_length": None, "attention.value_length": None}
SECTIONS = {"rope.dimension_sections": [11, 11, 10, 0]}
EXPERTS = {"expert_feed_forward_length": 24, "expert_shared_feed_forward_length": 20}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}
LFM2 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
LFM2_KEYS = {**NO_WIDTH, "attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3, "vocab_size": VOCAB}
KV = "attention.head_count_kv"


def named_as_mapped(tensors: Tensors, _: Any) -> Tensors:
    """Under the names that the converter looks up."""
    made = {}
    for name, array in tensors.items():
        name = re.sub(r"\.dt_bias$", ".dt_proj.bias", name)
        name = re.sub(r"\.e_score_correction_bias$", ".e_score_correction.bias", name)
        made[re.sub(r"\.expert_bias$", ".expert_bias.bias", name)] = array
    return made


def of_nemotron(tensors: Tensors, _: Any) -> Tensors:
    return {re.sub(r"mixer\.dt_proj\.bias$", "mixer.dt.bias", name): array for name, array in tensors.items()}


@each
def rates(name: str, array: Array, _: Any) -> Array:
    """-exp(A_log), and convolutions without their axis of one."""
    if name.endswith(".A_log"):
        return -np.exp(array.astype(np.float64)).astype(np.float32)
    return array[:, 0] if array.ndim == 3 and re.search(r"\.conv(1d)?\.weight$", name) else array


@each
def columns(name: str, array: Array, _: Any) -> Array:
    """Mamba-2's vectors as matrices."""
    if name.endswith((".A_log", ".D")):
        return array[:, None]
    return array.reshape(2, -1) if name.endswith(("mamba.norm.weight", "mixer.norm.weight")) else array


@each
def shifted(name: str, array: Array, _: Any) -> Array:
    plain = not name.endswith("norm.weight") or "linear_attn" in name
    return array if plain else array + np.float32(1)


def tiled(array: Array, width: int, axis: int = 0) -> Array:
    """Value heads of all groups in turn, instead of group by group."""
    turned = np.moveaxis(array, axis, 0)
    made = turned.reshape(KEYS, HEADS // KEYS, width, *turned.shape[1:]).swapaxes(0, 1).reshape(turned.shape)
    return np.moveaxis(made, 0, axis)


def by_value_heads(dim_v: int) -> Convert:
    def change(name: str, array: Array, _: Any) -> Array:
        before = 2 * KEYS * DIM_K
        if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
            return np.concatenate([array[:before], tiled(array[before:], dim_v)])
        if name.endswith(("in_proj_a.weight", "in_proj_b.weight", ".A_log", "dt_proj.bias")):
            return tiled(array, 1)
        if name.endswith("in_proj_z.weight"):
            return tiled(array, dim_v)
        return tiled(array, dim_v, 1) if name.endswith("linear_attn.out_proj.weight") else array

    return each(change)


def gate_apart(dim_v: int) -> Convert:
    """q, k and v of all key heads together, the gates apart."""

    def change(tensors: Tensors, _: Any) -> Tensors:
        made: Tensors = {}
        for name, array in tensors.items():
            if not name.endswith("in_proj_qkvz.weight"):
                made[name] = array
                continue
            cuts = np.cumsum([DIM_K, DIM_K, HEADS // KEYS * dim_v])
            *qkv, gate = np.split(array.reshape(KEYS, -1, array.shape[1]), cuts, axis=1)
            block, qkv = f"blk.{name.split('.')[2]}.", [part.reshape(-1, array.shape[1]) for part in qkv]
            made[f"{block}attn_qkv.weight"] = np.concatenate(qkv)
            made[f"{block}attn_gate.weight"] = gate.reshape(-1, array.shape[1])
        return made

    return change


def linear_attention(
    architecture: str, model_type: str, keys: dict[str, Any], dim_v: int, *convert: Convert, **config: Any
) -> Case:
    """Qwen's, whose value heads are ``dim_v`` wide."""
    keys = {
        "ssm.conv_kernel": 4, "ssm.state_size": DIM_K, "ssm.group_count": KEYS, "ssm.time_step_rank": HEADS,
        "ssm.inner_size": HEADS * dim_v, "attention.recurrent_layers": [True, True, True, False],
        "full_attention_interval": 4, "rope.dimension_count": 4, **keys,
    }  # fmt: skip
    return Case(architecture, model_type, {**ROTATED, "linear_value_head_dim": dim_v, **config}, keys, convert)


def qwen35(dim_v: int = 10, **config: Any) -> Case:
    order = (named_as_mapped, by_value_heads(dim_v), rates, shifted)
    return linear_attention("qwen35", "qwen3_5_text", SECTIONS, dim_v, *order, **config)


def qwen35_moe(dim_v: int = 10) -> Case:
    keys = {**SECTIONS, **EXPERTS, "feed_forward_length": None}
    order = (stacked, named_as_mapped, by_value_heads(dim_v), rates, shifted)
    return linear_attention("qwen35moe", "qwen3_5_moe_text", keys, dim_v, *order)


def qwen3_next(dim_v: int = 10) -> Case:
    order = (stacked, named_as_mapped, gate_apart(dim_v), rates, shifted)
    return linear_attention("qwen3next", "qwen3_next", EXPERTS, dim_v, *order)


def gate_and_up(tensors: Tensors, _: Any) -> Tensors:
    """The shared MLP's matrices apart; it is an expert only beside others."""
    expert = any("block_sparse_moe" in name for name in tensors)
    made: Tensors = {}
    for name, array in tensors.items():
        if "shared_mlp" not in name:
            made[name] = array
            continue
        block, end = f"blk.{name.split('.')[2]}.ffn_", "_shexp.weight" if expert else ".weight"
        if "output_linear" in name:
            made[f"{block}down{end}"] = array
        else:
            made[f"{block}gate{end}"], made[f"{block}up{end}"] = np.split(array, 2)
    return made


@each
def multiplied(name: str, array: Array, _: Any) -> Array:
    """Falcon-H1's multipliers, in its weights."""
    factors = {
        "down_proj": 1.3, "gate_proj": 0.8, "k_proj": 0.7 * 0.9, "q_proj": 0.9, "v_proj": 0.9, "o_proj": 1.2,
        "out_proj": 1.4, "embed_tokens": 3.0, "lm_head": 0.6,
    }  # fmt: skip
    if "mamba.in_proj" in name:
        sections = np.repeat([1.1, 0.7, 1.3, 0.8, 0.6], [24, 24, 24, 24, 4])
        return array * np.float32(0.8) * sections[:, None].astype(np.float32)
    return array * np.float32(factors.get(name.split(".")[-2], 1.0))


def absorbed(tensors: Tensors, _: Any) -> Tensors:
    """Latent attention's keys and values apart, the keys turned; convolutions and rates with further axes."""
    made: Tensors = {}
    for name, array in tensors.items():
        if name.endswith("kv_b_proj.weight"):
            heads = array.reshape(4, 22, -1)
            made[name.replace("kv_b", "k_b")], made[name.replace("kv_b", "v_b")] = (
                heads[:, :10].swapaxes(1, 2), heads[:, 10:]
            )  # fmt: skip
        elif "_conv1d" in name:
            made[name] = array.reshape(1, array.shape[0], 1, -1)
        else:
            made[name] = array
    return made


def named_experts(tensors: Tensors, _: Any) -> Tensors:
    """All experts, as the converter maps them."""
    theirs = {"w1": "gate", "w2": "down", "w3": "up", "up_proj": "up", "down_proj": "down"}
    return {
        re.sub(r".*\.(\d+)\.\w+\.experts\.(\w+)\.weight",
               lambda found: f"blk.{found[1]}.ffn_{theirs[found[2]]}_exps.weight", name): array
        for name, array in tensors.items()
    }  # fmt: skip


def ssm(heads: int, groups: int, state: int, inner: int = 64) -> dict[str, Any]:
    return {"ssm.conv_kernel": 4, "ssm.state_size": state, "ssm.group_count": groups, "ssm.inner_size": inner,
            "ssm.time_step_rank": heads}  # fmt: skip


MAMBA2 = (named_as_mapped, rates, columns)
GRANITE_KEYS = {
    **NO_WIDTH, **ssm(4, 2, 12), KV: [0, 2, 0], "vocab_size": VOCAB, "rope.dimension_count": 8, "context_length": 512,
    "attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 2.0,
    "expert_shared_feed_forward_length": 40, "rope.scaling.finetuned": False,
}  # fmt: skip
NEMOTRON = {"mamba_head_dim": 16, **NO_ROPE, "mlp_bias": False}
NEMOTRON_KEYS = {
    **ssm(4, 2, 12), "vocab_size": VOCAB, "rope.dimension_count": 8, "rope.scaling.finetuned": False,
    "attention.layer_norm_epsilon": 1e-2, "rope.freq_base": None,
}  # fmt: skip
FALCON = Case("falcon-h1", "falcon_h1", {}, {**ssm(4, 2, 12, 24), "vocab_size": VOCAB}, (multiplied, *MAMBA2))
EVERY = [
    Case("lfm2", "lfm2", LFM2, {**LFM2_KEYS, "feed_forward_length": 40}, (rates,)),
    Case("lfm2moe", "lfm2_moe", {**LFM2, "routed_scaling_factor": 1.0},
         {**LFM2_KEYS, "expert_feed_forward_length": 24, "leading_dense_block_count": 1, "expert_gating_func": 2},
         (named_as_mapped, stacked, named_experts, rates)),
    qwen35(),
    qwen35_moe(),
    qwen3_next(),
    Case("granitehybrid", "granitemoehybrid", NO_ROPE, {**GRANITE_KEYS, "expert_count": 0, "expert_used_count": 2},
         (gate_and_up, interleaved, *MAMBA2)),
    Case("granitehybrid", "granitemoehybrid", {**NO_ROPE, "num_local_experts": 5, "num_experts_per_tok": 2},
         GRANITE_KEYS, (gate_and_up, stacked, interleaved, *MAMBA2)),
    Case("granitehybrid", "granitemoehybrid", {"position_embedding_type": "rope"},
         {**GRANITE_KEYS, "rope.scaling.finetuned": True}, (gate_and_up, interleaved, *MAMBA2)),
    Case("granitehybrid", "bamba", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                        "partial_rotary_factor": 0.5}},
         {**NO_WIDTH, **ssm(8, 2, 10), KV: [0, 2, 0], "rope.dimension_count": 4, "rope.scaling.finetuned": True},
         (interleaved, *MAMBA2)),
    Case("jamba", "jamba", {**NO_ROPE, "head_dim": ""},
         {**NO_WIDTH, **ssm(2, 1, 6), "ssm.group_count": None, KV: [0, 2, 0], "rope.freq_base": None,
          "expert_count": 5, "expert_used_count": 2}, (named_as_mapped, stacked, rates)),
    Case("nemotron_h", "nemotron_h", {**NEMOTRON, "hybrid_override_pattern": "M*-M"},
         {**NEMOTRON_KEYS, KV: [0, 2, 0, 0], "feed_forward_length": [0, 0, 56, 0]},
         (interleaved, *MAMBA2, of_nemotron)),
    Case("nemotron_h_moe", "nemotron_h", {**NEMOTRON, "hybrid_override_pattern": "ME*M", "moe_latent_size": 14},
         {**NEMOTRON_KEYS, KV: [0, 0, 2, 0], "feed_forward_length": [0, 20, 0, 0], "expert_count": 6,
          "expert_used_count": 3, "expert_feed_forward_length": 20, "expert_shared_feed_forward_length": 28,
          "expert_shared_count": 1, "expert_weights_norm": True, "expert_weights_scale": 1.0, "expert_group_count": 1,
          "expert_group_used_count": 1, "moe_latent_size": 14},
         (stacked, named_experts, interleaved, *MAMBA2, of_nemotron)),
    Case("kimi-linear", "kimi_linear", {**NO_ROPE, "linear_num_heads": 4},
         {"attention.head_count": 4, KV: [0, 0, 0, 0, 1, 0], "expert_count": 6, "expert_used_count": 3,
          "expert_group_used_count": 1, "expert_gating_func": 2, "attention.key_length": 24,
          "attention.value_length": 6, "vocab_size": VOCAB, "ssm.conv_kernel": 4, "kda.head_dim": 20,
          "attention.kv_lora_rank": 18, "rope.dimension_count": 6, "attention.key_length_mla": 16,
          "attention.value_length_mla": 12, "expert_feed_forward_length": 24, "expert_shared_count": 1,
          "leading_dense_block_count": 1, "expert_weights_scale": 2.446, "rope.freq_base": None},
         (named_as_mapped, stacked, named_experts, absorbed, rates)),
]  # fmt: skip
CASES = [replace(case, rounded=2e-5) if rates in case.convert else case for case in EVERY]
