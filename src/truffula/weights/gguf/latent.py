"""GGUF families with latent attention: DeepSeek V2 to V3.2, GLM-5, Mistral 4, and others that are written as these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from truffula.weights.gguf.changes import ABSORBED
from truffula.weights.gguf.families import (
    CORRECTION,
    DEEPSEEK_EXPERTS,
    LATENT_BLOCK,
    SIGMOID,
    SOFTMAX,
    Family,
    routed,
    score,
    with_key,
    without_predictors,
)
from truffula.weights.gguf.hparams import HParams

_LATENT_BLOCK = {**LATENT_BLOCK, **DEEPSEEK_EXPERTS}
_SPARSE_BLOCK = {
    **_LATENT_BLOCK, "indexer.attn_k": "self_attn.indexer.wk", "indexer.attn_q_b": "self_attn.indexer.wq_b",
    "indexer.k_norm": "self_attn.indexer.k_norm", "indexer.proj": "self_attn.indexer.weights_proj",
}  # fmt: skip

# The groups of experts of DeepSeek V2 and V3, by score and number of experts: older files don't give them.
_GROUPS = {(SOFTMAX, 160): (8, 3), (SIGMOID, 256): (8, 4)}


def _latent(hparams: HParams, config: dict[str, Any]) -> None:
    """Latent attention. Files whose kv_b is split give the width of the latents as that of heads, and the true widths
    under further keys; older files, whose kv_b is whole, the true ones only."""
    heads, rope, rank = config["num_attention_heads"], hparams.count("rope.dimension_count"), "attention.kv_lora_rank"
    absorbed = hparams.get("attention.key_length_mla") is not None
    key, value = "attention.key_length", "attention.value_length"
    if absorbed:
        for name, wanted in ((key, hparams.count(rank) + rope), (value, hparams.count(rank))):
            if hparams.count(name) != wanted:
                raise hparams.error(name, f"is {hparams.count(name)}; expected {wanted}, of latent attention.")
        key, value = f"{key}_mla", f"{value}_mla"
    nope = hparams.count(key) - rope
    if nope < 1:
        raise hparams.error(key, f"is {nope + rope}, of which {rope} columns are rotated.")
    config |= {
        "num_key_value_heads": heads,
        "q_lora_rank": hparams.count("attention.q_lora_rank") if hparams.has("attn_q_a.weight") else None,
        "kv_lora_rank": hparams.count(rank),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": hparams.count(value),
        "attention_bias": hparams.has("attn_kv_a_mqa.bias"),
    }
    hparams.get("attention.q_lora_rank")  # some converters write it for models without
    del config["head_dim"]


def _latent_yarn(hparams: HParams, config: dict[str, Any], mscale: float | None = None) -> None:
    """``rope.scaling.yarn_log_multiplier`` is a tenth of ``mscale_all_dim`` here. There is no key for ``mscale``:
    llama.cpp takes it to be ``mscale``, or the same where that is None."""
    key, rope = "rope.scaling.yarn_log_multiplier", config["rope_parameters"]
    if hparams.get(key) is None or rope["rope_type"] == "default":
        return
    hparams.only("rope.scaling.type", rope["rope_type"], "yarn")
    all_dim = float(Decimal(str(hparams.real(key, least=0.0))) * 10)
    if all_dim:
        rope |= {"mscale": all_dim if mscale is None else mscale, "mscale_all_dim": all_dim}


def _deepseek2(hparams: HParams, config: dict[str, Any]) -> None:
    """DeepSeek V2 and V3, and the models that llama.cpp writes as these: Kimi K2, GLM-4.7-Flash, Mistral Large 3.

    A file without ``expert_gating_func`` has the softmax of V2, unless it holds corrections of the sigmoid's scores.
    """
    without_predictors(hparams, config)
    _latent(hparams, config)
    if not hparams.get("expert_count"):  # Youtu: dense
        for key in ("expert_feed_forward_length", "expert_shared_count", "leading_dense_block_count"):
            hparams.get(key)
        config |= {"first_k_dense_replace": config["num_hidden_layers"], "rope_interleave": True}
        _latent_yarn(hparams, config)
        return
    routed(hparams, config)
    made = score(hparams, (SOFTMAX, SIGMOID), SIGMOID if hparams.has("exp_probs_b.bias") else SOFTMAX)
    if hparams.get("expert_group_count") is None:
        config["n_group"], config["topk_group"] = _GROUPS.get((made, config["n_routed_experts"]), (1, 1))
    if made == SOFTMAX and config["norm_topk_prob"]:
        _mistral4(hparams, config)
        return
    _latent_yarn(hparams, config)
    if made == SIGMOID:
        config["rope_interleave"] = True
        return
    config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
    config |= {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"]}


def _mistral4(hparams: HParams, config: dict[str, Any]) -> None:
    """V3 with a softmax, whose queries grow with their position: by ``attention.temperature_scale`` times a logarithm,
    in steps of the original length."""
    _latent_yarn(hparams, config, mscale=1.0)
    rope, length = config["rope_parameters"], "attention.temperature_length"
    original = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    hparams.only(length, hparams.optional(length) or original, original)
    rope |= {
        "original_max_position_embeddings": original,
        "llama_4_scaling_beta": hparams.real("attention.temperature_scale", 0.0),
    }
    config |= {"rope_interleave": True, "model_type": "mistral4", "architectures": ["Mistral4ForCausalLM"]}


def _mistral4_alone(hparams: HParams, config: dict[str, Any]) -> None:
    """Files of the architecture mistral4 don't say how queries grow: as in transformers' default and in the published
    model."""
    score(hparams, (SOFTMAX,), SOFTMAX)
    _latent(hparams, config)
    routed(hparams, config)
    _mistral4(hparams, config)
    if hparams.get("attention.temperature_scale") is None:
        config["rope_parameters"]["llama_4_scaling_beta"] = 0.1


def _sparse(hparams: HParams, config: dict[str, Any]) -> None:
    """DeepSeek V3.2 and GLM-5, which attend to the keys that an indexer chooses."""
    score(hparams, (SIGMOID,), SIGMOID)
    without_predictors(hparams, config)
    _latent(hparams, config)
    _latent_yarn(hparams, config, mscale=1.0)
    routed(hparams, config)
    config["index_n_heads"] = hparams.count("attention.indexer.head_count")
    config["index_head_dim"] = hparams.count("attention.indexer.key_length")
    config["index_topk"] = hparams.count("attention.indexer.top_k")
    hparams.get("attention.indexer.types")  # which layers share an indexer: none is needed


_SPLIT = {"self_attn.kv_b_proj": ABSORBED}
_DEEPSEEK2 = Family("deepseek_v3", "DeepseekV3ForCausalLM", _LATENT_BLOCK, _deepseek2, latent=True, whole=CORRECTION)
FAMILIES: Mapping[str, Family] = {
    "deepseek2": replace(
        _DEEPSEEK2, variant=with_key("attention.key_length_mla", replace(_DEEPSEEK2, changes=_SPLIT))
    ),
    "deepseek32": Family("deepseek_v32", "DeepseekV32ForCausalLM", _SPARSE_BLOCK, _sparse, latent=True, changes=_SPLIT,
                         whole=CORRECTION),
    "glm-dsa": Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", _SPARSE_BLOCK, _sparse, latent=True, changes=_SPLIT,
                      whole=CORRECTION),
    "mistral4": Family("mistral4", "Mistral4ForCausalLM", _LATENT_BLOCK, _mistral4_alone, latent=True, changes=_SPLIT),
}  # fmt: skip
