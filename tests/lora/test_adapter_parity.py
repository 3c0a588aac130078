"""Every field that is served, against peft: each adapter alone, and all of them with base rows in one batch.

Logits within 1e-4 in float32. The adapters take the whole path: files, validation, image, executable.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from kernel_backends import BEST, on_the_best
from served_base import Served

from truffula.kernels.backend import Backend
from truffula.testing.adapters import PREFIX, tiny_config, tiny_tensors, write_adapter, write_tiny_adapter
from truffula.testing.tiny import tiny_config as tiny_model_config
from truffula.testing.tiny import write_tiny_checkpoint

Float32 = npt.NDArray[np.float32]
TOLERANCE = 1e-4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# (name, what is asked of write_tiny_adapter)
CASES: dict[str, dict[str, Any]] = {
    "plain q and v": {},
    "rank 1": {"rank": 1},
    "rank 3": {"rank": 3, "targets": ATTENTION},
    "rank above the hidden size": {"rank": 48, "targets": "all-linear"},
    "all-linear": {"targets": "all-linear"},
    "one site only": {"targets": ["down_proj"]},
    "alpha a float": {"alpha": 3.5},
    "alpha negative": {"alpha": -4},
    "rslora": {"use_rslora": True, "rank": 7, "targets": "all-linear"},
    "rank_pattern": {"targets": "all-linear", "rank_pattern": {"q_proj": 2, "mlp.down_proj": 9}},
    "rank_pattern a regex": {"targets": ATTENTION, "rank_pattern": {r"layers\.[01]\.self_attn\.(q|v)_proj": 5}},
    "rank_pattern a full name": {"rank_pattern": {"model.layers.1.self_attn.q_proj": 6}},
    "alpha_pattern": {"targets": ATTENTION, "alpha_pattern": {"v_proj": 1, ".*k_proj": 20}},
    "alpha_pattern, two hits": {"alpha_pattern": {".*q_proj": 3, "layers.1.self_attn.q_proj": 100}},
    "both patterns and rslora": {
        "rank": 8,
        "use_rslora": True,
        "targets": "all-linear",
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"o_proj": 1, "gate_proj": 30},
    },
    "a suffix of two segments": {"targets": ["self_attn.q_proj", "mlp.up_proj"]},
    "full names": {"targets": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
    "a regex": {"targets": r".*layers\.(0|2)\..*(q|up)_proj"},
    "a regex with a look-ahead": {"targets": r"^(?!.*mlp).*_proj$"},
    "layers_to_transform a list": {"targets": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers_to_transform an int": {"targets": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers_pattern": {"targets": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "a full name beside layers_to_transform": {
        "targets": ["q_proj", "model.layers.2.mlp.up_proj"],
        "layers_to_transform": [0],
    },
    "exclude_modules a list": {"targets": "all-linear", "exclude_modules": ["down_proj", "layers.1.mlp.up_proj"]},
    "exclude_modules a regex": {"targets": ATTENTION, "exclude_modules": r".*\.1\..*"},
    "float16 file": {"dtype": "float16", "targets": "all-linear"},
    "bfloat16 file": {"dtype": "bfloat16", "targets": "all-linear"},
    "init gaussian": {"init_lora_weights": "gaussian"},
    "init orthogonal": {"init_lora_weights": "orthogonal"},
    "fan_in_fan_out wrong": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.5},
}
BASES = {
    "llama": {"head_dim": 14, "num_key_value_heads": 1, "vocab_size": 97, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "gemma3_text": {"num_hidden_layers": 4},
    "youtu": {"num_hidden_layers": 2},
    "qwen3_5_text": {},
    "qwen3_next": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "gpt_neo": {"tie_word_embeddings": False},
    "mpt": {"attn_config": {"clip_qkv": 1.0}},
    "opt": {"word_embed_proj_dim": 20, "do_layer_norm_before": False},
    "phi": {"qk_layernorm": True},
    "phi3": {"num_key_value_heads": 1},
}
DENSE = (
    "apertus",
    "arcee",
    "cohere",
    "cohere2",
    "cwm",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma4",
    "gemma4_text",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "ministral3",
    "mistral3",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "seed_oss",
    "smollm3",
    "stablelm",
)


def served_base(folder: Path, model_type: str, backend: Backend) -> Served:
    config = tiny_model_config(model_type, **BASES.get(model_type, {}))
    return Served(write_tiny_checkpoint(folder / "model", config, seed=5), backend)


@dataclass(frozen=True)
class Outcome:
    alone: Float32
    mixed: Float32
    peft: Float32
    base: Float32


@dataclass
class Asked:
    """Every case's adapter on disk, its prompt, and what peft answers to it (asked once for all backends)."""

    folder: Path
    answers: dict[str, Float32] = field(default_factory=dict)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module", params=BEST.values(), ids=BEST.keys())
def outcomes(asked: Asked, request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """Every case on one base: by itself, in one batch of all with base rows between, and as peft computes it."""
    served = served_base(asked.folder, "llama", request.param)
    slots: dict[str, int] = {}
    for number, (name, fields) in enumerate(CASES.items()):
        write_tiny_adapter(asked.folder / name, served.program.sites, seed=number, **fields)
        slots[name] = served.add(asked.folder / name)
    order = sorted(CASES, key=lambda name: slots[name])
    prompts = {name: served.prompt(number) for number, name in enumerate(CASES)}
    mixed = served.run([(slots[n], prompts[n]) for n in order] + [(None, prompts[n]) for n in order[:10]])
    made = {}
    for place, name in enumerate(order):
        (alone,) = served.run([(slots[name], prompts[name])])
        (base,) = served.run([(None, prompts[name])])
        if name not in asked.answers:
            asked.answers[name] = served.peft(asked.folder / name, prompts[name])
        made[name] = Outcome(alone, mixed[place], asked.answers[name], base)
        shutil.rmtree(asked.folder / name)
    # Base rows don't know what runs beside them: the same plan without adapters gives the same bits.
    without = served.run([(None, prompts[n]) for n in order] + [(None, prompts[n]) for n in order[:10]])
    for with_adapters, plain in zip(mixed[len(order) :], without[len(order) :], strict=True):
        assert np.array_equal(with_adapters, plain)
    return made


@pytest.mark.parametrize("company", ["alone", "mixed"])
@pytest.mark.parametrize("case", CASES)
def test_each_field_agrees_with_peft(outcomes: dict[str, Outcome], case: str, company: str) -> None:
    outcome = outcomes[case]
    np.testing.assert_allclose(getattr(outcome, company), outcome.peft, atol=TOLERANCE)
    assert np.abs(outcome.peft - outcome.base).max() > 100 * TOLERANCE, "the adapter does not show"


TARGETS: dict[str, tuple[str | list[str], list[str]]] = {
    "qwen2": ("all-linear", ["q_proj", "down_proj"]),
    "gemma3_text": ("all-linear", ["q_proj", "down_proj"]),
    "qwen3_5_text": ("all-linear", ["in_proj_qkv", "in_proj_a", "in_proj_b", "in_proj_z", "linear_attn.out_proj"]),
    "youtu": ("all-linear", ["q_b_proj", "kv_b_proj", "down_proj"]),
    # peft takes the MLP of any qwen3_next model for experts, and warns.
    "qwen3_next": (["in_proj_ba", "in_proj_qkvz", "q_proj", "o_proj", "out_proj"], ["in_proj_ba", "k_proj"]),
    # Matrices stored as [in, out]; fused modules, with rows in another order than the program's.
    "gpt2": ("all-linear", ["c_attn", "mlp.c_proj"]),
    "gpt_neox": ("all-linear", ["query_key_value", "dense_4h_to_h"]),
    "phi3": ("all-linear", ["qkv_proj", "down_proj"]),
}
OLDER: dict[str, tuple[str | list[str], list[str]]] = {
    "bloom": ("all-linear", ["query_key_value", "dense_4h_to_h"]),
    "falcon": ("all-linear", ["query_key_value", "dense_4h_to_h"]),
    "gpt_bigcode": ("all-linear", ["c_attn", "mlp.c_proj"]),
    "gpt_neo": ("all-linear", ["q_proj", "mlp.c_proj"]),
    "gptj": ("all-linear", ["q_proj", "fc_out"]),
    "mpt": ("all-linear", ["Wqkv", "down_proj"]),
    "opt": ("all-linear", ["q_proj", "fc2"]),
    "phi": ("all-linear", ["q_proj", "fc2"]),
    "starcoder2": ("all-linear", ["q_proj", "mlp.c_proj"]),
}


@on_the_best
@pytest.mark.parametrize(
    "model_type", [*TARGETS, *(pytest.param(name, marks=pytest.mark.slow) for name in (*DENSE, *OLDER))]
)  # the slow ones: a minute
def test_other_families_agree_with_peft(tmp_path: Path, model_type: str, backend: Backend) -> None:
    served = served_base(tmp_path, model_type, backend)
    rows: list[tuple[int | None, list[int]]] = []
    expected = []
    for number, targets in enumerate((TARGETS | OLDER).get(model_type, ("all-linear", ["q_proj", "down_proj"]))):
        folder = write_tiny_adapter(tmp_path / str(number), served.program.sites, seed=number, targets=targets, rank=5)
        rows.append((served.add(folder), served.prompt(number)))
        expected.append(served.peft(folder, rows[-1][1]))
    rows.append((None, served.prompt(9)))
    expected.append(served.peft(None, rows[-1][1]))
    for mine, theirs in zip(served.run(rows), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE)


@on_the_best
def test_a_fused_module_is_its_parts_with_one_a(tmp_path: Path, backend: Backend) -> None:
    """An adapter on ``qkv_proj`` and ``gate_up_proj`` equals peft's adapter on the parts, each with the same A."""
    served = served_base(tmp_path, "llama", backend)
    config = tiny_config(rank=4, alpha=8, targets=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
    split = tiny_tensors(served.program.sites, config, seed=1)
    fused = {}
    for layer in range(3):
        for whole, parts in (("self_attn.qkv_proj", ATTENTION[:3]), ("mlp.gate_up_proj", ["gate_proj", "up_proj"])):
            root = f"{PREFIX}model.layers.{layer}.{whole.partition('.')[0]}."
            a = split[f"{root}{parts[0]}.lora_A.weight"]
            for part in parts:
                split[f"{root}{part}.lora_A.weight"] = a
            name = f"{PREFIX}model.layers.{layer}.{whole}"
            fused[f"{name}.lora_A.weight"] = a
            fused[f"{name}.lora_B.weight"] = np.concatenate([split[f"{root}{part}.lora_B.weight"] for part in parts])
    write_adapter(tmp_path / "split", config, split)
    write_adapter(tmp_path / "fused", config | {"target_modules": ["qkv_proj", "gate_up_proj"]}, fused)
    ids = served.prompt(3)
    slots = [served.add(tmp_path / "split"), served.add(tmp_path / "fused")]
    mine = served.run([(slot, ids) for slot in slots])
    theirs = served.peft(tmp_path / "split", ids)
    for logits in mine:
        np.testing.assert_allclose(logits, theirs, atol=TOLERANCE)


@on_the_best
def test_an_adapter_that_peft_itself_wrote_is_served(tmp_path: Path, backend: Backend) -> None:
    """The files as ``save_pretrained`` leaves them, not as we think it does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    served = served_base(tmp_path, "llama", backend)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(served.path, dtype=torch.float32)
    config = LoraConfig(
        r=6,
        lora_alpha=12,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2},
        use_rslora=True,
        task_type="CAUSAL_LM",
        init_lora_weights=False,  # random B: what training would have left
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "saved")
    ids = served.prompt(0)
    (mine,) = served.run([(served.add(tmp_path / "saved"), ids)])
    theirs = served.peft(tmp_path / "saved", ids)
    np.testing.assert_allclose(mine, theirs, atol=TOLERANCE * max(1.0, float(np.abs(theirs).max()) / 10))
