"""A GGUF file's metadata as a config.json, and its tensor names as those of a Hugging Face checkpoint.

One row per architecture. ``gguf_hparams.check_unread_keys`` then checks every key that was not read. Sources:
llama.cpp's converters, whose changes to tensors are reversed here, and its loader.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf_header import GgufHeader
from truffula.weights.gguf_hparams import ROPE_FREQS, HParams, rope_parameters

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
_QWEN2_MOE_BLOCK = {
    **_LLAMA_BLOCK,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_QWEN3_MOE_BLOCK = {
    **_QWEN3_BLOCK,
    **{key: _QWEN2_MOE_BLOCK[key] for key in ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")},
}
# Mixtral's files are of the architecture llama.
_MIXTRAL_BLOCK = {
    **_LLAMA_BLOCK,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.w1",
    "ffn_up_exps": "block_sparse_moe.experts.w3",
    "ffn_down_exps": "block_sparse_moe.experts.w2",
}
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
    """The mapping of one GGUF architecture to a model type. ``permuted``: rows of q and k are interleaved; ``shifted``:
    norms hold 1 + weight. ``default_theta`` None: the file must contain ``rope.freq_base``.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str]
    extra: Callable[[HParams, dict[str, Any]], None]
    permuted: bool = False
    shifted: bool = False
    default_theta: float | None = 10000.0


# Other kinds of GGUF files, by ``general.type``.
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
    if architecture == "llama" and header.metadata.get("llama.expert_count"):
        return _MIXTRAL
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

    ``tie_word_embeddings`` is not in it: a GGUF file of a tied model has no ``output.weight``.
    ``rope_factors`` are the values of ``rope_freqs.weight``, or None.
    """
    architecture = header.metadata["general.architecture"]
    hparams = HParams(architecture, header)
    hidden, heads = hparams.count("embedding_length"), hparams.count("attention.head_count")
    width = _head_dim(hparams, hidden, heads)
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.class_name],
        "hidden_size": hidden,
        "intermediate_size": hparams.count("feed_forward_length"),
        "num_hidden_layers": _layers(hparams, len(header.tensors)),
        "num_attention_heads": heads,
        "num_key_value_heads": hparams.count("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": hparams.count("context_length"),
        "rms_norm_eps": hparams.real("attention.layer_norm_rms_epsilon"),
        "vocab_size": _vocab_size(hparams),
        "rope_parameters": rope_parameters(hparams, family.default_theta, rope_factors, width, warnings),
    }
    for key, ggml in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = header.metadata.get(f"tokenizer.ggml.{ggml}_token_id")
        if isinstance(value, int) and value < config["vocab_size"]:
            config[key] = value
    family.extra(hparams, config)
    if family.shifted and rope_factors is not None:
        raise UnsupportedModel(f"{ROPE_FREQS} is not supported in a {architecture} file.", param=ROPE_FREQS)
    return config


def _layers(hparams: HParams, tensors: int) -> int:
    """The number of layers, which bounds the length of lists: a file has at least as many tensors."""
    count = hparams.count("block_count")
    if count > tensors:
        key = hparams.name("block_count")
        raise CheckpointError(f"{key} is {count}, in a file with {tensors} tensors.", param=key)
    return count


def _head_dim(hparams: HParams, hidden: int, heads: int) -> int:
    width = hparams.count("attention.key_length", max(hidden // heads, 1))
    for key, why in (
        ("attention.value_length", "values must be as wide as keys"),
        ("rope.dimension_count", "partial rotation is not supported"),
    ):
        found, name = hparams.count(key, width), hparams.name(key)
        if found != width:
            raise UnsupportedModel(f"{name} is {found}, for heads {width} wide: {why}.", param=name)
    return width


def _vocab_size(hparams: HParams) -> int:
    table = hparams.header.tensors.get("token_embd.weight") or hparams.header.tensors.get("output.weight")
    return table.shape[0] if table is not None else hparams.count("vocab_size")


def _llama(hparams: HParams, config: dict[str, Any]) -> None:
    window = hparams.get("attention.sliding_window")
    if window:  # only Mistral's files of this architecture have one
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)
    _attention_bias(hparams, config)
    if "blk.0.ffn_up.bias" in hparams.header.tensors:
        config["mlp_bias"] = True


def _experts(hparams: HParams) -> int:
    """The number of experts, which the file's routers must have too: a dense file may state one by mistake."""
    count, name = hparams.count("expert_count"), hparams.name("expert_count")
    router = hparams.header.tensors.get("blk.0.ffn_gate_inp.weight")
    if router is None:
        raise UnsupportedModel(
            f"{name} is {count}, in a file without blk.0.ffn_gate_inp.weight, the router of the first layer; supported "
            "are models with experts in every layer.",
            param=name,
        )
    if router.shape[0] != count:
        raise CheckpointError(
            f"{name} is {count}, and the router blk.0.ffn_gate_inp.weight has {router.shape[0]} rows.", param=name
        )
    return count


def _mixtral(hparams: HParams, config: dict[str, Any]) -> None:
    config["num_local_experts"] = _experts(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")


def _qwen2_moe(hparams: HParams, config: dict[str, Any]) -> None:
    _qwen3_moe(hparams, config)
    _qwen2(hparams, config)
    config["shared_expert_intermediate_size"] = hparams.count("expert_shared_feed_forward_length")
    config["norm_topk_prob"] = False


def _qwen3_moe(hparams: HParams, config: dict[str, Any]) -> None:
    """llama.cpp divides the weights of the chosen experts by their sum: the format has no key for it here."""
    config["num_experts"] = _experts(hparams)
    config["num_experts_per_tok"] = hparams.count("expert_used_count")
    config["moe_intermediate_size"] = hparams.count("expert_feed_forward_length")
    config["norm_topk_prob"] = True
    if "blk.0.attn_q.bias" in hparams.header.tensors and config["model_type"] == "qwen3_moe":
        config["attention_bias"] = True


def _qwen2(hparams: HParams, config: dict[str, Any]) -> None:
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]  # the class has no such field; kept only when it differs from the class's computed value


def _attention_bias(hparams: HParams, config: dict[str, Any]) -> None:
    if "blk.0.attn_q.bias" in hparams.header.tensors:
        config["attention_bias"] = True


def _gemma2(hparams: HParams, config: dict[str, Any]) -> None:
    config["sliding_window"] = hparams.count("attention.sliding_window", 4096)
    config["layer_types"] = _layer_types(hparams, config["num_hidden_layers"], every=2)
    config["attn_logit_softcapping"] = hparams.real("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = hparams.real("final_logit_softcapping", 30.0)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=46)
    theta, local = config["rope_parameters"]["rope_theta"], hparams.get("rope.freq_base_swa")
    if local is not None and hparams.real("rope.freq_base_swa") != theta:
        name = hparams.name("rope.freq_base_swa")
        raise UnsupportedModel(f"{name} is {local}; gemma2 has one base for all layers, here {theta}.", param=name)


def _gemma3(hparams: HParams, config: dict[str, Any]) -> None:
    config["sliding_window"] = hparams.count("attention.sliding_window")
    config["layer_types"] = _layer_types(hparams, config["num_hidden_layers"], every=6)
    config["query_pre_attn_scalar"] = _attention_scalar(config, layers_of_27b=62)
    cap = hparams.get("final_logit_softcapping")
    config["final_logit_softcapping"] = hparams.real("final_logit_softcapping") if cap else None
    local = {"rope_type": "default", "rope_theta": hparams.real("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


def _attention_scalar(config: Mapping[str, Any], layers_of_27b: int) -> int:
    """``query_pre_attn_scalar``, for which the format has no key.

    It differs from the head's width in the 27B models only, which llama.cpp also recognises by their number of layers.
    """
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _layer_types(hparams: HParams, layers: int, every: int) -> list[str]:
    """The type of each layer, from a list of booleans (true: sliding) or a period: every n-th is full, none for 0."""
    pattern = hparams.get("attention.sliding_window_pattern", every)
    if not isinstance(pattern, list):
        none_is_full = type(pattern) is int and pattern == 0
        period = layers + 1 if none_is_full else hparams.count("attention.sliding_window_pattern", every)
        pattern = [(layer + 1) % period != 0 for layer in range(layers)]
    if len(pattern) != layers:
        name = hparams.name("attention.sliding_window_pattern")
        raise CheckpointError(f"{name} has {len(pattern)} entries for {layers} layers.", param=name)
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


_MIXTRAL = Family("mixtral", "MixtralForCausalLM", _MIXTRAL_BLOCK, _mixtral, permuted=True)
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", _LLAMA_BLOCK, _llama, permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LLAMA_BLOCK, _qwen2),
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN2_MOE_BLOCK, _qwen2_moe),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _QWEN3_BLOCK, _attention_bias),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE_BLOCK, _qwen3_moe),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _GEMMA2_BLOCK, _gemma2, shifted=True),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA3_BLOCK, _gemma3, shifted=True, default_theta=None),
}
