"""A GGUF file's metadata as a config.json, and its tensor names as those of a Hugging Face checkpoint.

``hparams.check_unread_keys`` then checks every key that was not read. Sources: llama.cpp's converters, whose
changes to tensors are reversed here, and its loader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.gguf import dense, experts, gemma, hybrids, latent, mamba, older
from truffula.weights.gguf.changes import PLAIN, Change
from truffula.weights.gguf.families import Family
from truffula.weights.gguf.header import GgufHeader
from truffula.weights.gguf.hparams import ROPE_FREQS, HParams, rope_parameters

FAMILIES: Mapping[str, Family] = {
    **dense.FAMILIES,
    **gemma.FAMILIES,
    **older.FAMILIES,
    **experts.FAMILIES,
    **latent.FAMILIES,
    **hybrids.FAMILIES,
    **mamba.FAMILIES,
}
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
            f"general.architecture is {architecture!r}, of which GGUF files are not supported. Serve the model from "
            f"safetensors; supported in GGUF files are {', '.join(sorted(FAMILIES))}.",
            param="general.architecture",
        )
    return (family.variant and family.variant(header)) or family


def rename(family: Family, name: str) -> str | None:
    """The Hugging Face name of a tensor, or None for one that this family does not have."""
    match = re.fullmatch(r"blk\.(0|[1-9]\d*)\.([a-z0-9_.]+)", name)
    layer, local = (f"{family.layers}{match[1]}.", match[2]) if match else ("", name)
    stem, _, kind = local.rpartition(".")
    module = (family.block if match else family.top).get(stem)
    if local in family.whole:
        return layer + family.whole[local]
    return f"{layer}{module}.{kind}" if module and kind in {"weight", "bias"} else None


def change_of(family: Family, name: str, parts: int) -> Change:
    """How a tensor of the checkpoint is made of the stored ones, which are so many."""
    local = re.sub(r"^.*?\.\d+\.", "", name)
    change = family.changes.get(local.rpartition(".")[0]) or family.changes.get(local, PLAIN)
    return PLAIN if change.joins and parts < 2 else change


def to_config(hparams: HParams, family: Family, warnings: list[str]) -> dict[str, Any]:
    """The config.json that this file's metadata describes.

    ``tie_word_embeddings`` is not in it: a GGUF file of a tied model has no ``output.weight``.
    """
    header, factors = hparams.header, hparams.tables.pop(ROPE_FREQS, None) if family.factors else None
    layers = _layers(hparams, len(header.tensors))

    def number(key: str, default: int | None = None) -> int:
        return hparams.each(key, layers, default)[0] if family.by_layer else hparams.some(key, default)

    inner = "feed_forward_length"
    if hparams.get(inner) is None and hparams.get(f"expert_{inner}") is not None:
        inner = f"expert_{inner}"  # of a model whose layers all have experts
    hidden, heads = hparams.count("embedding_length"), number("attention.head_count")
    width, (eps, eps_name) = _head_dim(hparams, hidden, heads, family), family.eps
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.class_name],
        "hidden_size": hidden,
        "intermediate_size": number(inner),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": hparams.count("context_length"),
        eps_name: hparams.real(eps),
        "vocab_size": _vocab_size(hparams),
        "rope_parameters": rope_parameters(hparams, family.default_theta, factors, width, warnings),
    }
    for key, ggml in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = header.metadata.get(f"tokenizer.ggml.{ggml}_token_id")
        if type(value) is int and 0 <= value < config["vocab_size"]:
            config[key] = value
    family.extra(hparams, config)
    for name in hparams.tables:
        raise UnsupportedModel(f"{name} is not supported in a {hparams.architecture} file.", param=name)
    return {new: value for name, value in config.items() if (new := family.keys.get(name, name)) is not None}


def _layers(hparams: HParams, tensors: int) -> int:
    """The number of layers, which bounds the length of lists: a file has at least as many tensors."""
    count = hparams.count("block_count")
    if count > tensors:
        key = hparams.name("block_count")
        raise CheckpointError(f"{key} is {count}, in a file with {tensors} tensors.", param=key)
    return count


def _head_dim(hparams: HParams, hidden: int, heads: int, family: Family) -> int:
    """The width of a head; of latent attention, that of its rotated part."""
    if family.latent:
        return hparams.count("rope.dimension_count")
    width = hparams.count("attention.key_length", max(hidden // heads, 1))
    wholes = [("attention.value_length", "values must be as wide as keys")]
    if not family.partial:
        wholes.append(("rope.dimension_count", "partial rotation is not supported"))
    for key, why in wholes:
        found, name = hparams.count(key, width), hparams.name(key)
        if found != width:
            raise UnsupportedModel(f"{name} is {found}, for heads {width} wide: {why}.", param=name)
    return width


def _vocab_size(hparams: HParams) -> int:
    table = hparams.header.tensors.get("token_embd.weight") or hparams.header.tensors.get("output.weight")
    return table.shape[0] if table is not None else hparams.count("vocab_size")
