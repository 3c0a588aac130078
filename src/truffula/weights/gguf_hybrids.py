"""GGUF families with layers that keep a state instead of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from truffula.errors import CheckpointError
from truffula.weights.gguf_changes import CONV
from truffula.weights.gguf_families import Family, implied_head_dim
from truffula.weights.gguf_hparams import HParams

_LFM2_BLOCK = {
    "attn_norm": "operator_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}


def _lfm2(hparams: HParams, config: dict[str, Any]) -> None:
    """Layers without KV heads have a convolution. The width of the MLP is the adjusted one."""
    each, layers, name = hparams.get("attention.head_count_kv"), config["num_hidden_layers"], "attention.head_count_kv"
    if not isinstance(each, list) or len(each) != layers or any(type(count) is not int for count in each):
        raise CheckpointError(
            f"{hparams.name(name)} is {each!r}; expected {layers} integers.", param=hparams.name(name)
        )
    config["layer_types"] = ["full_attention" if count else "conv" for count in each]
    config["block_auto_adjust_ff_dim"] = False
    config["conv_L_cache"] = hparams.count("shortconv.l_cache")
    implied_head_dim(hparams, config)


FAMILIES: Mapping[str, Family] = {
    "lfm2": Family("lfm2", "Lfm2ForCausalLM", _LFM2_BLOCK, _lfm2, eps=("attention.layer_norm_rms_epsilon", "norm_eps"),
                   changes={"conv.conv": CONV},
                   whole={"token_embd_norm.weight": "model.embedding_norm.weight"}),
}  # fmt: skip
