"""GGUF files of models whose layers keep a state: blocks, adapters, older forms, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_dense_cases import CASES as DENSE
from gguf_hybrid_cases import CASES, FALCON, HEADS, qwen3_next, qwen35, qwen35_moe
from gguf_pairs import IDS, Case, logits, write_pair
from gguf_writer import GgufBlocks, write_gguf
from kernel_backends import BEST

from truffula.errors import AdapterError, CheckpointError, TruffulaError, UnsupportedModel
from truffula.kernels.adapters import make_image
from truffula.kernels.backend import QuantisedArray, as_array
from truffula.lora.base import BaseWeights, base_source
from truffula.lora.peft import BaseFacts, validate_adapter
from truffula.model.load import WeightReader, plan_model
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.programs import Driver, capacity_for
from truffula.weights.open import open_checkpoint

BY_TYPE = {case.model_type: case for case in CASES}


def contents(file: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def dequantised(file: Path) -> Path:
    """The same model in float32, by gguf-py."""
    fields, tensors = contents(file)
    values = {
        name: gguf.quants.dequantize(item.data, item.tensor_type).reshape(item.shape[::-1].tolist()).astype(np.float32)
        for name, item in tensors.items()
    }
    return write_gguf(file.with_name("dequantised.gguf"), fields, values)


@pytest.mark.parametrize(
    "case",
    [qwen35(32), qwen35(16), qwen35_moe(32), qwen3_next(32), *(case for case in CASES if "qwen" not in case.name)],
    ids=lambda case: f"{case.name} {case.metadata.get('ssm.inner_size', '')}",
)
def test_blocks_hold_the_values_of_the_model(tmp_path: Path, case: Case) -> None:
    _, file = write_pair(tmp_path, case, blocks=True)
    packed, plain = open_checkpoint(file), open_checkpoint(dequantised(file))
    assert packed.tensors.keys() == plain.tensors.keys()
    kept = set()
    for name in packed.tensors:
        values = plain.read(name)
        np.testing.assert_array_equal(packed.read(name), values, err_msg=name)
        blocks = packed.blocks(name)
        if blocks is not None:
            kept.add(re.sub(r"layers\.\d+\.", "", name))
            np.testing.assert_array_equal(blocks.dequantise(), values, err_msg=name)
        elif packed.tensors[name].dtype == "Q8_0":
            assert packed.tensors[name].values == "F32" or len(values.shape) < 2, name
    assert len(kept) > 3
    if case.architecture == "qwen35":
        assert "model.linear_attn.in_proj_qkv.weight" in kept
        assert ("model.linear_attn.out_proj.weight" in kept) == (case.config["linear_value_head_dim"] == 32)


FUSED = [case for case in DENSE if case.architecture in ("falcon", "gptneox", "bloom")]


@pytest.mark.parametrize("case", [qwen35(32), qwen3_next(32), *FUSED], ids=lambda case: case.name)
def test_a_program_gets_the_same_rows_in_blocks_and_as_values(tmp_path: Path, case: Case) -> None:
    """Those of fused modules are sorted: a program has all q, all k, all v and all gates together."""
    _, file = write_pair(tmp_path, case, blocks=True)
    checkpoint = open_checkpoint(file)
    plan = plan_model(checkpoint)
    packed, plain = (WeightReader(checkpoint, plan, block_kinds=kinds) for kinds in (frozenset({"Q8_0"}), frozenset()))
    kept = set()
    for decl in plan.program.weights:
        for part, found, wanted in zip(decl.parts, packed(decl), plain(decl), strict=True):
            np.testing.assert_array_equal(as_array(found), as_array(wanted), err_msg=part.name)
            if isinstance(found, QuantisedArray):
                kept.add(part.name.split(".")[-2])
    assert {"in_proj_qkvz", "in_proj_qkv", "query_key_value"} & kept


def test_columns_in_larger_blocks_are_put_in_order_as_values(tmp_path: Path) -> None:
    """Heads are narrower than a block of Q4_K, whose values are random."""
    case, rng = qwen35(64), np.random.default_rng(0)
    _, file = write_pair(tmp_path, case)
    fields, tensors = contents(file)
    stored: dict[str, Any] = {name: item.data.reshape(item.shape[::-1].tolist()) for name, item in tensors.items()}
    data = rng.integers(0, 256, (32, 144), np.uint8)
    data[:, :4] = np.full((32, 2), 0.01, "<f2").view(np.uint8)
    stored["blk.0.ssm_out.weight"] = GgufBlocks(12, (32, 256), data.tobytes())
    checkpoint = open_checkpoint(write_gguf(tmp_path / "k.gguf", fields, stored))
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_K)
    wanted = values.reshape(32, HEADS // 2, 2, 64).swapaxes(1, 2).reshape(32, 256)
    np.testing.assert_array_equal(checkpoint.read("model.layers.0.linear_attn.out_proj.weight"), wanted)


def test_parts_in_different_blocks_are_joined_as_values(tmp_path: Path) -> None:
    _, file = write_pair(tmp_path, qwen3_next(32), blocks=True)
    fields, tensors = contents(file)
    stored: dict[str, Any] = {
        name: GgufBlocks(int(item.tensor_type), tuple(item.shape[::-1].tolist()), item.data.tobytes())
        for name, item in tensors.items()
    }
    gate, name = tensors["blk.0.attn_gate.weight"], "model.layers.0.linear_attn.in_proj_qkvz.weight"
    whole = gguf.quants.dequantize(gate.data, gate.tensor_type)
    other = gguf.quants.quantize(whole, gguf.GGMLQuantizationType.Q4_0)
    stored["blk.0.attn_gate.weight"] = GgufBlocks(2, whole.shape, other.tobytes())
    file = write_gguf(tmp_path / "mixed.gguf", fields, stored)
    checkpoint = open_checkpoint(file)
    assert checkpoint.tensors[name].dtype == "Q4_0+Q8_0" and checkpoint.blocks(name) is None
    np.testing.assert_array_equal(checkpoint.read(name), open_checkpoint(dequantised(file)).read(name))


def test_an_older_file_of_qwen3_next_has_the_gate_with_q_k_and_v(tmp_path: Path) -> None:
    case = qwen3_next()
    whole = replace(
        case, convert=tuple(step for step in case.convert if step.__qualname__.split(".")[0] != "gate_apart")
    )
    plain, file = write_pair(tmp_path, whole)
    np.testing.assert_allclose(logits(file), logits(plain), rtol=0, atol=2e-5)


def test_layers_of_qwen35_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    case = qwen35()
    more = {"block_count": 5, "nextn_predict_layers": 1, "attention.recurrent_layers": [True, True, True, False, False]}
    names = ("attn_norm", "attn_qkv", "nextn.eh_proj", "nextn.shared_head_norm")
    extra = {f"blk.4.{name}.weight": np.ones(32, np.float32) for name in names}
    plain, file = write_pair(tmp_path, replace(case, metadata={**case.metadata, **more}), extra)
    checkpoint = open_checkpoint(file)
    assert sorted(checkpoint.unused) == sorted(extra) and not checkpoint.warnings
    np.testing.assert_allclose(logits(file), logits(plain), rtol=0, atol=2e-5)


def test_a_tied_file_has_no_head(tmp_path: Path) -> None:
    plain, file = write_pair(tmp_path, qwen35(tie_word_embeddings=True))
    assert "lm_head.weight" not in open_checkpoint(file).tensors
    np.testing.assert_allclose(logits(file), logits(plain), rtol=0, atol=2e-5)


def adapted(path: Path, adapter: Path) -> Any:
    checkpoint = open_checkpoint(path)
    plan, capacity = plan_model(checkpoint), capacity_for(12)
    pull = WeightReader(checkpoint, plan)
    executable = list(BEST.values())[-1].load(plan.program, "float32", pull, capacity)
    made = validate_adapter(
        adapter, plan.program.sites, base=BaseFacts("m", BaseWeights(base_source(plan, checkpoint)))
    )
    slot = executable.adapter(make_image(executable.layout, made.sites, generation=made.generation))
    return Driver(executable, capacity, slot).feed(IDS)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_next", "granitemoehybrid", "nemotron_h", "kimi_linear"])
def test_an_adapter_of_the_model_fits_its_file(tmp_path: Path, model_type: str) -> None:
    plain, file = write_pair(tmp_path, BY_TYPE[model_type])
    sites = plan_model(open_checkpoint(plain)).interface.sites
    write_tiny_adapter(tmp_path / "a", sites, rank=3, targets="all-linear")
    found = [adapted(path, tmp_path / "a") for path in (file, plain)]
    np.testing.assert_allclose(*found, rtol=0, atol=2e-5)
    assert np.abs(found[0] - logits(file)).max() > 1e-2


def test_falcon_h1_takes_no_adapters(tmp_path: Path) -> None:
    plain, file = write_pair(tmp_path, FALCON)
    checkpoint = open_checkpoint(file)
    assert "No adapters are taken" in checkpoint.warnings[0]
    plan = plan_model(checkpoint)
    write_tiny_adapter(tmp_path / "a", plan_model(open_checkpoint(plain)).interface.sites, targets=["q_proj"])
    with pytest.raises(AdapterError, match="multipliers of Falcon-H1"):
        validate_adapter(
            tmp_path / "a", plan.program.sites, base=BaseFacts("m", BaseWeights(base_source(plan, checkpoint)))
        )


HOSTILE: tuple[Any, ...] = (0, -1, 3, 2**31, 2**62, 1e30, "x", True, [], [1] * 3, [2**31] * 4, [True] * 2, ["x"] * 4)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.architecture in ("qwen35", "jamba") else pytest.mark.slow)
        for case in [*CASES, FALCON]
    ],
)
def test_a_wrong_value_of_any_key_is_refused_or_another_model(tmp_path: Path, case: Case) -> None:
    """Nothing else is raised, and nothing takes as long as the number says."""
    _, file = write_pair(tmp_path, case)
    fields, tensors = contents(file)
    stored = {name: item.data.reshape(item.shape[::-1].tolist()) for name, item in tensors.items()}
    keys = [key for key in fields if key.startswith(f"{case.architecture}.")]
    assert len(keys) > 8
    rng = np.random.default_rng(len(keys))
    for key in keys:
        for index in rng.choice(len(HOSTILE), 3, replace=False):
            changed = write_gguf(tmp_path / "x.gguf", {**fields, key: HOSTILE[index]}, stored)
            try:
                checkpoint = open_checkpoint(changed)
                plan = plan_model(checkpoint)
                for name in plan.stored_types:
                    checkpoint.read(name)
            except TruffulaError as error:
                assert str(error)


@pytest.mark.parametrize(
    ("model_type", "key", "value", "error"),
    [
        ("qwen3_5_text", "attention.recurrent_layers", [True] * 3, "is a list of 3; expected a list of 4 of type bool"),
        ("qwen3_5_text", "ssm.time_step_rank", 3, "is 3, which does not divide qwen35.ssm.inner_size, 40"),
        ("granitemoehybrid", "attention.head_count_kv", 2, "is 2; expected a list of 3 of type int"),
        ("bamba", "rope.dimension_count", 8, "is 8; it must be 4"),
        ("jamba", "attention.head_count_kv", [2, 2, 0], "layers .0, 1., which are not one in every few"),
        ("nemotron_h", "feed_forward_length", [0, 0, 56], "is a list of 3; expected a list of 4"),
        ("lfm2_moe", "expert_gating_func", 1, "expert_gating_func is 1; it must be 2"),
        ("kimi_linear", "attention.key_length_mla", 6, "is 6; expected more than rope.dimension_count, 6"),
        ("kimi_linear", "attention.key_length", 20, "attention.key_length is 20; it must be 24"),
        ("qwen3_next", "ssm.dt_b_c_rms", True, "ssm.dt_b_c_rms .True. changes what the model computes"),
        ("qwen3_next", "expert_weights_scale", 2.0, "expert_weights_scale .2.0. changes what the model computes"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, model_type: str, key: str, value: Any, error: str) -> None:
    case = BY_TYPE[model_type]
    _, file = write_pair(tmp_path, replace(case, metadata={**case.metadata, key: value}))
    with pytest.raises((CheckpointError, UnsupportedModel), match=error) as caught:
        open_checkpoint(file)
    assert str(caught.value.param).endswith(key)
