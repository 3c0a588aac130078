"""The same tiny model in safetensors and in GGUF, there with gguf-py's names and what llama.cpp's converter writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_models import VOCABULARY, interleave
from gguf_writer import GgufBlocks, write_gguf

from truffula.model.load import WeightReader, plan_model
from truffula.model.parts.attention import AttentionSpec
from truffula.model.parts.mla import MlaSpec
from truffula.model.parts.parallel import ParallelSpec
from truffula.model.read import read_config
from truffula.model.spec import ModelSpec
from truffula.testing.files import Array
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

IDS = [7, 31, 12, 55, 40, 9, 23, 18, 50, 4, 36, 27]
VOCAB = 61
Tensors = dict[str, Array]
# Architectures that gguf-py lacks, and one with the same names of tensors.
SIBLINGS = {"deepseek32": "glm-dsa", "cohere2moe": "glm4moe", "laguna": "dots1", "muse-glimmer": "gemma2"}
Convert = Callable[[Tensors, Any], Tensors]
"""A change that the converter makes to the tensors of a model, whose first attention is the second argument."""


@dataclass(frozen=True)
class Case:
    """A tiny model of ``model_type`` whose files have ``architecture``. ``config`` changes that of ``tiny_config``, ""
    drops a key. ``metadata`` are keys beside the usual ones: None drops one, a function makes it of the model's
    tensors, and the name of one that begins with a space is whole. ``tensors`` are stored beside those of the model.
    ``rounded``: by how much the converter's rounding may change logits.
    """

    architecture: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    convert: tuple[Convert, ...] = ()
    tensors: Mapping[str, Array] = field(default_factory=dict)
    rounded: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.architecture}: {self.model_type}"


def each(change: Callable[[str, Array, Any], Array]) -> Convert:
    """The change of one tensor, of all."""
    return lambda tensors, mixer: {name: change(name, array, mixer) for name, array in tensors.items()}


@each
def interleaved(name: str, array: Array, mixer: Any) -> Array:
    match = re.search(r"\.([qk])_proj\.", name)
    return interleave(array, mixer.heads if match[1] == "q" else mixer.kv_heads) if match else array


def stacked(tensors: Tensors, _: Any) -> Tensors:
    """The matrices of all experts together, gate and up apart."""
    made: Tensors = {}
    for name, array in tensors.items():
        if name.endswith("input_linear.weight"):
            half = array.shape[1] // 2
            root = name.replace("input_linear", "experts.{}_proj")
            made[root.format("gate")], made[root.format("up")] = array[:, :half], array[:, half:]
        elif name.endswith("output_linear.weight"):
            made[name.replace("output_linear", "experts.down_proj")] = array
        elif match := re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name):
            whole = match[1].removesuffix(".") + match[3]
            made[whole] = np.stack([*made.get(whole, []), array])
        else:
            made[name] = array
    # As the converter maps them.
    return {re.sub(r"block_sparse_moe\.experts\.(\w+)_proj", r"mlp.experts.\1_proj", k): v for k, v in made.items()}


def first_attention(spec: ModelSpec) -> Any:
    mixers = [layer.mixer for layer in spec.layers]
    parts = [part.part for mixer in mixers if isinstance(mixer, ParallelSpec) for part in mixer.parts]
    return next((part for part in [*mixers, *parts] if isinstance(part, AttentionSpec | MlaSpec)), None)


def _widths(mixer: AttentionSpec | MlaSpec) -> dict[str, Any]:
    """Of latent attention, heads are as wide as the latents, with one for keys; the true widths are apart."""
    if isinstance(mixer, AttentionSpec):
        keys = {"head_count_kv": mixer.kv_heads, "key_length": mixer.head_dim, "value_length": mixer.head_dim}
        return {f"attention.{key}": value for key, value in keys.items()}
    keys = {
        "head_count_kv": 1, "key_length": mixer.rank + mixer.rope, "value_length": mixer.rank,
        "key_length_mla": mixer.nope + mixer.rope, "value_length_mla": mixer.dim_v, "kv_lora_rank": mixer.rank,
    }  # fmt: skip
    keys |= {} if mixer.q_rank is None else {"q_lora_rank": mixer.q_rank}
    return {f"attention.{key}": value for key, value in keys.items()} | {"rope.dimension_count": mixer.rope}


def metadata(case: Case, config: dict[str, Any]) -> dict[str, Any]:
    """What the converter's base class writes of a config, and what ``case`` adds."""
    spec = read_config(config).spec
    mixer = first_attention(spec)
    width = next((config[key] for key in ("intermediate_size", "n_inner", "ffn_hidden_size") if key in config), 0)
    pairs = {
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden,
        "feed_forward_length": width or 4 * spec.hidden,
        "block_count": len(spec.layers),
        "attention.layer_norm_rms_epsilon": spec.final_norm.eps if spec.final_norm else 0.0,
        "rope.freq_base": 10000.0,
    }
    if mixer is not None:
        pairs |= {"attention.head_count": mixer.heads, **_widths(mixer)}
    router = getattr(spec.layers[-1].mlp, "router", None)
    if router is not None:
        pairs |= {"expert_count": router.experts, "expert_used_count": router.top_k}
    if case.metadata.get("attention.layer_norm_epsilon") and "attention.layer_norm_rms_epsilon" not in case.metadata:
        del pairs["attention.layer_norm_rms_epsilon"]
    named = {}
    for key, value in {**pairs, **case.metadata}.items():
        value = value(tiny_tensors(config, seed=3)) if callable(value) else value
        if value is not None:
            named[key.strip() if key.startswith(" ") else f"{case.architecture}.{key}"] = value
    return {"general.architecture": case.architecture, **named, **VOCABULARY}


def quantised(array: Array, name: str) -> GgufBlocks | Array:
    """In blocks of Q8_0, where the converter writes them: matrices of whole blocks but norms and small tables."""
    kept = array.ndim < 2 or array.shape[-1] % 32 or "norm" in name or "_inp" in name
    if kept:
        return array
    return GgufBlocks(8, array.shape, gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0).tobytes())


def config_of(case: Case) -> dict[str, Any]:
    usual: dict[str, Any] = {"vocab_size": VOCAB, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    if case.model_type == "olmo3":
        usual["rope_parameters"] = dict.fromkeys(("full_attention", "sliding_attention"), usual["rope_parameters"])
    changed = tiny_config(case.model_type, **{**usual, **case.config})
    return {key: value for key, value in changed.items() if value != ""}


def stored_of(case: Case) -> Tensors:
    """The tensors of the GGUF file, by gguf-py's names."""
    config = config_of(case)
    spec, tensors = read_config(config).spec, tiny_tensors(config, seed=3)
    for convert in case.convert:
        tensors = convert(tensors, first_attention(spec))
    known = SIBLINGS.get(case.architecture, case.architecture)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known)
    names = gguf.get_tensor_name_map(number, len(spec.layers))
    stored = dict(case.tensors)
    for name, array in tensors.items():
        found = (
            name if name.startswith(("blk.", "output.")) else names.get_name(name, try_suffixes=(".weight", ".bias"))
        )
        assert found is not None, name
        bare = found.endswith((".weight", ".bias", ".scale", ".ssm_a", ".ssm_d"))
        stored[found if bare else f"{found}.weight"] = np.ascontiguousarray(array)
    return stored


def write_pair(
    folder: Path, case: Case, extra: Mapping[str, Array] | None = None, *, blocks: bool = False
) -> tuple[Path, Path]:
    """The model in safetensors and in GGUF, there with the tensors ``extra``, and in ``blocks`` of Q8_0."""
    config, stored = config_of(case), stored_of(case)
    plain = write_tiny_checkpoint(folder / "plain", config, seed=3)
    made = {name: quantised(array, name) if blocks else array for name, array in stored.items()}
    return plain, write_gguf(folder / "model.gguf", metadata(case, config), {**made, **(extra or {})})


def logits(path: Path, block_kinds: frozenset[str] = frozenset()) -> Array:
    from kernel_backends import BEST  # torch, which the fuzzer is without

    checkpoint = open_checkpoint(path)
    plan = plan_model(checkpoint)
    pull, capacity = WeightReader(checkpoint, plan, block_kinds=block_kinds), capacity_for(len(IDS))
    executable = list(BEST.values())[-1].load(plan.program, "float32", pull, capacity)
    pull.finish()
    made = Driver(executable, capacity).feed(IDS)
    executable.close()
    return made
