"""Tiny checkpoints of model types of transformers, written by transformers, and how each is expected to be served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SMALL: dict[str, Any] = {
    "vocab_size": 101, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 56, "n_inner": 56, "ffn_dim": 56,
    "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3, "num_layers": 3, "head_dim": 8, "rotary_dim": 4,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "sliding_window": 7, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1, "state_size": 8,
}  # fmt: skip

_LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "head_dim": 4, "num_key_value_heads": 4,
}  # fmt: skip

_OF_TYPE: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "zamba2": {"num_hidden_layers": 4, "layer_types": None},
}

FAST: dict[str, str] = {"persimmon": "fallback", "lfm3": "serial"}
_PACKED = (
    "apertus1p5_text aria_text axk1 beam bert bert-generation biogpt bitnet codegen ctrl diffllama electra ernie "
    "exaone flex_olmo flint granite_swa granitemoe_swa hrm_text hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe "
    "kolibri1 mellum mimo_v2_flash minicpm3 minimax_m3_vl_text modernbert-decoder nanochat persimmon sarvam_mla "
    "sarvam_moe solar_open vaultgemma"
)
_SERIAL = (
    "axk2 bart big_bird bigbird_pegasus camembert data2vec-text doge dots3_note_text falcon_mamba gpt_neox_japanese "
    "hy_v4 lara_mini lfm3 mamba mbart megatron-bert minimax mvp rembert roberta roberta-prelayernorm rwkv trocr xglm "
    "xlm-roberta xlm-roberta-xl zaya"
)
SERVED: dict[str, str] = {**dict.fromkeys(_PACKED.split(), "fallback"), **dict.fromkeys(_SERIAL.split(), "serial")}
"""How each type of transformers is served that can be built tiny, where truffula has no architecture for it."""


def small_config(model_type: str, **overrides: Any) -> Any:
    """A configuration of a tiny model: the class's own with small sizes for the fields that it has."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    given = config_class().to_dict()
    changes = {key: value for key, value in _SMALL.items() if given.get(key) is not None}
    kinds = list(dict.fromkeys(given.get("layer_types") or ()))
    if len(kinds) > 1:
        changes["layer_types"] = (kinds * 3)[: max(3, len(kinds))]
        changes["num_hidden_layers"] = len(changes["layer_types"])
    if "kv_lora_rank" in given:
        changes |= _LATENT
    if "is_decoder" in given:
        changes["is_decoder"] = True
    return config_class(**changes | _OF_TYPE.get(model_type, {}) | overrides)


def write_small(folder: Path, config: Any, seed: int = 0) -> Path:
    """Random weights, large enough that mistakes show, as transformers saves them."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
            elif "norm" in name or "ln" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder
