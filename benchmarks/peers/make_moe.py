"""Writes GGUF files of models with experts and random weights, which truffula and llama.cpp both read.

    python benchmarks/peers/make_moe.py FOLDER [NAME ...]    # default: each shape in bf16, q8_0 and q4_0, 7 GB

``qwen3.6`` has the widths of Qwen3.6-35B-A3B (hidden 2048, 8 experts of 512 a token, a shared one of 512, heads of
256 with 2 for keys) as the architecture qwen2moe: full attention with 8 heads of 16, 6 layers and 64 experts of 256.
``glm4.7`` has those of GLM-4.7-Flash's experts (hidden 2048, 4 of 1536 a token and a shared one, one dense layer) as
the architecture glm4moe: 5 layers, 32 experts of 64, and grouped-query attention, as files with latent attention are
not read. All experts of a layer have the same values; which are chosen depends on the router, whose values are random.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

FORMATS = {
    "bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}  # fmt: skip
VOCABULARY = 16384


@dataclass(frozen=True)
class Shape:
    """``keys`` are metadata of the architecture beside those that all have; ``biases``: q, k and v have them."""

    architecture: str
    layers: int
    dense: int
    inner: int
    experts: int
    width: int
    shared: str
    after: str
    keys: Mapping[str, Any]
    head: int = 256
    heads: int = 8
    kv_heads: int = 2
    hidden: int = 2048


QWEN = {"expert_used_count": 8, "expert_shared_feed_forward_length": 512}
GLM = {
    "expert_used_count": 4, "expert_shared_count": 1, "leading_dense_block_count": 1, "expert_gating_func": 2,
    "expert_weights_norm": True, "expert_weights_scale": 1.8, "rope.dimension_count": 64,
}  # fmt: skip
SHAPES = {
    "qwen3.6": Shape("qwen2moe", 6, 0, 512, 64, 512, "ffn_gate_inp_shexp.weight", "ffn_norm", QWEN),
    "glm4.7": Shape("glm4moe", 5, 1, 10240, 32, 1536, "exp_probs_b.bias", "post_attention_norm", GLM,
                    head=128, heads=20, kv_heads=4),
}  # fmt: skip


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and row-major shapes of a file's tensors."""
    hidden, q, kv = shape.hidden, shape.heads * shape.head, shape.kv_heads * shape.head
    yield "token_embd.weight", (VOCABULARY, hidden)
    yield "output.weight", (VOCABULARY, hidden)
    yield "output_norm.weight", (hidden,)
    for layer in range(shape.layers):
        at, dense = f"blk.{layer}.", layer < shape.dense
        yield f"{at}attn_norm.weight", (hidden,)
        yield f"{at}{shape.after}.weight", (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{at}attn_{name}.weight", (rows, hidden)
            yield f"{at}attn_{name}.bias", (rows,)
        yield f"{at}attn_output.weight", (hidden, q)
        if not dense:
            yield f"{at}ffn_gate_inp.weight", (shape.experts, hidden)
            yield f"{at}{shape.shared}", (hidden,) if shape.shared.endswith("weight") else (shape.experts,)
        many, width = ((), shape.inner) if dense else ((shape.experts,), shape.width)
        for kind, stack in (("", many),) if dense else (("_exps", many), ("_shexp", ())):
            yield f"{at}ffn_gate{kind}.weight", (*stack, width, hidden)
            yield f"{at}ffn_up{kind}.weight", (*stack, width, hidden)
            yield f"{at}ffn_down{kind}.weight", (*stack, hidden, width)


def values(name: str, shape: tuple[int, ...], kind: Any, seed: int) -> npt.NDArray[Any]:
    """A tensor as it is stored; float32 where it is a vector or the router."""
    rng = np.random.default_rng(seed)
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    one = rng.standard_normal(shape[-2:], np.float32) * np.float32(0.03)
    if len(shape) == 1 or "gate_inp" in name:
        return one
    stored = gguf.quants.quantize(one, kind)
    return np.broadcast_to(stored, (*shape[:-2], *stored.shape)) if len(shape) > 2 else stored


def write(path: Path, shape: Shape, kind: Any) -> None:
    writer = gguf.GGUFWriter(path, shape.architecture)
    keys: dict[str, Any] = {
        "context_length": 4096, "embedding_length": shape.hidden, "feed_forward_length": shape.inner,
        "block_count": shape.layers, "attention.head_count": shape.heads, "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head, "attention.value_length": shape.head,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6, "vocab_size": VOCABULARY,
        "expert_count": shape.experts, "expert_feed_forward_length": shape.width, **shape.keys,
    }  # fmt: skip
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in keys.items():
        add[type(value)](f"{shape.architecture}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    made = list(tensors(shape))
    sample = {}
    for name, size in made:
        sample[name] = values(name, size[-2:], kind, 0)
        whole = (*size[:-2], *sample[name].shape)
        raw = None if sample[name].dtype == np.float32 else kind
        nbytes = sample[name].nbytes * int(np.prod(size[:-2]))
        writer.add_tensor_info(name, whole, sample[name].dtype, nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for seed, (name, size) in enumerate(made):
        writer.write_tensor_data(np.ascontiguousarray(values(name, size, kind, seed)))
    writer.close()


def main() -> None:
    folder, *names = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names or [f"{shape}-{kind}" for shape in SHAPES for kind in FORMATS]:
        shape, _, kind = name.rpartition("-")
        path = Path(folder, f"{name}.gguf")
        write(path, SHAPES[shape], FORMATS[kind])
        print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
