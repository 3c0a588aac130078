"""GGUF families with module names of their own: GPT-2, StarCoder 1, GPT-NeoX (Pythia), BLOOM, Falcon and MPT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from truffula.weights.gguf.changes import Change, Config, Order, grouped
from truffula.weights.gguf.families import LAYER_NORM, Family, biased, partly_rotated
from truffula.weights.gguf.header import GgufHeader
from truffula.weights.gguf.hparams import HParams

_EPS = (LAYER_NORM[0], "layer_norm_epsilon")
_GPT2_BLOCK = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_NEOX_BLOCK = {
    "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip
_BLOOM_BLOCK = {**_NEOX_BLOCK, "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"}
_MPT_BLOCK = {
    "attn_norm": "norm_1", "attn_qkv": "attn.Wqkv", "attn_output": "attn.out_proj", "ffn_norm": "norm_2",
    "ffn_up": "ffn.up_proj", "ffn_down": "ffn.down_proj",
}  # fmt: skip
_TURNED = Change(shape=lambda config, shape: shape[::-1], values=lambda config, matrix: matrix.T)
"""GPT-2's matrices, which its checkpoints have as [in, out]."""


def _per_head(config: Config, n: int) -> Order:
    """q, k and v of each head, of which a file has all q, all k, then all v."""
    return grouped(config["num_attention_heads"], 3)


def _per_kv_head(config: Config, n: int) -> Order:
    """Of each KV head its query heads, k and v, of which a file has all q, all k, then all v."""
    heads, kv_heads = config["num_attention_heads"], config.get("num_kv_heads", 1)
    queries, keys = np.arange(heads).reshape(kv_heads, -1), heads + np.arange(kv_heads)[:, None]
    return np.concatenate([queries, keys, keys + kv_heads], axis=1).reshape(-1)


def _square(hparams: HParams, config: dict[str, Any]) -> None:
    """Checks what the class has no keys for: heads of hidden / heads, as many keys as queries."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.pop("num_key_value_heads")
    if config.pop("head_dim") * heads != hidden or kv_heads != heads:
        why = f"heads of {hidden} / {heads} columns, each with keys of its own, are supported in a file of this kind"
        raise hparams.unsupported("attention.head_count", f"is {heads}; {why}.")


def _without_rope(hparams: HParams, config: dict[str, Any]) -> None:
    _square(hparams, config)
    if config.pop("rope_parameters")["rope_type"] != "default":
        why = f"scales a rotary embedding; {hparams.architecture} has no rotary embedding."
        raise hparams.unsupported("rope.scaling.type", why)


def _four(hparams: HParams, config: dict[str, Any]) -> None:
    """The MLP is four times as wide, for which the class has no key."""
    _without_rope(hparams, config)
    hparams.only("feed_forward_length", config.pop("intermediate_size"), 4 * config["hidden_size"])


def _starcoder(hparams: HParams, config: dict[str, Any]) -> None:
    """One KV head: the converter does not know others."""
    hparams.only("attention.head_count_kv", config["num_key_value_heads"], 1)
    config["num_key_value_heads"] = config["num_attention_heads"]
    _without_rope(hparams, config)


def _neox(hparams: HParams, config: dict[str, Any]) -> None:
    partly_rotated(hparams, config)
    _square(hparams, config)
    config["use_parallel_residual"] = hparams.flag("use_parallel_residual", None)
    config["attention_bias"] = biased(hparams)


def _mpt(hparams: HParams, config: dict[str, Any]) -> None:
    _four(hparams, config)
    hparams.only("attention.max_alibi_bias", hparams.real("attention.max_alibi_bias", 0.0), 8.0)
    config["attn_config"] = {"alibi": True, "clip_qkv": hparams.real("attention.clamp_kqv", 0.0) or None}


def _falcon(hparams: HParams, config: dict[str, Any]) -> None:
    """The converter and llama.cpp know rotated, parallel layers without biases."""
    kv_heads = config["num_key_value_heads"]
    config["num_key_value_heads"] = config["num_attention_heads"]
    _square(hparams, config)
    if config["num_attention_heads"] % kv_heads:
        why = f"is {kv_heads}, for {config['num_attention_heads']} heads."
        raise hparams.unsupported("attention.head_count_kv", why)
    two = _two_norms(hparams.header)
    if two or kv_heads > 1:
        config |= {"new_decoder_architecture": True, "num_kv_heads": kv_heads, "num_ln_in_parallel_attn": 1 + two}


def _two_norms(header: GgufHeader) -> bool:
    return "blk.0.attn_norm_2.weight" in header.tensors


_GPT2_TOP = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head",
}  # fmt: skip
_NEOX_TOP = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"}
_BLOOM_TOP = {
    "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f", "output": "lm_head",
}  # fmt: skip
_MPT_TOP = {"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"}
_TURNED_ONES = {f"{_GPT2_BLOCK[name]}.weight": _TURNED for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}
_FALCON = Family(
    "falcon", "FalconForCausalLM", _BLOOM_BLOCK, _falcon, eps=_EPS, layers="transformer.h.", top=_BLOOM_TOP,
    keys={"intermediate_size": "ffn_hidden_size"},
    changes={"self_attention.query_key_value": Change(rows=_per_kv_head)},
)  # fmt: skip
_FALCON_40B = replace(_FALCON, block={**_BLOOM_BLOCK, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"})
FAMILIES: Mapping[str, Family] = {
    "gpt2": Family("gpt2", "GPT2LMHeadModel", _GPT2_BLOCK, _without_rope, eps=_EPS, layers="transformer.h.",
                   top=_GPT2_TOP, keys={"intermediate_size": "n_inner"}, changes=_TURNED_ONES),
    "starcoder": Family("gpt_bigcode", "GPTBigCodeForCausalLM", _GPT2_BLOCK, _starcoder, eps=_EPS,
                        layers="transformer.h.", top=_GPT2_TOP, keys={"intermediate_size": "n_inner"}),
    "gptneox": Family("gpt_neox", "GPTNeoXForCausalLM", _NEOX_BLOCK, _neox, layers="gpt_neox.layers.", top=_NEOX_TOP,
                      eps=LAYER_NORM, partial=True,
                      changes={"attention.query_key_value": Change(rows=_per_head)}),
    "bloom": Family("bloom", "BloomForCausalLM", _BLOOM_BLOCK, _four, eps=_EPS, layers="transformer.h.",
                    top=_BLOOM_TOP, keys={"max_position_embeddings": "seq_length"},
                    changes={"self_attention.query_key_value": Change(rows=_per_head)}),
    "falcon": replace(_FALCON, variant=lambda header: _FALCON_40B if _two_norms(header) else None),
    "mpt": Family("mpt", "MptForCausalLM", _MPT_BLOCK, _mpt, eps=_EPS, layers="transformer.blocks.", top=_MPT_TOP,
                  keys={"max_position_embeddings": "max_seq_len"}),
}  # fmt: skip
