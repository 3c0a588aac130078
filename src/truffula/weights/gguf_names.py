"""A GGUF file's metadata as a config.json, and its tensor names as those of a Hugging Face checkpoint.

One row per architecture. ``gguf_facts.account`` then judges every key that was not read. Sources: the converters of
llama.cpp (what they do to a tensor is undone here) and its loader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf_facts import Facts
from truffula.weights.gguf_header import GgufHeader
from truffula.weights.gguf_rope import ROPE_FREQS, rope_parameters

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_BLOCK = {**_BLOCK, "ffn_norm": "post_attention_layernorm"}
_QWEN3_BLOCK = {**_LLAMA_BLOCK, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2_BLOCK = {
    **_BLOCK,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA3_BLOCK = {**_GEMMA2_BLOCK, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture maps. ``permuted``: rows of q and k are interleaved; ``shifted``: norms hold 1 +
    weight. ``default_theta`` None: the file must state ``rope.freq_base``.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str]
    extra: Callable[[Facts, dict[str, Any]], None]
    permuted: bool = False
    shifted: bool = False
    default_theta: float | None = 10000.0


# What else is published as a GGUF file, by its ``general.type``.
_OTHER_KINDS = {
    "adapter": "a LoRA adapter; adapters are read in PEFT's format (adapter_config.json and safetensors)",
    "imatrix": "statistics for quantising a model",
    "mmproj": "the image encoder of a model; give the file of the language model",
    "vocab": "a vocabulary without weights",
}


def family_of(header: GgufHeader) -> Family:
    """The row of the table for ``general.architecture``. Raises ``UnsupportedModel`` naming it."""
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        what = _OTHER_KINDS.get(kind, "not a language model") if isinstance(kind, str) else "not a language model"
        raise UnsupportedModel(f"general.type is {kind!r}: this file is {what}.", param="general.type")
    architecture = header.metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise UnsupportedModel(
            f"general.architecture is {architecture!r}; supported in GGUF files are {', '.join(FAMILIES)}.",
            param="general.architecture",
        )
    return family


def rename(family: Family, name: str) -> str | None:
    """The Hugging Face name of a tensor, or None for one that this family does not have."""
    stem, dot, kind = name.rpartition(".")
    if not dot or kind not in {"weight", "bias"}:
        return None
    match = re.fullmatch(r"blk\.(0|[1-9]\d*)\.([a-z0-9_]+)", stem)
    if match is None:
        top = _TOP.get(stem)
        return f"{top}.{kind}" if top else None
    part = family.block.get(match[2])
    return f"model.layers.{match[1]}.{part}.{kind}" if part else None


def to_config(header: GgufHeader, family: Family, rope_factors: Any, warnings: list[str]) -> dict[str, Any]:
    """The config.json that this file's metadata describes.

    ``tie_word_embeddings`` is not in it: a GGUF file states tying by having no ``output.weight``.
    ``rope_factors`` are the values of ``rope_freqs.weight``, or None.
    """
    architecture = header.metadata["general.architecture"]
    facts = Facts(architecture, header)
    hidden, heads = facts.count("embedding_length"), facts.count("attention.head_count")
    width = _head_dim(facts, hidden, heads)
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.class_name],
        "hidden_size": hidden,
        "intermediate_size": facts.count("feed_forward_length"),
        "num_hidden_layers": _layers(facts, len(header.tensors)),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.count("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": facts.count("context_length"),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "vocab_size": _vocab_size(facts),
        "rope_parameters": rope_parameters(facts, family.default_theta, rope_factors, width, warnings),
    }
    for key, ggml in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = header.metadata.get(f"tokenizer.ggml.{ggml}_token_id")
        if isinstance(value, int) and value < config["vocab_size"]:
            config[key] = value
    family.extra(facts, config)
    if family.shifted and rope_factors is not None:
        raise UnsupportedModel(f"{ROPE_FREQS} is not supported in a {architecture} file.", param=ROPE_FREQS)
    return config


def _layers(facts: Facts, tensors: int) -> int:
    """How many layers; no more than there are tensors, as lists are made of so many."""
    count = facts.count("block_count")
    if count > tensors:
        key = facts.name("block_count")
        raise CheckpointError(f"{key} is {count}, in a file with {tensors} tensors.", param=key)
    return count


def _head_dim(facts: Facts, hidden: int, heads: int) -> int:
    width = facts.count("attention.key_length", max(hidden // heads, 1))
    value = facts.count("attention.value_length", width)
    rotary = facts.count("rope.dimension_count", width)
    if value != width:
        name = facts.name("attention.value_length")
        raise UnsupportedModel(f"{name} is {value} and keys are {width} wide; they must be equal.", param=name)
    if rotary != width:
        name = facts.name("rope.dimension_count")
        raise UnsupportedModel(
            f"{name} is {rotary} of a head of {width}; partial rotation is not supported.", param=name
        )
    return width


def _vocab_size(facts: Facts) -> int:
    table = facts.header.tensors.get("token_embd.weight") or facts.header.tensors.get("output.weight")
    return table.shape[0] if table is not None else facts.count("vocab_size")


def _llama(facts: Facts, config: dict[str, Any]) -> None:
    window = facts.get("attention.sliding_window")
    if window:  # only Mistral's files of this architecture have one
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)
    names = facts.header.tensors
    if "blk.0.attn_q.bias" in names:
        config["attention_bias"] = True
    if "blk.0.ffn_up.bias" in names:
        config["mlp_bias"] = True


def _qwen2(facts: Facts, config: dict[str, Any]) -> None:
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]  # the class has no such field; written only where it says something


def _qwen3(facts: Facts, config: dict[str, Any]) -> None:
    if "blk.0.attn_q.bias" in facts.header.tensors:
        config["attention_bias"] = True


def _gemma2(facts: Facts, config: dict[str, Any]) -> None:
    config["sliding_window"] = facts.count("attention.sliding_window", 4096)
    config["layer_types"] = _layer_types(facts, config["num_hidden_layers"], every=2)
    config["attn_logit_softcapping"] = facts.real("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = facts.real("final_logit_softcapping", 30.0)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=46)
    theta, local = config["rope_parameters"]["rope_theta"], facts.get("rope.freq_base_swa")
    if local is not None and facts.real("rope.freq_base_swa") != theta:
        name = facts.name("rope.freq_base_swa")
        raise UnsupportedModel(f"{name} is {local}; gemma2 has one base for all layers, here {theta}.", param=name)


def _gemma3(facts: Facts, config: dict[str, Any]) -> None:
    config["sliding_window"] = facts.count("attention.sliding_window")
    config["layer_types"] = _layer_types(facts, config["num_hidden_layers"], every=6)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=62)
    cap = facts.get("final_logit_softcapping")
    config["final_logit_softcapping"] = facts.real("final_logit_softcapping") if cap else None
    local = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


def _attention_scalar(config: Mapping[str, Any], layers_of_27b: int) -> int:
    """The format has no key for it. Only in the 27B models is it not the head's width; llama.cpp also tells them by
    their number of layers.
    """
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _layer_types(facts: Facts, layers: int, every: int) -> list[str]:
    """Of each layer, from a list of booleans (true: it slides) or a period: every n-th layer is full, none for 0."""
    pattern = facts.get("attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        none_is_full = type(pattern) is int and pattern == 0
        period = layers + 1 if none_is_full else facts.count("attention.sliding_window_pattern", every)
        pattern = [(layer + 1) % period != 0 for layer in range(layers)]
    if len(pattern) != layers:
        name = facts.name("attention.sliding_window_pattern")
        raise CheckpointError(f"{name} has {len(pattern)} entries for {layers} layers.", param=name)
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", _LLAMA_BLOCK, _llama, permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LLAMA_BLOCK, _qwen2),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _QWEN3_BLOCK, _qwen3),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _GEMMA2_BLOCK, _gemma2, shifted=True),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA3_BLOCK, _gemma3, shifted=True, default_theta=None),
}
