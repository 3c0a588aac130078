"""GGUF families of Gemma 1 to 4 (text), and of Muse Glimmer (text), whose layers have the same four norms."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf.changes import INTERLEAVED, less_one
from truffula.weights.gguf.families import (
    HEAD_NORMS_BLOCK,
    LLAMA_BLOCK,
    POST_NORM_BLOCK,
    TOP,
    Family,
    attention_bias,
    biased,
    expert_count,
    experts,
    windows,
)
from truffula.weights.gguf.hparams import ROPE_FREQS, HParams

_GEMMA2_BLOCK = {
    **POST_NORM_BLOCK, "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_GEMMA3_BLOCK = {**HEAD_NORMS_BLOCK, **_GEMMA2_BLOCK}
_GEMMA4_BLOCK = {
    **_GEMMA3_BLOCK, "ffn_gate_inp": "router.proj", "ffn_gate_exps": "experts.gate_proj",
    "ffn_up_exps": "experts.up_proj", "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1", "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "inp_gate": "per_layer_input_gate", "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm",
}  # fmt: skip
_GEMMA4_WHOLE = {
    "ffn_gate_inp.scale": "router.scale", "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj", "ffn_down_exps.scale": "router.per_expert_scale",
    "layer_output_scale.weight": "layer_scalar",
}  # fmt: skip
_MUSE_TOP = {
    **TOP, "token_embd": "model.language_model.embed_tokens", "output_norm": "model.language_model.norm",
}  # fmt: skip
_GEMMA4_TOP = {
    **TOP, "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}  # fmt: skip


def _gemma2(hparams: HParams, config: dict[str, Any]) -> None:
    windows(hparams, config, every=2, default=4096)
    config["attn_logit_softcapping"] = hparams.real("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = hparams.real("final_logit_softcapping", 30.0)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=46)
    theta = config["rope_parameters"]["rope_theta"]
    hparams.only("rope.freq_base_swa", hparams.real("rope.freq_base_swa", theta), theta)


def _gemma3(hparams: HParams, config: dict[str, Any]) -> None:
    windows(hparams, config, every=6)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=62)
    config["final_logit_softcapping"] = hparams.real("final_logit_softcapping", 0.0) or None
    local = {"rope_type": "default", "rope_theta": hparams.real("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


def _attention_scalar(config: Mapping[str, Any], layers_of_27b: int) -> int:
    """``query_pre_attn_scalar``, for which the format has no key.

    It differs from the head's width in the 27B models only, which llama.cpp also recognises by their number of layers.
    """
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma4(hparams: HParams, config: dict[str, Any]) -> None:
    """``key_length`` and ``freq_base`` are of full layers, the keys that end in ``_swa`` of the others."""
    windows(hparams, config, every=6)
    layers, kinds, tensors = config["num_hidden_layers"], config["layer_types"], hparams.header.tensors
    shared = hparams.optional("attention.shared_kv_layers")
    if shared >= layers:
        raise hparams.error("attention.shared_kv_layers", f"is {shared}, of {layers} layers.")
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    wide, narrow = config["head_dim"], hparams.count("attention.key_length_swa")
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        hparams.only(key, hparams.count(key, narrow), narrow)
    heads = {kind: _of_kind(hparams, kinds, kind, config["num_attention_heads"]) for kind in set(kinds)}
    wide_layer = {"head_dim": wide, "num_key_value_heads": heads.get("full_attention")}
    config |= {
        "head_dim": narrow,
        "num_key_value_heads": heads.get("sliding_attention", heads.get("full_attention")),
        "per_layer_config": {str(index): wide_layer for index in full},
        "num_kv_shared_layers": shared,
        "attention_bias": biased(hparams),
        # Full layers without a value matrix use their keys as values.
        "attention_k_eq_v": bool(full)
        and not {f"blk.{full[0]}.attn_{name}.weight" for name in ("v", "qkv")} & {*tensors},
        "hidden_size_per_layer_input": hparams.optional("embedding_length_per_layer_input"),
        "final_logit_softcapping": hparams.real("final_logit_softcapping", 0.0) or None,
        **_widths(hparams, config, layers - shared),
    }
    table = tensors.get("per_layer_token_embd.weight")
    config["vocab_size_per_layer_input"] = config["vocab_size"] if table is None else table.shape[0]
    config["rope_parameters"] = {
        "full_attention": _proportional(hparams, config["rope_parameters"], wide),
        "sliding_attention": {"rope_type": "default", "rope_theta": hparams.real("rope.freq_base_swa")},
    }
    if hparams.get("expert_count"):
        experts(hparams, config)
        expert_count(hparams)
        config |= {"enable_moe_block": True, "top_k_experts": config.pop("num_experts_per_tok")}


def _of_kind(hparams: HParams, kinds: list[str], kind: str, heads: int) -> int:
    """The number of KV heads of all layers of a type."""
    each = hparams.each("attention.head_count_kv", len(kinds), heads)
    found = {count for count, other in zip(each, kinds, strict=True) if other == kind}
    if len(found) != 1:
        why = f"differs between layers of the type {kind}: {each[:8]}."
        raise hparams.unsupported("attention.head_count_kv", why)
    return found.pop()


def _widths(hparams: HParams, config: Mapping[str, Any], first: int) -> dict[str, Any]:
    """The width of the MLP, which may be twice as large in layers from ``first`` on, which share keys and values."""
    each = hparams.each("feed_forward_length", config["num_hidden_layers"])
    double = bool(each[first:]) and each[-1] == 2 * each[0]
    if each != [each[0]] * len(each[:first]) + [each[0] * (1 + double)] * len(each[first:]):
        raise hparams.unsupported("feed_forward_length", f"differs from layer to layer: {each[:8]}.")
    return {"intermediate_size": each[0], "use_double_wide_mlp": double}


def _proportional(hparams: HParams, rope: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The rotation of full layers: in the table, pairs that are rotated have 1, those that are not at least 1e30."""
    table = hparams.tables.pop(ROPE_FREQS, None)
    if table is None or rope["rope_type"] != "default":
        what = "is missing" if table is None else f"is given with the rope scaling {rope['rope_type']}"
        raise CheckpointError(f"{ROPE_FREQS} {what}, in a {hparams.architecture} file.", param=ROPE_FREQS)
    factors = np.asarray(table, np.float64).reshape(-1)
    rotated = int((factors == 1.0).sum())
    if 2 * factors.size != width or not (factors[:rotated] == 1.0).all() or not (factors[rotated:] >= 1e30).all():
        raise UnsupportedModel(
            f"{ROPE_FREQS} is {factors[:8].tolist()}…; expected {width // 2} numbers, first 1, then 1e30.",
            param=ROPE_FREQS,
        )
    return {"rope_type": "proportional", "rope_theta": rope["rope_theta"],
            "partial_rotary_factor": rotated / factors.size}  # fmt: skip


def _muse(hparams: HParams, config: dict[str, Any]) -> None:
    """The factor of q is in the file as a norm of q, of which k has one of ones; layers with a window are rotated."""
    layers = config["num_hidden_layers"]
    found = {letter: set[float]() for letter in "qk"}
    for layer, letter in product(range(layers), found):
        values = hparams.tables.pop(f"blk.{layer}.attn_{letter}_norm.weight", 0.0)
        found[letter] |= {float(value) for value in np.unique(values)}
    if len(found["q"]) != 1 or not min(found["q"]) > 0 or found["k"] != {1.0}:
        why = f"a muse-glimmer file has norms of q of one positive number and norms of k of ones, not {found}"
        raise UnsupportedModel(f"{why}.", param="blk.0.attn_q_norm.weight")
    theta = config["rope_parameters"]["rope_theta"]
    hparams.only("rope.freq_base_swa", hparams.real("rope.freq_base_swa", theta), theta)
    windows(hparams, config)
    ids = {key: config.pop(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    text = config | {
        "model_type": "muse_glimmer_text",
        "layer_rope_theta": [theta if kind == "sliding_attention" else 0.0 for kind in config["layer_types"]],
        "qk_scale_factor": float(str(np.float32(found["q"].pop()))),
        "output_multiplier": hparams.real("logit_scale"),
        "final_logit_softcapping": hparams.real("final_logit_softcapping"),
    }
    whole = {"model_type": config["model_type"], "architectures": text.pop("architectures")}
    config.clear()
    config.update(whole | ids | {"text_config": text})


FAMILIES: Mapping[str, Family] = {
    "gemma": Family("gemma", "GemmaForCausalLM", LLAMA_BLOCK, attention_bias, changes=less_one(LLAMA_BLOCK),
                    factors=False),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _GEMMA2_BLOCK, _gemma2, changes=less_one(_GEMMA2_BLOCK),
                     factors=False),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA3_BLOCK, _gemma3, changes=less_one(_GEMMA3_BLOCK),
                     default_theta=None, factors=False),
    "gemma4": Family("gemma4_text", "Gemma4ForCausalLM", _GEMMA4_BLOCK, _gemma4, whole=_GEMMA4_WHOLE, top=_GEMMA4_TOP,
                     default_theta=None, factors=False, by_layer=True),
    "muse-glimmer": Family("muse_glimmer", "MuseGlimmerForConditionalGeneration",
                           {**_GEMMA2_BLOCK, "attn_gate": "self_attn.gate_proj"}, _muse, factors=False,
                           layers="model.language_model.layers.", top=_MUSE_TOP,
                           read=r"blk\.\d+\.attn_[qk]_norm\.weight",
                           changes={**INTERLEAVED, **less_one(_GEMMA2_BLOCK)}),
}  # fmt: skip
