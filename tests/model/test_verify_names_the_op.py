"""``verify_model`` passes on what is right, and names the op and the layer of a single mistake."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_backends import NATIVE
from perturbed import PerturbedBackend

from truffula.kernels.backend import Array
from truffula.kernels.program import Norm, Program, WeightDecl
from truffula.kernels.select import select_backend
from truffula.model.architectures import ARCHITECTURES
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.oracle import Oracle
from truffula.testing.parity import VerifyReport, verify_model
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint

REFERENCE = select_backend("reference", "cpu")
BACKENDS = ["reference", *(["cpu"] if NATIVE else [])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("qwen3", num_hidden_layers=4, tie_word_embeddings=True)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    write_tiny_adapter(folder, model, rank=4, alpha=8, targets=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    return folder


def verify(model: Path, **more: Any) -> VerifyReport:
    return verify_model(model, prompts=[[5, 17, 3, 99, 41, 8, 8, 60]], new_tokens=4, **more)


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_and_adapter_pass(model: Path, adapter: Path, backend: str) -> None:
    for report in (verify(model, backend=backend), verify(model, adapter=adapter, backend=backend)):
        assert report.ok
        assert report.max_logit_diff < 1e-4
        assert report.tokens_compared == 4
        # Every op that computes a value is compared: all but the one that tabulates the rotation.
        assert {row.kind for row in report.rows} == {
            "Embed",
            "Norm",
            "Linear",
            "Rope",
            "Attention",
            "TakeRows",
            "Logits",
        }


def and_slow(fast: list[str], slow: Collection[str]) -> list[Any]:
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(slow) - set(fast)))]


@pytest.mark.parametrize("backend", BACKENDS)
# kimi_k2 is no type of transformers.
@pytest.mark.parametrize(
    "model_type", and_slow(["gemma2", "gemma3_text", "mistral"], set(ARCHITECTURES) - {"kimi_k2"})
)  # slow: two minutes
def test_other_shapes_of_layer_pass(tmp_path: Path, model_type: str, backend: str) -> None:
    write_tiny_checkpoint(tmp_path, tiny_config(model_type))
    # As many tokens as heads: rows and heads of a norm's output must still be told apart.
    report = verify_model(tmp_path, prompts=[[1, 2, 3, 4], list(range(20))], new_tokens=4, backend=backend)
    assert report.ok and report.tokens_compared == 8


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("layers.2.self_attn.qkv_proj.weight", "layers.2.qkv"),
        ("layers.1.self_attn.o_proj.weight", "layers.1.out"),
        ("layers.0.mlp.gate_up_proj.weight", "layers.0.mlp_in"),
        ("layers.3.mlp.down_proj.weight", "layers.3.mlp_out"),
        ("layers.1.self_attn.k_norm.weight", "layers.1.k_norm"),
        ("norm.weight", "final_norm"),
    ],
)
def test_a_changed_weight_is_found(model: Path, name: str, op: str) -> None:
    def change(decl: WeightDecl, parts: Sequence[Array]) -> Sequence[Array]:
        if decl.name != name:
            return parts
        last = np.array(parts[-1])
        last[0] = last[0] * 1.5 + 0.1
        return [*parts[:-1], last]

    report = verify(model, backend=PerturbedBackend(REFERENCE, weight=change))
    assert report.first_divergence is not None and not report.ok
    assert report.first_divergence.op == op
    assert report.first_divergence.layer == (int(op.split(".")[1]) if op.startswith("layers") else None)


@pytest.mark.parametrize("key", ["layers.1.before_mixer", "layers.2.before_mlp", "layers.0.q_norm", "final_norm"])
def test_a_changed_eps_is_found(model: Path, key: str) -> None:
    def change(program: Program) -> Program:
        ops = tuple(
            dataclasses.replace(op, eps=0.05) if isinstance(op, Norm) and op.name == key else op for op in program.ops
        )
        return dataclasses.replace(program, ops=ops)

    report = verify(model, backend=PerturbedBackend(REFERENCE, program=change))
    assert report.first_divergence is not None
    assert report.first_divergence.op == key


@pytest.mark.parametrize(
    ("layer", "module", "op"), [(2, "v_proj", "qkv"), (1, "o_proj", "out"), (3, "up_proj", "mlp_in")]
)
def test_a_changed_adapter_scale_is_found(
    model: Path, adapter: Path, layer: int, module: str, op: str, tmp_path: Path
) -> None:
    wanted = f"model.layers.{layer}."
    config = json.loads((adapter / "adapter_config.json").read_text())
    block = "mlp" if op.startswith("mlp") else "self_attn"
    config["alpha_pattern"] = {f"layers.{layer}.{block}.{module}": 1.1 * config["lora_alpha"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(adapter / "adapter_model.safetensors", tmp_path)
    oracle = Oracle(model, tied=True, adapter=adapter)
    report = verify(model, adapter=tmp_path, oracle=oracle)
    assert report.first_divergence is not None
    assert report.first_divergence.op == f"layers.{layer}.{op}"
    assert report.first_divergence.layer == layer
    if op == "qkv":  # of a fused op, the slice at fault
        assert report.first_divergence.module == f"{wanted}self_attn.{module}"


def test_a_table_changed_for_one_id_shows_only_where_the_id_is(model: Path) -> None:
    def change(decl: WeightDecl, parts: Sequence[Array]) -> Sequence[Array]:
        if "rows" not in decl.uses:
            return parts
        table = np.array(parts[0])
        table[99] += 0.5
        return [table]

    report = verify(model, backend=PerturbedBackend(REFERENCE, weight=change))
    assert report.first_divergence is not None and report.first_divergence.op == "embed"
    untouched = verify_model(model, prompts=[[5, 6]], new_tokens=0, backend=PerturbedBackend(REFERENCE, weight=change))
    assert untouched.first_divergence is not None and untouched.first_divergence.op == "logits"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "model_type",
    and_slow(
        ["llama", "qwen3", "gemma2", "gemma3_text"], ("cohere", "granite", "helium", "nemotron", "olmo", "stablelm")
    ),
)  # slow: 10 s
def test_in_bfloat16_the_order_of_roundings_is_transformers_own(tmp_path: Path, model_type: str, backend: str) -> None:
    """Before the first rounded product both sides have the same bits: a norm that multiplied before the cast, or an
    embedding scale that was not rounded, would show here and nowhere else.
    """
    write_tiny_checkpoint(tmp_path, tiny_config(model_type), dtype="bfloat16")
    report = verify_model(
        tmp_path, prompts=[list(range(3, 24))], new_tokens=0, dtype="bfloat16", tolerance=1.0, backend=backend
    )
    errors = {row.op: row.error for row in report.rows}
    assert errors["embed"] == 0.0
    assert errors["layers.0.before_mixer"] == 0.0
    if model_type == "stablelm":  # its attention module does not show q and k after the rotation
        assert "layers.0.rope" not in errors
    else:
        assert errors["layers.0.rope"] < 0.02
    assert report.ok
