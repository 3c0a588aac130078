"""GGUF families with experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf_changes import ABSORBED, INTERLEAVED, ONE_ROW, STACKED
from truffula.weights.gguf_families import (
    BLOCK,
    EXPERTS_BLOCK,
    HEAD_NORMS_BLOCK,
    LAYER_NORM,
    LLAMA_BLOCK,
    POST_NORM_BLOCK,
    QWEN3_BLOCK,
    RMS_NORM,
    Family,
    attention_bias,
    chosen_experts,
    expert_count,
    granite,
    implied_head_dim,
    layer_types,
    llama_like,
    partly_rotated,
)
from truffula.weights.gguf_header import GgufHeader
from truffula.weights.gguf_hparams import HParams


def _shared_block(module: str) -> dict[str, str]:
    return {f"ffn_{name}_shexp": f"{module}.{name}_proj" for name in ("gate", "up", "down")}


_QWEN2_MOE_BLOCK = {
    **LLAMA_BLOCK,
    **EXPERTS_BLOCK,
    **_shared_block("mlp.shared_expert"),
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_QWEN3_MOE_BLOCK = {**QWEN3_BLOCK, **EXPERTS_BLOCK}
# Mixtral's files are of the architecture llama.
_MIXTRAL_BLOCK = {
    **LLAMA_BLOCK,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.w1",
    "ffn_up_exps": "block_sparse_moe.experts.w3",
    "ffn_down_exps": "block_sparse_moe.experts.w2",
    "ffn_gate_up_exps": "block_sparse_moe.experts.gate_up_proj",
}
_MINIMAX_BLOCK = {**_MIXTRAL_BLOCK, **HEAD_NORMS_BLOCK}
_GRANITE_MOE_BLOCK = {
    **LLAMA_BLOCK,
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": "block_sparse_moe.experts.gate_proj",
    "ffn_up_exps": "block_sparse_moe.experts.up_proj",
    "ffn_down_exps": "block_sparse_moe.experts.down_proj",
    "ffn_gate_up_exps": "block_sparse_moe.experts.gate_up_proj",
    "ffn_gate_shexp": "shared_mlp.input_linear",
    "ffn_up_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}
# Of layers that predict further tokens, which are not served.
_NEXTN_BLOCK = {
    "nextn.eh_proj": "eh_proj",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_head": "shared_head.head",
    "nextn.shared_head_norm": "shared_head.norm",
}
_DEEPSEEK_EXPERTS = {**EXPERTS_BLOCK, **_shared_block("mlp.shared_experts")}
_GLM4_MOE_BLOCK = {
    **HEAD_NORMS_BLOCK,
    **_DEEPSEEK_EXPERTS,
    **_NEXTN_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
}
_DOTS_BLOCK = {**QWEN3_BLOCK, **_DEEPSEEK_EXPERTS}
_LATENT_BLOCK = {
    **{name: module for name, module in LLAMA_BLOCK.items() if name not in ("attn_k", "attn_v")},
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",  # of older files; of others, made of the next two
    "attn_k_b": "self_attn.kv_b_proj",
    "attn_v_b": "self_attn.kv_b_proj",
    **_DEEPSEEK_EXPERTS,
    **_NEXTN_BLOCK,
}
_SPARSE_BLOCK = {
    **_LATENT_BLOCK,
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
}
_LLAMA4_BLOCK = {
    **{name: module.replace("mlp.", "feed_forward.") for name, module in {**LLAMA_BLOCK, **EXPERTS_BLOCK}.items()},
    **_shared_block("feed_forward.shared_expert"),
    "ffn_gate_inp": "feed_forward.router",
}
_ERNIE_BLOCK = {**LLAMA_BLOCK, **_DEEPSEEK_EXPERTS}
_HUNYUAN_BLOCK = {
    **LLAMA_BLOCK,
    **EXPERTS_BLOCK,
    **_shared_block("mlp.shared_mlp"),
    "ffn_gate_inp": "mlp.gate.wg",
    "attn_q_norm": "self_attn.query_layernorm",
    "attn_k_norm": "self_attn.key_layernorm",
}
_AFMOE_BLOCK = {
    **HEAD_NORMS_BLOCK,
    **_DEEPSEEK_EXPERTS,
    "ffn_gate_inp": "mlp.router.gate",
    "attn_gate": "self_attn.gate_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_mlp_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
_EXAONE_BLOCK = {**_DOTS_BLOCK, **_NEXTN_BLOCK}
_COHERE_BLOCK = {**BLOCK, **_DEEPSEEK_EXPERTS, **_NEXTN_BLOCK}
_LAGUNA_BLOCK = {
    **QWEN3_BLOCK,
    **EXPERTS_BLOCK,
    **_shared_block("mlp.shared_expert"),
    "attn_gate": "self_attn.g_proj",
}
_GPT_OSS_BLOCK = {**POST_NORM_BLOCK, **EXPERTS_BLOCK, "ffn_gate_inp": "mlp.router"}
_CORRECTION = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
_SOFTMAX, _SIGMOID = 1, 2  # values of expert_gating_func


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
    if shared := _count(hparams, "expert_shared_feed_forward_length"):
        config |= {"shared_intermediate_size": shared, "model_type": "granitemoeshared"}
        config["architectures"] = ["GraniteMoeSharedForCausalLM"]


def _olmoe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp does not divide the weights of the chosen experts by their sum."""
    llama_like(hparams, config)
    config["num_experts"] = expert_count(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["norm_topk_prob"] = False


def _score(hparams: HParams, allowed: tuple[int, ...], default: int) -> int:
    """``expert_gating_func``: how scores are made of the router's outputs."""
    name, found = hparams.name("expert_gating_func"), hparams.get("expert_gating_func") or default
    if found not in allowed:
        known = " and ".join({_SOFTMAX: "1, softmax,", _SIGMOID: "2, sigmoid,"}[value] for value in allowed)
        raise UnsupportedModel(f"{name} is {found}; only {known} is supported.", param=name)
    return int(found)


def _count(hparams: HParams, key: str) -> int:
    """A number that may be missing or 0."""
    return hparams.count(key) if hparams.get(key) else 0


def _without_predictors(hparams: HParams, config: dict[str, Any]) -> None:
    """The last layers of a file may predict further tokens."""
    predicting, name = _count(hparams, "nextn_predict_layers"), hparams.name("nextn_predict_layers")
    if predicting >= config["num_hidden_layers"]:
        raise CheckpointError(f"{name} is {predicting}, of {config['num_hidden_layers']} layers.", param=name)
    config["num_hidden_layers"] -= predicting
    config["num_nextn_predict_layers"] = predicting


def _routed(hparams: HParams) -> dict[str, Any]:
    """DeepSeek's keys of experts."""
    return {
        "first_k_dense_replace": _count(hparams, "leading_dense_block_count"),
        "n_routed_experts": hparams.count("expert_count"),
        "num_experts_per_tok": hparams.count("expert_used_count"),
        "n_shared_experts": _count(hparams, "expert_shared_count"),
        "moe_intermediate_size": hparams.count("expert_feed_forward_length"),
        "n_group": hparams.count("expert_group_count", 1),
        "topk_group": hparams.count("expert_group_used_count", 1),
        "norm_topk_prob": bool(hparams.get("expert_weights_norm", False)),
        "routed_scaling_factor": hparams.real("expert_weights_scale", 1.0) or 1.0,  # 0: the weights are not scaled
    }


def _normed_and_ungrouped(hparams: HParams, routed: Mapping[str, Any]) -> None:
    """Refuse what transformers' class has no key for: weights not divided by their sum, groups of experts."""
    for key, value, wanted in (
        ("expert_weights_norm", routed["norm_topk_prob"], True),
        ("expert_group_count", routed["n_group"], 1),
    ):
        if value != wanted:
            name = hparams.name(key)
            raise UnsupportedModel(f"{name} is {value}; only {wanted} is supported.", param=name)


def _glm4_moe(hparams: HParams, config: dict[str, Any]) -> None:
    _score(hparams, (_SIGMOID,), _SIGMOID)
    _without_predictors(hparams, config)
    partly_rotated(hparams, config)
    config["attention_bias"] = "blk.0.attn_q.bias" in hparams.header.tensors
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in hparams.header.tensors
    config |= _routed(hparams)


def _dots1(hparams: HParams, config: dict[str, Any]) -> None:
    _score(hparams, (_SIGMOID,), 0)
    attention_bias(hparams, config)
    config |= {**_routed(hparams), "sliding_window": None}


def _latent(hparams: HParams, config: dict[str, Any]) -> None:
    """Latent attention. Files whose kv_b is split give the width of the latents as that of heads, and the true widths
    under further keys; older files, whose kv_b is whole, the true ones only."""
    heads, rope, rank = config["num_attention_heads"], hparams.count("rope.dimension_count"), "attention.kv_lora_rank"
    absorbed = hparams.get("attention.key_length_mla") is not None
    key, value = "attention.key_length", "attention.value_length"
    if absorbed:
        for name, wanted in ((key, hparams.count(rank) + rope), (value, hparams.count(rank))):
            if hparams.count(name) != wanted:
                raise CheckpointError(
                    f"{hparams.name(name)} is {hparams.count(name)}; expected {wanted}, of latent attention.",
                    param=hparams.name(name),
                )
        key, value = f"{key}_mla", f"{value}_mla"
    nope = hparams.count(key) - rope
    if nope < 1:
        raise CheckpointError(
            f"{hparams.name(key)} is {nope + rope}, of which {rope} columns are rotated.", param=hparams.name(key)
        )
    queries = "blk.0.attn_q_a.weight" in hparams.header.tensors
    config |= {
        "num_key_value_heads": heads,
        "q_lora_rank": hparams.count("attention.q_lora_rank") if queries else None,
        "kv_lora_rank": hparams.count(rank),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": hparams.count(value),
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in hparams.header.tensors,
    }
    hparams.get("attention.q_lora_rank")  # some converters write it for models without
    del config["head_dim"]


def _latent_yarn(hparams: HParams, config: dict[str, Any], mscale: float | None = None) -> None:
    """``rope.scaling.yarn_log_multiplier`` is a tenth of ``mscale_all_dim`` here. There is no key for ``mscale``:
    llama.cpp takes it to be ``mscale``, or the same where that is None."""
    key, rope = "rope.scaling.yarn_log_multiplier", config["rope_parameters"]
    if hparams.get(key) is None or rope["rope_type"] == "default":
        return
    if rope["rope_type"] != "yarn":
        raise UnsupportedModel(
            f"{hparams.name(key)} is given with rope scaling {rope['rope_type']}; only yarn is supported.",
            param=hparams.name(key),
        )
    all_dim = float(Decimal(str(hparams.real(key, least=0.0))) * 10)
    if all_dim:
        rope |= {"mscale": all_dim if mscale is None else mscale, "mscale_all_dim": all_dim}


def _deepseek2(hparams: HParams, config: dict[str, Any]) -> None:
    """DeepSeek V2 and V3, and the models that llama.cpp writes as these: Kimi K2, GLM-4.7-Flash, Mistral Large 3.

    A file without ``expert_gating_func`` has the softmax of V2, unless it holds corrections of the sigmoid's scores.
    """
    _without_predictors(hparams, config)
    _latent(hparams, config)
    if not hparams.get("expert_count"):  # Youtu: dense
        for key in ("expert_feed_forward_length", "expert_shared_count", "leading_dense_block_count"):
            hparams.get(key)
        config |= {"first_k_dense_replace": config["num_hidden_layers"], "rope_interleave": True}
        _latent_yarn(hparams, config)
        return
    routed = _routed(hparams)
    corrected = any(name.endswith("exp_probs_b.bias") for name in hparams.header.tensors)
    score = _score(hparams, (_SOFTMAX, _SIGMOID), _SIGMOID if corrected else _SOFTMAX)
    if score == _SOFTMAX and routed["norm_topk_prob"]:
        _mistral4(hparams, config, routed)
        return
    _latent_yarn(hparams, config)
    if score == _SIGMOID:
        config |= {**routed, "rope_interleave": True}
        return
    grouped = "group_limited_greedy" if routed["n_group"] > 1 else "greedy"
    config |= {**routed, "topk_method": grouped}
    config |= {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}


def _mistral4(hparams: HParams, config: dict[str, Any], routed: Mapping[str, Any]) -> None:
    """V3 with a softmax, whose queries grow with their position: by ``attention.temperature_scale`` times a logarithm,
    in steps of the original length."""
    _latent_yarn(hparams, config, mscale=1.0)
    rope, length = config["rope_parameters"], "attention.temperature_length"
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    if hparams.get(length) and hparams.count(length) != original:
        raise UnsupportedModel(
            f"{hparams.name(length)} is {hparams.count(length)}; only the original length, {original}, is supported.",
            param=hparams.name(length),
        )
    rope |= {
        "original_max_position_embeddings": original,
        "llama_4_scaling_beta": hparams.real("attention.temperature_scale", 0.0),
    }
    config |= {**routed, "rope_interleave": True}
    config |= {"model_type": "mistral4", "architectures": ["Mistral4ForCausalLM"]}


def _mistral4_alone(hparams: HParams, config: dict[str, Any]) -> None:
    """Files of the architecture mistral4 don't say how queries grow: as in transformers' default and in the published
    model."""
    _score(hparams, (_SOFTMAX,), _SOFTMAX)
    _latent(hparams, config)
    _mistral4(hparams, config, _routed(hparams))
    if hparams.get("attention.temperature_scale") is None:
        config["rope_parameters"]["llama_4_scaling_beta"] = 0.1


def _sparse(hparams: HParams, config: dict[str, Any]) -> None:
    """DeepSeek V3.2 and GLM-5, which attend to the keys that an indexer chooses."""
    _score(hparams, (_SIGMOID,), _SIGMOID)
    _without_predictors(hparams, config)
    _latent(hparams, config)
    _latent_yarn(hparams, config, mscale=1.0)
    config |= _routed(hparams)
    config["index_n_heads"] = hparams.count("attention.indexer.head_count")
    config["index_head_dim"] = hparams.count("attention.indexer.key_length")
    config["index_topk"] = hparams.count("attention.indexer.top_k")
    hparams.get("attention.indexer.types")  # which layers share an indexer: none is needed


def _minimax_m2(hparams: HParams, config: dict[str, Any]) -> None:
    _score(hparams, (_SIGMOID,), 0)
    partly_rotated(hparams, config)
    config["intermediate_size"] = hparams.count("expert_feed_forward_length")
    chosen_experts(hparams, config)


def _llama4(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp takes what the format has no key for from the published models: chunks of 8192, every fourth layer
    without rotation, its queries tuned; no norms of q and k in the one with 128 experts."""
    window, name = hparams.get("attention.sliding_window"), hparams.name("attention.sliding_window")
    if window is not None:
        raise UnsupportedModel(f"{name} is {window}; only models with chunks of 8192 tokens are supported.", param=name)
    attention_bias(hparams, config)
    experts = hparams.count("expert_count")
    config |= {
        "intermediate_size": hparams.count("expert_feed_forward_length"),
        "intermediate_size_mlp": config["intermediate_size"],
        "num_local_experts": experts,
        "num_experts_per_tok": hparams.count("expert_used_count"),
        "interleave_moe_layer_step": hparams.count("interleave_moe_layer_step"),
        "attention_chunk_size": 8192,
        "no_rope_layer_interval": 4,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "use_qk_norm": experts != 128,
    }


def _ernie4_5_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """The width of the shared experts is that of their tensors; the converter's key for it is not always right."""
    hparams.get("expert_shared_feed_forward_length")
    config |= {
        "use_bias": "blk.0.attn_q.bias" in hparams.header.tensors,
        "moe_num_experts": hparams.count("expert_count"),
        "moe_k": hparams.count("expert_used_count"),
        "moe_intermediate_size": hparams.count("expert_feed_forward_length"),
        "moe_num_shared_experts": _count(hparams, "expert_shared_count"),
        "moe_layer_interval": hparams.count("interleave_moe_layer_step"),
        "moe_layer_start_index": _count(hparams, "leading_dense_block_count"),
        "moe_layer_end_index": -1,
    }


def _hunyuan_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """transformers' class has one width for all experts, and one shared expert."""
    width = hparams.count("expert_feed_forward_length", config["intermediate_size"])
    for key, wanted in (("expert_shared_feed_forward_length", width), ("expert_shared_count", 1)):
        if hparams.count(key, wanted) != wanted:
            name = hparams.name(key)
            raise UnsupportedModel(f"{name} is {hparams.count(key)}; only {wanted} is supported.", param=name)
    attention_bias(hparams, config)
    config |= {"intermediate_size": width, "num_experts": expert_count(hparams)}
    config["moe_topk"] = hparams.count("expert_used_count")


def _afmoe(hparams: HParams, config: dict[str, Any]) -> None:
    """Every fourth layer is full, where the file does not say which; embeddings are multiplied by the root of their
    width: llama.cpp has both in its code."""
    _score(hparams, (_SIGMOID,), _SIGMOID)
    attention_bias(hparams, config)
    routed = _routed(hparams)
    _normed_and_ungrouped(hparams, routed)
    config |= {
        "num_experts": routed["n_routed_experts"],
        "num_experts_per_tok": routed["num_experts_per_tok"],
        "num_shared_experts": routed["n_shared_experts"],
        "num_dense_layers": routed["first_k_dense_replace"],
        "moe_intermediate_size": routed["moe_intermediate_size"],
        "route_scale": routed["routed_scaling_factor"],
        "mup_enabled": True,
        "sliding_window": hparams.count("attention.sliding_window"),
        "layer_types": layer_types(hparams, config["num_hidden_layers"], every=4),
    }


def _exaone_moe(hparams: HParams, config: dict[str, Any]) -> None:
    _score(hparams, (_SIGMOID,), 0)
    _without_predictors(hparams, config)
    routed = _routed(hparams)
    hparams.get("expert_shared_feed_forward_length")  # that of the tensors: a multiple of an expert's
    config |= {
        **routed,
        "num_experts": routed.pop("n_routed_experts"),
        "num_shared_experts": routed.pop("n_shared_experts"),
        "sliding_window": hparams.count("attention.sliding_window"),
        "layer_types": layer_types(hparams, config["num_hidden_layers"], every=4),
    }


def _cohere2_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """The first, dense layers have a rotation even without a window; norms are of either kind."""
    _without_predictors(hparams, config)
    attention_bias(hparams, config)
    routed, score = _routed(hparams), _score(hparams, (_SOFTMAX, _SIGMOID), _SIGMOID)
    for key in (
        "expert_shared_feed_forward_length",
        LAYER_NORM[0],
    ):  # the latter has no effect beside that of RMS norms
        hparams.get(key)
    for key in ("n_group", "routed_scaling_factor"):
        if routed[key] != 1:
            raise UnsupportedModel(f"{key} is {routed[key]}; only 1 is supported in {hparams.architecture} files.")
    config |= {
        "num_experts": routed["n_routed_experts"],
        "num_experts_per_tok": routed["num_experts_per_tok"],
        "num_shared_experts": routed["n_shared_experts"],
        "first_k_dense_replace": routed["first_k_dense_replace"],
        "norm_topk_prob": routed["norm_topk_prob"],
        "expert_selection_fn": "softmax" if score == _SOFTMAX else "sigmoid",
        "shared_expert_combination_strategy": "average",
        "prefix_dense_intermediate_size": config["intermediate_size"],
        "prefix_dense_sliding_window_pattern": 1,
        "intermediate_size": routed["moe_intermediate_size"],
        "logit_scale": hparams.real("logit_scale"),
        "sliding_window": hparams.count("attention.sliding_window"),
        "layer_types": layer_types(hparams, config["num_hidden_layers"], every=4),
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


def _laguna(hparams: HParams, config: dict[str, Any]) -> None:
    """The number of query heads depends on the layer; full and windowed layers have a rotary table each."""
    _score(hparams, (_SIGMOID,), _SIGMOID)
    routed, layers, width = _routed(hparams), config["num_hidden_layers"], config["head_dim"]
    _normed_and_ungrouped(hparams, routed)
    heads, gate = hparams.each("attention.head_count", layers), hparams.header.tensors.get("blk.0.attn_gate.weight")
    attention_bias(hparams, config)
    window, full = _count(hparams, "attention.sliding_window"), config["rope_parameters"]
    kinds = layer_types(hparams, layers, every=4, full_first=True) if window else ["full_attention"] * layers
    full["partial_rotary_factor"] = hparams.count("rope.dimension_count", width) / width
    config["rope_parameters"] = {"full_attention": full}
    if window:
        config["sliding_window"] = window
        config["rope_parameters"]["sliding_attention"] = {
            "rope_type": "default",
            "rope_theta": hparams.real("rope.freq_base_swa", full["rope_theta"]),
            "partial_rotary_factor": hparams.count("rope.dimension_count_swa", width) / width,
        }
    dense = routed["first_k_dense_replace"]
    config |= {
        "num_attention_heads_per_layer": heads,
        "layer_types": kinds,
        "mlp_layer_types": ["dense" if layer < dense else "sparse" for layer in range(layers)],
        "num_experts": routed["n_routed_experts"],
        "num_experts_per_tok": routed["num_experts_per_tok"],
        "moe_intermediate_size": routed["moe_intermediate_size"],
        "shared_expert_intermediate_size": hparams.count("expert_shared_feed_forward_length"),
        "moe_routed_scaling_factor": routed["routed_scaling_factor"],
        "gating": "per-head" if gate is not None and gate.shape[0] == heads[0] else "per-element",
    }


def _with_key(key: str, row: Family) -> Callable[[GgufHeader], Family | None]:
    """``Family.variant``: ``row`` for a file that has the key."""

    def variant(header: GgufHeader) -> Family | None:
        return row if header.metadata.get(f"{header.metadata['general.architecture']}.{key}") else None

    return variant


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _MIXTRAL_BLOCK, chosen_experts, changes=INTERLEAVED)
_SPLIT = {"self_attn.kv_b_proj": ABSORBED}
_DEEPSEEK2 = Family("deepseek_v3", "DeepseekV3ForCausalLM", _LATENT_BLOCK, _deepseek2, latent=True, whole=_CORRECTION)
_COHERE_MOE = Family("cohere2_moe", "Cohere2MoeForCausalLM", _COHERE_BLOCK, _cohere2_moe, eps=LAYER_NORM)
FAMILIES: Mapping[str, Family] = {
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN2_MOE_BLOCK, _qwen2_moe,
                       changes={"mlp.shared_expert_gate": ONE_ROW}),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE_BLOCK, _qwen3_moe),
    "glm4moe": Family("glm4_moe", "Glm4MoeForCausalLM", _GLM4_MOE_BLOCK, _glm4_moe, partial=True, whole=_CORRECTION),
    "gpt-oss": Family("gpt_oss", "GptOssForCausalLM", _GPT_OSS_BLOCK, _gpt_oss,
                      whole={"attn_sinks.weight": "self_attn.sinks"}),
    "granitemoe": Family("granitemoe", "GraniteMoeForCausalLM", _GRANITE_MOE_BLOCK, _granite_moe,
                         changes={**INTERLEAVED, "shared_mlp.input_linear": STACKED}),
    "olmoe": Family("olmoe", "OlmoeForCausalLM", _QWEN3_MOE_BLOCK, _olmoe),
    "deepseek2": replace(
        _DEEPSEEK2, variant=_with_key("attention.key_length_mla", replace(_DEEPSEEK2, changes=_SPLIT))
    ),
    "deepseek32": Family("deepseek_v32", "DeepseekV32ForCausalLM", _SPARSE_BLOCK, _sparse, latent=True, changes=_SPLIT,
                         whole=_CORRECTION),
    "glm-dsa": Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", _SPARSE_BLOCK, _sparse, latent=True, changes=_SPLIT,
                      whole=_CORRECTION),
    "mistral4": Family("mistral4", "Mistral4ForCausalLM", _LATENT_BLOCK, _mistral4_alone, latent=True, changes=_SPLIT),
    "minimax-m2": Family("minimax_m2", "MiniMaxM2ForCausalLM", _MINIMAX_BLOCK, _minimax_m2, partial=True,
                         whole={"exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"}),
    "llama4": Family("llama4_text", "Llama4ForCausalLM", _LLAMA4_BLOCK, _llama4),
    "ernie4_5-moe": Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _ERNIE_BLOCK, _ernie4_5_moe,
                           changes={"mlp.moe_statics": ONE_ROW},
                           whole={"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"}),
    "hunyuan-moe": Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", _HUNYUAN_BLOCK, _hunyuan_moe),
    "dots1": Family("dots1", "Dots1ForCausalLM", _DOTS_BLOCK, _dots1, whole=_CORRECTION),
    "afmoe": Family("afmoe", "AfmoeForCausalLM", _AFMOE_BLOCK, _afmoe,
                    whole={"exp_probs_b.bias": "mlp.expert_bias"}),
    "exaone-moe": Family("exaone_moe", "ExaoneMoeForCausalLM", _EXAONE_BLOCK, _exaone_moe,
                         whole={"exp_probs_b.bias": "mlp.e_score_correction_bias"}),
    "cohere2moe": replace(_COHERE_MOE, variant=_with_key(RMS_NORM[0], replace(_COHERE_MOE, eps=RMS_NORM))),
    "laguna": Family("laguna", "LagunaForCausalLM", _LAGUNA_BLOCK, _laguna, partial=True,
                     by_layer=True, whole={"exp_probs_b.bias": "mlp.experts.e_score_correction_bias"}),
}  # fmt: skip
