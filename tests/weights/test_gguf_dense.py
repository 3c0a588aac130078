"""GGUF files of dense families: quantised tensors in Hugging Face's order, and metadata that is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_dense_cases import CASES, ORIGINAL
from gguf_hybrid_cases import CASES as HYBRIDS
from gguf_pairs import Case, Tensors, logits, write_pair

from truffula.errors import CheckpointError, TruffulaError, UnsupportedModel
from truffula.model.load import plan_model
from truffula.weights.open import open_checkpoint

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def of(architecture: str, number: int = 0) -> Case:
    return [case for case in CASES if case.architecture == architecture][number]


def one_tensor(tensors: Tensors, _: Any) -> Tensors:
    made: Tensors = {}
    for name, array in tensors.items():
        layer, part, kind = name.partition(".self_attn.q_proj.")
        if part and f"{layer}.self_attn.v_proj.{kind}" in tensors:
            parts = [tensors[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            made[f"blk.{layer.rpartition('.')[2]}.attn_qkv.{kind}"] = np.concatenate(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            made[name] = array
    return made


def in_blocks(values: Any) -> Any:
    return gguf.quants.dequantize(gguf.quants.quantize(values, Q8_0), Q8_0)


@pytest.mark.parametrize(
    "case",
    [
        of("gemma4", 2),
        of("phi3"),
        of("gpt2"),
        of("gptneox"),
        of("bloom"),
        of("falcon", 1),
        of("arcee"),
        of("stablelm", 1),
    ],
    ids=lambda case: case.name,
)
def test_blocks_are_put_in_order(tmp_path: Path, case: Case) -> None:
    """Rows move as whole blocks; GPT-2's matrices, which are turned, become numbers."""
    plain = open_checkpoint(write_pair(tmp_path, case)[1])
    packed = open_checkpoint(write_pair(tmp_path / "packed", case, blocks=True)[1])
    assert plan_model(packed).spec == plan_model(plain).spec
    turned, found = case.architecture == "gpt2", 0
    for name, info in packed.tensors.items():
        values = plain.read(name)
        if info.dtype != "Q8_0":
            np.testing.assert_array_equal(packed.read(name), values)
            continue
        matrix = turned and "transformer.h." in name
        wanted = in_blocks(np.ascontiguousarray(values.T)).T if matrix else in_blocks(values)
        np.testing.assert_array_equal(packed.read(name), wanted)
        blocks = packed.blocks(name)
        assert (blocks is None) == matrix
        if blocks is not None:
            np.testing.assert_array_equal(blocks.dequantise(), wanted)
        found += "attn" in name or "attention" in name
    assert found >= 6


WRONG: list[tuple[Case, dict[str, Any], type[TruffulaError], str]] = [
    (of("gemma4"), {"feed_forward_length": [56, 112]}, CheckpointError, "feed_forward_length"),
    (of("gemma4"), {"feed_forward_length": [56, 112, 56, 56, 56]}, UnsupportedModel, "feed_forward_length differs"),
    (of("gemma4"), {"feed_forward_length": [0] * 5}, CheckpointError, "feed_forward_length"),
    (of("gemma4"), {"attention.head_count_kv": [2, 2, 1, 2, 2]}, UnsupportedModel, "sliding_attention"),
    (of("gemma4"), {"attention.head_count_kv": ["a"] * 5}, CheckpointError, "head_count_kv"),
    (of("gemma4"), {"attention.sliding_window_pattern": [True]}, CheckpointError, "1 entries for 5 layers"),
    (of("gemma4"), {"attention.shared_kv_layers": 5}, CheckpointError, "shared_kv_layers is 5, of 5 layers"),
    (of("gemma4"), {"attention.key_length_swa": None}, CheckpointError, "key_length_swa is missing"),
    (of("gemma4"), {"rope.dimension_count_swa": 4}, UnsupportedModel, "dimension_count_swa is 4"),
    (of("gemma4"), {"rope.scaling.factor": 2.0}, CheckpointError, "rope_freqs"),
    (of("gemma4", 2), {"expert_count": 4}, CheckpointError, "expert_count is 4"),
    (of("gemma"), {"attention.sliding_window": 7}, UnsupportedModel, "sliding_window"),
    (of("phi3", 1), {ORIGINAL: None}, CheckpointError, "original_context_length is missing"),
    (of("phi3", 1), {"rope.scaling.attn_factor": float("nan")}, CheckpointError, "attn_factor"),
    (of("phi3", 1), {"rope.scaling.type": "yarn"}, UnsupportedModel, "rope_factors"),
    (of("phi3", 1), {"rope.dimension_count": 6}, UnsupportedModel, "factor"),
    (of("mistral3"), {"rope.scaling.type": "none"}, UnsupportedModel, "temperature_scale"),
    (of("mistral3", 1), {"rope.scaling.yarn_log_multiplier": 0.5}, UnsupportedModel, "yarn_log_multiplier"),
    (of("stablelm", 1), {"attention.head_count": 2}, CheckpointError, "a row for each head"),
    (of("glm4"), {"rope.dimension_sections": [1, 1, 1, 0]}, UnsupportedModel, "dimension_sections"),
    (of("exaone4"), {"nextn_predict_layers": 1}, UnsupportedModel, "nextn_predict_layers"),
    (of("apertus"), {" xielu.beta": [1.0, 2.0]}, CheckpointError, "xielu.beta"),
    (of("apertus"), {" xielu.beta": None}, CheckpointError, "xielu.beta is None"),
    (of("apertus"), {" xielu.eps": [1.0, 2.0, float("inf")]}, CheckpointError, "xielu.eps"),
    (of("hunyuan-dense"), {"expert_count": 8}, UnsupportedModel, "expert_count is 8; it must be 1"),
    (of("olmo"), {"attention.layer_norm_epsilon": 1e-6}, UnsupportedModel, "layer_norm_epsilon is 1e-06"),
    (of("gpt2"), {"attention.head_count": 5}, UnsupportedModel, "head_count is 5"),
    (of("gpt2"), {"rope.scaling.factor": 2.0}, UnsupportedModel, "no rotary embedding"),
    (of("starcoder"), {"attention.head_count_kv": 4}, UnsupportedModel, "head_count_kv is 4"),
    (of("gptneox"), {"use_parallel_residual": None}, CheckpointError, "use_parallel_residual is None"),
    (of("bloom"), {"feed_forward_length": 64}, UnsupportedModel, "feed_forward_length is 64"),
    (of("falcon"), {"attention.head_count_kv": 3}, UnsupportedModel, "head_count_kv is 3"),
    (of("mpt"), {"attention.max_alibi_bias": 4.0}, UnsupportedModel, "max_alibi_bias is 4.0"),
]


@pytest.mark.parametrize(("case", "changed", "kind", "words"), WRONG, ids=lambda item: str(item)[:40])
def test_metadata_that_is_wrong_is_refused_by_name(
    tmp_path: Path, case: Case, changed: dict[str, Any], kind: type[TruffulaError], words: str
) -> None:
    _, file = write_pair(tmp_path, replace(case, metadata={**case.metadata, **changed}))
    with pytest.raises(kind, match=words):
        plan_model(open_checkpoint(file))


@pytest.mark.parametrize(
    ("case", "tensors", "words"),
    [
        (of("gemma4"), {}, "rope_freqs.weight is missing"),
        (of("gemma4"), {"rope_freqs.weight": [1.0] * 3}, "expected 8 numbers"),
        (of("gemma4"), {"rope_freqs.weight": [1.0, 1e30] * 4}, "expected 8 numbers"),
        (of("gemma4"), {"rope_freqs.weight": [float("nan")] * 8}, "expected 8 numbers"),
        (of("phi3", 1), {"rope_factors_long.weight": [1.0] * 4}, "rope_factors_short.weight is missing"),
        (
            of("phi3", 2),
            {"rope_factors_long.weight": [1.0] * 4, "rope_factors_short.weight": [0.0] * 4},
            "not positive",
        ),
        (of("starcoder2"), {"rope_factors_short.weight": [1.0] * 4}, "rope_factors_long.weight is missing"),
        (of("gemma"), {"rope_freqs.weight": [1.0] * 5}, "rope_freqs.weight is not supported"),
    ],
)
def test_tables_of_a_rotation_that_are_wrong_are_refused(
    tmp_path: Path, case: Case, tensors: dict[str, list[float]], words: str
) -> None:
    stored = {name: np.array(values, np.float32) for name, values in tensors.items()}
    _, file = write_pair(tmp_path, replace(case, tensors=stored))
    with pytest.raises((CheckpointError, UnsupportedModel), match=words):
        plan_model(open_checkpoint(file))


def test_longrope_has_the_factor_of_the_file(tmp_path: Path) -> None:
    """A file without the factor is not scaled, as in llama.cpp."""
    case = of("phi3", 2)
    plan = plan_model(open_checkpoint(write_pair(tmp_path, case)[1]))
    assert plan.spec.ropes[0].factor == pytest.approx(1.3)
    bare = {key: value for key, value in case.metadata.items() if key != "rope.scaling.attn_factor"}
    plan = plan_model(open_checkpoint(write_pair(tmp_path / "bare", replace(case, metadata=bare))[1]))
    assert plan.spec.ropes[0].factor == 1.0


@pytest.mark.parametrize("name", ["gemma4", "arcee", "exaone4", "stablelm", "ernie4_5", "phi2", "starcoder2", "lfm2"])
def test_queries_keys_and_values_as_one_tensor(tmp_path: Path, name: str) -> None:
    """As the converter writes them with --fuse-qkv, after its other changes, and wrote Phi 2's."""
    case = next(case for case in HYBRIDS if case.architecture == name) if name == "lfm2" else of(name)
    plain, _ = write_pair(tmp_path, case)
    fused = replace(case, convert=(*case.convert, one_tensor))
    checkpoint = open_checkpoint(write_pair(tmp_path / "fused", fused)[1])
    assert any(name.endswith("self_attn.qkv_proj.weight") for name in checkpoint.tensors)
    assert plan_model(checkpoint).spec == plan_model(open_checkpoint(plain)).spec
    np.testing.assert_allclose(logits(checkpoint.path), logits(plain), rtol=0, atol=case.rounded)


def test_experts_of_gemma4_with_gate_and_up_apart(tmp_path: Path) -> None:
    def apart(tensors: Tensors, _: Any) -> Tensors:
        made: Tensors = {}
        for name, array in tensors.items():
            if name.endswith("experts.gate_up_proj.weight"):
                root, half = f"blk.{name.split('.')[2]}.ffn", array.shape[1] // 2
                made |= {f"{root}_gate_exps.weight": array[:, :half], f"{root}_up_exps.weight": array[:, half:]}
            else:
                made[name] = array
        return made

    case = of("gemma4", 2)
    plain, _ = write_pair(tmp_path, case)
    _, file = write_pair(tmp_path / "apart", replace(case, convert=(*case.convert, apart)))
    np.testing.assert_array_equal(logits(file), logits(plain))
