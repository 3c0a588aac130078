"""GGUF's words for a model turned into Hugging Face's: metadata to a config.json, tensor names to checkpoint names.

One row per architecture. What a file says and no row accounts for is refused when it changes the mathematics, and a
warning otherwise. Sources: the converters of llama.cpp (what was done to a tensor, undone here) and its
hyperparameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf_header import GgufHeader

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
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture maps. ``permuted``: rows of q and k are interleaved; ``shifted``: norms hold 1 +
    weight.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str]
    extra: Callable[[_Facts, dict[str, Any]], None]
    permuted: bool = False
    shifted: bool = False
    default_theta: float = 10000.0


@dataclass(frozen=True)
class _Facts:
    """The hyperparameters of a file under its architecture's prefix."""

    architecture: str
    header: GgufHeader
    theta: float

    def get(self, key: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list (one per layer) must repeat one value."""
        name, value = f"{self.architecture}.{key}", self.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModel(f"{name} differs from layer to layer: {value[:8]}…", param=name)
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"the GGUF metadata key {name} is {value!r}; a positive integer is needed.", param=name
            )
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number. Stored as float32: its shortest spelling is the number that was meant (1e-05)."""
        name, value = f"{self.architecture}.{key}", self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"the GGUF metadata key {name} is {value!r}; a finite number is needed.", param=name)
        return float(str(np.float32(value)))


def family_of(header: GgufHeader) -> Family:
    """The row of the table for ``general.architecture``. Raises ``UnsupportedModel`` naming it."""
    architecture = header.metadata.get("general.architecture")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(
            f"general.architecture is {architecture!r}; of GGUF files {known} are read.", param="general.architecture"
        )
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(
            f"the model is split over {header.metadata['split.count']} GGUF files; "
            "join them with llama-gguf-split --merge.",
            param="split.count",
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
    facts = _Facts(architecture, header, 0.0)
    facts = _Facts(architecture, header, facts.real("rope.freq_base", family.default_theta))
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
        "rope_parameters": _rope(facts, rope_factors, width),
    }
    for key, ggml in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = header.metadata.get(f"tokenizer.ggml.{ggml}_token_id")
        if isinstance(value, int) and value < config["vocab_size"]:
            config[key] = value
    family.extra(facts, config)
    if family.shifted and rope_factors is not None:
        raise UnsupportedModel(f"{ROPE_FREQS} in a {architecture} file is not read.", param=ROPE_FREQS)
    _account(facts, warnings)
    return config


def _layers(facts: _Facts, tensors: int) -> int:
    """How many layers; no more than there are tensors, as lists are made of so many."""
    count = facts.count("block_count")
    if count > tensors:
        key = f"{facts.architecture}.block_count"
        raise CheckpointError(f"{key} is {count}, of a file with {tensors} tensors.", param=key)
    return count


def _head_dim(facts: _Facts, hidden: int, heads: int) -> int:
    width = facts.count("attention.key_length", max(hidden // heads, 1))
    value = facts.count("attention.value_length", width)
    rotary = facts.count("rope.dimension_count", width)
    if value != width:
        raise UnsupportedModel(f"keys are {width} wide and values {value}; one width is read.", param="head_dim")
    if rotary != width:
        raise UnsupportedModel(
            f"{facts.architecture}.rope.dimension_count is {rotary} of a head of {width}; "
            "partial rotation is not read.",
            param=f"{facts.architecture}.rope.dimension_count",
        )
    return width


def _vocab_size(facts: _Facts) -> int:
    table = facts.header.tensors.get("token_embd.weight") or facts.header.tensors.get("output.weight")
    return table.shape[0] if table is not None else facts.count("vocab_size")


def _rope(facts: _Facts, factors: Any, width: int) -> dict[str, Any]:
    """``rope_parameters`` of the whole model; gemma 3 nests it afterwards."""
    kind = facts.get("rope.scaling.type", "linear" if facts.get("rope.scale_linear") else "none")
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.theta}
    if factors is not None:
        if kind != "none":
            raise UnsupportedModel(f"both {ROPE_FREQS} and rope.scaling.type {kind!r} are given.", param=ROPE_FREQS)
        factors = np.asarray(factors, np.float64).reshape(-1)
        if 2 * factors.size != width:
            raise CheckpointError(
                f"{ROPE_FREQS} holds {factors.size} factors for heads {width} wide.", param=ROPE_FREQS
            )
        return fit_llama3(factors, facts.theta)
    if kind == "none":
        return base
    factor = facts.real("rope.scaling.factor", facts.get("rope.scale_linear", 1.0))
    if kind == "linear":
        return base if factor == 1.0 else {**base, "rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModel(f"rope.scaling.type {kind!r} is not read.", param="rope.scaling.type")
    yarn = {**base, "rope_type": "yarn", "factor": factor}
    yarn["original_max_position_embeddings"] = facts.count(
        "rope.scaling.original_context_length", facts.count("context_length")
    )
    for name in ("beta_fast", "beta_slow"):
        if facts.get(f"rope.scaling.yarn_{name}") is not None:
            yarn[name] = facts.real(f"rope.scaling.yarn_{name}")
    return yarn


def fit_llama3(factors: Any, theta: float) -> dict[str, Any]:
    """The ``llama3`` scaling whose frequency divisors are ``factors`` ``[head_dim / 2]``.

    A GGUF file keeps the table in place of its four parameters. Scaling the original length and both band edges
    together leaves the table as it is, so the low edge is set to 1, as all published models have it, and the rest
    follows.

    Raises:
        UnsupportedModel: No such scaling gives this table to within float32.
    """
    plain = {"rope_type": "default", "rope_theta": theta}
    if np.all(factors == 1.0):
        return plain
    turns = theta ** (-np.arange(factors.size) / factors.size) / (2 * math.pi)  # revolutions per position
    if not np.isfinite(factors).all() or factors.min() < 1.0:
        raise UnsupportedModel(f"{ROPE_FREQS} holds factors below 1, which no llama3 scaling has.", param=ROPE_FREQS)
    factor = float(factors.max())
    between = (factors > 1.0) & (factors < factor)
    guesses = [(8192.0, 4.0)]
    if between.sum() >= 2 and factor > 1.0:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)  # (original * turns - low) / (high - low)
        slope, intercept = np.polyfit(turns[between], smooth, 1)
        if intercept < 0 < slope:
            high = 1 - 1 / intercept
            guesses.append((float(round(slope * (high - 1))), round(high, 3)))
    for original, high in guesses:
        smooth = np.clip((original * turns - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=2e-6, atol=0):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            }
    raise UnsupportedModel(
        f"{ROPE_FREQS} is no llama3 scaling; other tables of factors are not read.", param=ROPE_FREQS
    )


def _llama(facts: _Facts, config: dict[str, Any]) -> None:
    window = facts.get("attention.sliding_window")
    if window:  # only Mistral's files of this architecture have one
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)
    names = facts.header.tensors
    if "blk.0.attn_q.bias" in names:
        config["attention_bias"] = True
    if "blk.0.ffn_up.bias" in names:
        config["mlp_bias"] = True


def _qwen2(facts: _Facts, config: dict[str, Any]) -> None:
    _no_window(facts)
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]  # the class has no such field; written only where it says something


def _qwen3(facts: _Facts, config: dict[str, Any]) -> None:
    _no_window(facts)
    if "blk.0.attn_q.bias" in facts.header.tensors:
        config["attention_bias"] = True


def _no_window(facts: _Facts) -> None:
    if facts.get("attention.sliding_window"):
        name = f"{facts.architecture}.attention.sliding_window"
        raise UnsupportedModel(f"the GGUF metadata key {name} is not read.", param=name)


def _gemma2(facts: _Facts, config: dict[str, Any]) -> None:
    config["sliding_window"] = facts.count("attention.sliding_window", 4096)
    config["attn_logit_softcapping"] = facts.real("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = facts.real("final_logit_softcapping", 30.0)
    # The format has no field for the scale; only the 27B model's is not the head's width, and llama.cpp knows it so
    # too.
    width = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = width if config["num_hidden_layers"] == 46 else config["head_dim"]


def _gemma3(facts: _Facts, config: dict[str, Any]) -> None:
    config["sliding_window"] = facts.count("attention.sliding_window", 1024)
    width = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = width if config["num_hidden_layers"] == 62 else config["head_dim"]
    cap = facts.get("final_logit_softcapping")
    config["final_logit_softcapping"] = facts.real("final_logit_softcapping") if cap else None
    layers = config["num_hidden_layers"]
    pattern = facts.get("attention.sliding_window_pattern", 6)
    if not isinstance(pattern, list):
        every = facts.count("attention.sliding_window_pattern", 6)
        pattern = [(layer + 1) % every != 0 for layer in range(layers)]
    if len(pattern) != layers:
        name = "gemma3.attention.sliding_window_pattern"
        raise CheckpointError(f"{name} has {len(pattern)} entries for {layers} layers.", param=name)
    config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    local = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", _LLAMA_BLOCK, _llama, permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LLAMA_BLOCK, _qwen2),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _QWEN3_BLOCK, _qwen3),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _GEMMA2_BLOCK, _gemma2, shifted=True),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _GEMMA3_BLOCK, _gemma3, shifted=True, default_theta=1e6),
}
_READ = {
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "context_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    # said of how the model was made; nothing is computed from them
    "rope.scaling.finetuned",
    "tensor_data_layout",
}
_READ_BY = {
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3": {"final_logit_softcapping", "attention.sliding_window_pattern", "rope.freq_base_swa"},
}
# Without effect at these values; at any other they change the result.
_NEUTRAL: Mapping[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


def _account(facts: _Facts, warnings: list[str]) -> None:
    """Every hyperparameter of the file was read, is neutral, or is refused or warned of by name."""
    prefix = f"{facts.architecture}."
    suspicious = re.compile(
        r"^(attention|rope|expert|ssm|leading_dense|nextn|pooling|classifier|.*scale|.*softcapping)"
    )
    for name in facts.header.metadata:
        key = name.removeprefix(prefix)
        if not name.startswith(prefix) or key in _READ or key in _READ_BY.get(facts.architecture, set()):
            continue
        value = facts.header.metadata[name]
        if key in _NEUTRAL and value == _NEUTRAL[key]:
            continue
        if suspicious.match(key) or key in _NEUTRAL:
            raise UnsupportedModel(
                f"the GGUF metadata key {name} ({value!r}) changes the model and is not read.", param=name
            )
        warnings.append(f"the GGUF metadata key {name} ({str(value)[:40]}) is unknown and was not used.")
