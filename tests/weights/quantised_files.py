"""Reads the fixtures of ``scripts/quantised_fixtures.py``, makes model folders of their modules, and runs these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.kernels.cpu import CpuBackend
from truffula.kernels.inputs import Capacity
from truffula.model.load import ModelPlan, WeightReader, plan_model
from truffula.testing.files import Array, write_safetensors
from truffula.testing.programs import Part, fill_step
from truffula.testing.tiny import tiny_config, tiny_llama_config, tiny_tensors
from truffula.weights.open import open_checkpoint
from truffula.weights.safetensors import SafetensorsFile

FIXTURES = Path(__file__).parent / "quantised"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))
LINEAR = [name for name in NAMES if name != "mxfp4-experts"]  # the others are stacked experts
# The shape of each linear of this model is that of a module of the fixtures.
MODEL = tiny_llama_config(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2,
    vocab_size=128, tie_word_embeddings=False,
)  # fmt: skip
CAPACITY = Capacity(8, 1, 8, 1, num_blocks=3, block_size=4, max_blocks_per_seq=2)
PATH = "model.layers.1.mlp.up_proj"
PROMPT = (5, 90, 31, 7, 64, 2, 77)
_MODULES = {
    "square": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "tall": ("gate_proj", "up_proj"),
    "wide": ("down_proj",),
}


class Fixture:
    """``config`` is the ``quantization_config``, ``tensors`` the stored tensors by name, ``libraries`` the versions
    of the packages that wrote it."""

    def __init__(self, name: str) -> None:
        file = SafetensorsFile(FIXTURES / f"{name}.safetensors")
        self.config: dict[str, Any] = json.loads(file.metadata["config"])
        self.libraries: dict[str, str] = json.loads(file.metadata["libraries"])
        self.expected: dict[str, tuple[str, str]] = json.loads(file.metadata["expected"])
        self.tensors: dict[str, Array] = {item: np.array(file.read(item)) for item in file.tensors}

    def module(self, name: str) -> dict[str, Array]:
        """The stored tensors of one module, by suffix."""
        found = {key.removeprefix(name): value for key, value in self.tensors.items() if key.startswith(name)}
        assert found, name
        return found


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", dict(tensors), {"format": "pt"})
    return folder


def as_model(fixture: Fixture, *, head: bool = False, **config: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """The config and tensors of a model whose linear modules, and with ``head`` whose head, are the fixture's."""
    config = {**MODEL, **config}
    tensors = tiny_tensors(config, dtype="bfloat16")
    for name in [name for name in tensors if name.endswith("_proj.weight") or (head and name == "lm_head.weight")]:
        path = name.removesuffix(".weight")
        leaf = path.rpartition(".")[2]
        source = "tall" if leaf == "lm_head" else next(key for key, leaves in _MODULES.items() if leaf in leaves)
        del tensors[name]
        tensors |= {f"{path}{suffix}": value for suffix, value in fixture.module(source).items()}
    if head and "lm_head.weight" not in tensors and not any(key.startswith("lm_head") for key in tensors):
        tensors |= {f"lm_head{suffix}": value for suffix, value in fixture.module("tall").items()}
    return {**config, "quantization_config": fixture.config}, tensors


def gpt_oss_model(**config: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """The config and tensors of a gpt_oss whose experts are the fixture's, in MXFP4."""
    fixture = Fixture("mxfp4-experts")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2}
    made = tiny_config("gpt_oss", **sizes, **config)
    tensors = tiny_tensors(made, dtype="bfloat16")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        del tensors[name]
        source = fixture.module("square" if "down" in name else "tall")
        tensors |= {f"{name}{suffix}": value for suffix, value in source.items()}
    return {**made, "quantization_config": fixture.config}, tensors


def digest(values: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def run(
    path: Path, dtype: str = "float32", quantize: str = "none", *, exact: bool = True
) -> tuple[ModelPlan, npt.NDArray[np.float32]]:
    """The plan and the logits of a prompt."""
    opened = open_checkpoint(path)
    plan = plan_model(opened)
    backend = CpuBackend(1, quantize=quantize, exact=exact and quantize == "none")
    pull = WeightReader(opened, plan, block_kinds=backend.block_kinds)
    executable = backend.load(plan.program, dtype, pull, CAPACITY)
    pull.finish()
    fill_step(executable.inputs, [Part(PROMPT, 0, (1, 2), None, "all")], 4)
    executable.run()
    return plan, executable.logits()
