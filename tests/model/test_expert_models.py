"""Experts in every form in which checkpoints hold them, and their errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernel_backends import on_the_best

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.kernels.backend import Backend
from truffula.kernels.cpu import CpuBackend, available
from truffula.model.load import WeightReader, plan_model
from truffula.model.read import read_config
from truffula.testing.files import Array
from truffula.testing.oracle import Oracle
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

IDS = [7, 31, 12, 55, 40, 9, 23]


def logits(folder: Path, backend: Backend) -> Array:
    checkpoint = open_checkpoint(folder)
    plan = plan_model(checkpoint)
    pull, capacity = WeightReader(checkpoint, plan), capacity_for(len(IDS))
    executable = backend.load(plan.program, "float32", pull, capacity)
    pull.finish()
    made = Driver(executable, capacity).feed(IDS)
    executable.close()
    return made


def stacked(tensors: dict[str, Array], *, fused: bool, ending: str) -> dict[str, Array]:
    """``tensors`` of a Qwen3 model with the matrices of all experts in one tensor."""
    made = {name: array for name, array in tensors.items() if ".experts." not in name}
    for layer in range(3):
        root = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([tensors[f"{root}{e}.{leaf}_proj.weight"] for e in range(6)]) for leaf in ("gate", "up", "down")
        )
        made[f"{root}down_proj{ending}"] = down
        made |= {f"{root}gate_up_proj{ending}": np.concatenate([gate, up], 1)} if fused else {
            f"{root}gate_proj{ending}": gate, f"{root}up_proj{ending}": up,
        }  # fmt: skip
    return made


@on_the_best
def test_stacked_experts_are_those_of_single_tensors(tmp_path: Path, backend: Backend) -> None:
    config = tiny_config("qwen3_moe")
    single = tiny_tensors(config, seed=3)
    wanted = None
    for number, (fused, ending) in enumerate([(True, ""), (True, ".weight"), (False, ".weight")]):
        tensors = stacked(single, fused=fused, ending=ending)
        folder = write_tiny_checkpoint(tmp_path / str(number), config, drop=single, extra=tensors)
        if wanted is None:  # the form of transformers 5
            wanted = Oracle(folder, tied=False).logits(IDS)
        np.testing.assert_allclose(logits(folder, backend), wanted, atol=1e-4)


@on_the_best
def test_the_text_part_of_a_multimodal_llama4(tmp_path: Path, backend: Backend) -> None:
    """The same tensors as the text class, which is compared with transformers, under the names of the whole."""
    text = tiny_tensors(tiny_config("llama4_text"), seed=3)
    whole = {f"language_model.{name}": array for name, array in text.items()}
    whole["vision_model.class_embedding"] = np.zeros(8, np.float32)
    config = tiny_config("llama4")
    folder = write_tiny_checkpoint(tmp_path / "whole", config, drop=tiny_tensors(config), extra=whole)
    write_tiny_checkpoint(tmp_path / "text", tiny_config("llama4_text"), seed=3)
    np.testing.assert_array_equal(logits(folder, backend), logits(tmp_path / "text", backend))
    plan = plan_model(open_checkpoint(folder))
    assert plan.unused == ("vision_model.class_embedding",)


@pytest.mark.skipif(not available(), reason="the native kernels are not compiled")
def test_experts_rounded_to_q8_0_are_near_and_smaller(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", hidden_size=64, moe_intermediate_size=32, head_dim=16)
    folder = write_tiny_checkpoint(tmp_path, config)
    plain, rounded = CpuBackend(2), CpuBackend(2, quantize="q8_0")
    exact, near = logits(folder, plain), logits(folder, rounded)
    assert 0 < np.abs(exact - near).max() < 0.2 * np.abs(exact).max()
    program, capacity = plan_model(open_checkpoint(folder)).program, capacity_for(8)
    assert "q8_0" in rounded.plan(program, "float32", capacity).weight_formats


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(
        tmp_path, tiny_config("mixtral"), drop=["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    )
    with pytest.raises(CheckpointError, match=r"1 tensors .* missing: .*layers\.1\.block_sparse_moe\.experts\.3\.w2"):
        plan_model(open_checkpoint(folder))


def test_a_stacked_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    folder = write_tiny_checkpoint(tmp_path, tiny_config("gpt_oss"), extra={name: np.zeros((6, 32, 24), np.float32)})
    with pytest.raises(CheckpointError, match=rf"{name} .* has shape \[6, 32, 24\]; the config says \[6, 24, 32\]"):
        plan_model(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_local_experts": 10**6}, "num_local_experts"),
        ("qwen3_moe", {"num_experts": 7}, "num_local_experts"),
        ("qwen3_moe", {"mlp_only_layers": ["x"]}, "mlp_only_layers"),
        ("glm4_moe", {"n_group": 4}, "n_group"),
        ("dots1", {"topk_group": 5}, "topk_group"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha"),
        ("llama4_text", {"num_experts_per_tok": 2}, "num_experts_per_tok"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2, 2]}, "moe_topk"),
        ("hunyuan_v1_moe", {"num_experts": 2**31 - 1}, "num_experts"),
        ("ernie4_5_moe", {"moe_num_experts": 2**31 - 1}, "moe_num_experts"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ("lfm2_moe", {"layer_types": None}, "layer_types"),
        ("lfm2_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ("nemotron_h", {"n_group": 4}, "n_group"),
        ("jamba", {"expert_layer_offset": 2}, "expert_layer_offset"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers"),
        ("falcon_h1", {"mamba_d_head": 5}, "mamba_n_heads"),
    ],
)
def test_what_is_not_served_is_refused_by_name(model_type: str, changes: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read_config(tiny_config(model_type) | changes)
    assert caught.value.param == named


@pytest.mark.parametrize(
    ("model_type", "module"),
    [("exaone_moe", "mtp.fc"), ("ernie4_5_moe", "model.mtp_linear_proj.0"), ("cohere2_moe", "model.layers.3.eh_proj")],
)
def test_what_predicts_further_tokens_is_left_out(tmp_path: Path, model_type: str, module: str) -> None:
    extra = {f"{module}.weight": np.zeros((4, 4), np.float32)}
    plan = plan_model(open_checkpoint(write_tiny_checkpoint(tmp_path, tiny_config(model_type), extra=extra)))
    assert plan.unused == tuple(extra)
    assert not plan.warnings
