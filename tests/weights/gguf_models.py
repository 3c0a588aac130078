"""Tiny GGUF models of every family that is read, as llama.cpp's converter writes them, with what they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf_writer import write_gguf

HIDDEN, HEADS, KV_HEADS, WIDTH, INNER, LAYERS, VOCAB = 48, 4, 2, 16, 64, 7, 61
TYPES = [3, 3, 3] + [1] * (VOCAB - 3)
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<a>", "<b>", "<c>", *(chr(0x100 + i) for i in range(VOCAB - 3))],
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": [],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
PLAIN = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"norms": PLAIN, "permuted": True},
    "qwen2": {"norms": PLAIN, "biases": True},
    "qwen3": {"norms": PLAIN | HEAD_NORMS},
    "qwen2moe": {"norms": PLAIN, "biases": True},
    "qwen3moe": {"norms": PLAIN | HEAD_NORMS},
    "gemma2": {"norms": SANDWICH, "shifted": True},
    "gemma3": {"norms": SANDWICH | HEAD_NORMS, "shifted": True},
}


@dataclass(frozen=True)
class TinyGguf:
    """``tensors`` under Hugging Face's names and conventions; ``stored`` and ``metadata`` as the file has them."""

    path: Path
    tensors: dict[str, np.ndarray]
    stored: dict[str, np.ndarray]
    metadata: dict[str, Any]


def metadata_of(architecture: str, hidden: int = HIDDEN, width: int = WIDTH) -> dict[str, Any]:
    pairs: dict[str, Any] = {
        "context_length": 512,
        "embedding_length": hidden,
        "feed_forward_length": INNER,
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 50000.0,
        "attention.key_length": width,
        "attention.value_length": width,
    }
    if architecture == "llama":
        pairs |= {"rope.dimension_count": width, "vocab_size": VOCAB}
    if architecture.startswith("gemma"):
        pairs["attention.sliding_window"] = 8
    if architecture == "gemma2":
        pairs |= {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0}
    if architecture.endswith("moe"):
        pairs |= {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 32}
        pairs |= {"expert_shared_feed_forward_length": 32} if architecture == "qwen2moe" else {}
    named = {f"{architecture}.{key}": value for key, value in pairs.items()}
    return {"general.architecture": architecture, "general.name": "tiny", **named, **VOCABULARY}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to the rows of q and k of a llama model."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_tiny_gguf(
    path: Path,
    architecture: str,
    *,
    head: bool = False,
    seed: int = 0,
    dtype: Any = np.float32,
    hidden: int = HIDDEN,
    width: int = WIDTH,
    **changed: Any,
) -> TinyGguf:
    """Write a tiny model. ``changed`` replaces metadata keys of the architecture (``__`` for a dot); None drops one.

    It has experts where ``expert_count`` is given (Mixtral, where the architecture is llama), of the widths given.
    """
    family = FAMILIES[architecture]
    metadata = metadata_of(architecture, hidden, width)
    for key, value in changed.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        metadata = {k: v for k, v in metadata.items() if k != name} | ({} if value is None else {name: value})
    experts = metadata.get(f"{architecture}.expert_count")
    # With larger weights, seven layers of experts amplify rounding: transformers in float32 is then 4e-4 from itself in
    # float64.
    scale = np.float32(0.25 if experts else 1)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    stored: dict[str, np.ndarray] = {}

    def put(theirs: str, ours: str, shape: tuple[int, ...], heads: int = 0) -> None:
        made = rng.standard_normal(shape).astype(np.float32) * scale
        made = made.astype(dtype if len(shape) > 1 else np.float32)
        if ours.endswith("norm.weight"):
            made = (rng.integers(-64, 64, shape) / 64).astype(np.float32)
        shifted = family.get("shifted") and ours.endswith("norm.weight")
        # The converter stores this matrix of one row as a vector.
        tensors[ours] = made[np.newaxis] if ours.endswith("shared_expert_gate.weight") else made
        if heads and family.get("permuted"):
            made = interleave(made, heads)
        stored[theirs] = made + np.float32(1) if shifted else made

    put("token_embd.weight", "model.embed_tokens.weight", (VOCAB, hidden))
    put("output_norm.weight", "model.norm.weight", (hidden,))
    if head:
        put("output.weight", "lm_head.weight", (VOCAB, hidden))
    linears = {
        "attn_q": ("self_attn.q_proj", HEADS * width, hidden, HEADS),
        "attn_k": ("self_attn.k_proj", KV_HEADS * width, hidden, KV_HEADS),
        "attn_v": ("self_attn.v_proj", KV_HEADS * width, hidden, 0),
        "attn_output": ("self_attn.o_proj", hidden, HEADS * width, 0),
        "ffn_gate": ("mlp.gate_proj", INNER, hidden, 0),
        "ffn_up": ("mlp.up_proj", INNER, hidden, 0),
        "ffn_down": ("mlp.down_proj", hidden, INNER, 0),
    }
    if experts:
        linears = {name: made for name, made in linears.items() if name.startswith("attn")}
    for layer in range(LAYERS):
        if experts:
            _put_experts(put, layer, architecture, metadata)
        for theirs, ours in family["norms"].items():
            size = width if "self_attn" in ours else hidden
            put(f"blk.{layer}.{theirs}.weight", f"model.layers.{layer}.{ours}.weight", (size,))
        for theirs, (ours, rows, columns, heads) in linears.items():
            put(f"blk.{layer}.{theirs}.weight", f"model.layers.{layer}.{ours}.weight", (rows, columns), heads)
            if family.get("biases") and theirs in {"attn_q", "attn_k", "attn_v"}:
                put(f"blk.{layer}.{theirs}.bias", f"model.layers.{layer}.{ours}.bias", (rows,), heads)
    return TinyGguf(write_gguf(path, metadata, stored), tensors, stored, metadata)


def _put_experts(put: Any, layer: int, architecture: str, metadata: dict[str, Any]) -> None:
    def of(key: str, default: int = 0) -> int:
        return int(metadata.get(f"{architecture}.{key}", default))

    hidden, experts, shared = of("embedding_length"), of("expert_count"), of("expert_shared_feed_forward_length")
    inner = of("expert_feed_forward_length", of("feed_forward_length"))
    mixtral = architecture == "llama"
    block, module = f"blk.{layer}.ffn_", f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}."
    put(f"{block}gate_inp.weight", f"{module}gate.weight", (experts, hidden))
    for name, old in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        ours = old if mixtral else f"{name}_proj"
        shape = (hidden, inner) if name == "down" else (inner, hidden)
        put(f"{block}{name}_exps.weight", f"{module}experts.{ours}.weight", (experts, *shape))
        if shared:
            shape = (hidden, shared) if name == "down" else (shared, hidden)
            put(f"{block}{name}_shexp.weight", f"{module}shared_expert.{name}_proj.weight", shape)
    if shared:
        put(f"{block}gate_inp_shexp.weight", f"{module}shared_expert_gate.weight", (hidden,))
