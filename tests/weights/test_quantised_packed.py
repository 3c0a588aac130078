"""Modules whose numbers native kernels multiply as they are: blocks, answers and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from quantised_files import CAPACITY, MODEL, PATH, PROMPT, Fixture, as_model, run, write_folder

from truffula.errors import CheckpointError
from truffula.kernels.backend import QuantisedArray
from truffula.kernels.cpu import CpuBackend
from truffula.kernels.cpu.formats import WeightOptions
from truffula.kernels.cpu.weights import planned_weights
from truffula.kernels.program import RowOrder
from truffula.model.load import WeightReader, plan_model
from truffula.testing.oracle import Oracle
from truffula.testing.tiny import tiny_tensors
from truffula.weights.open import open_checkpoint
from truffula.weights.safetensors import DTYPES

PACKED = {
    "gptq-4": "Q4_1", "gptq-3": "Q4_1", "awq-gemm": "Q4_1", "awq-gemv": "Q4_1", "ct-int4-group": "Q4_0",
    "ct-int4-channel": "Q4_0", "ct-int3": "Q4_0", "ct-int8": "Q8_0", "ct-naive": "Q8_0", "ct-int8-packed": "Q8_0",
    "ct-mxfp4": "Q5_0",
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_integers_are_kept_in_blocks_of_the_native_kernels(tmp_path: Path, name: str) -> None:
    config, tensors = as_model(Fixture(name))
    path = write_folder(tmp_path / "m", config, tensors)
    opened = open_checkpoint(path)
    for weight in ("q_proj", "up_proj", "down_proj"):
        info = next(item for key, item in opened.tensors.items() if f"{weight}.weight" in key)
        blocks, values = opened.blocks(info.name), opened.read(info.name).astype(np.float32)
        assert blocks is not None and (blocks.kind, blocks.shape) == (PACKED[name], info.shape)
        np.testing.assert_allclose(blocks.dequantise(), values, atol=np.abs(values).max() * 2**-8)
    plan, logits = run(path, exact=False)
    _, exact = run(path)
    assert np.abs(logits - exact).max() < 0.2 * exact.std()
    formats = CpuBackend(1).plan(plan.program, "bfloat16", CAPACITY, plan.stored_types).weight_formats
    assert set(formats) == {PACKED[name].lower(), "bfloat16", "vectors"}


FLOATS = {
    "fp8-tensor": "FP8_128", "fp8-channel": "FP8_128", "fp8-ue8m0": "FP8_32", "fp8-mxfp8": "FP8_32",
    "ct-fp8-tensor": "FP8_128", "ct-fp8-channel": "FP8_128", "ct-mxfp8": "FP8_32", "modelopt-mxfp8": "FP8_32",
    "bnb-nf4": "NF4", "bnb-nf4-double": "NF4", "bnb-nf4-block-256": "NF4", "ct-nvfp4": "FP4_16",
    "modelopt-nvfp4": "FP4_16",
}  # fmt: skip
ROUNDED = ("ct-fp8-tensor", "ct-fp8-channel", "bnb-nf4", "bnb-nf4-double", "ct-nvfp4")
"""The library rounds these weights to 16 bits; native products do not."""


@pytest.mark.parametrize("name", FLOATS)
def test_small_floats_are_kept_as_they_are(tmp_path: Path, name: str) -> None:
    path = write_folder(tmp_path / "m", *as_model(Fixture(name), head=True))
    opened, kind = open_checkpoint(path), FLOATS[name]
    for info in [info for info in opened.tensors.values() if info.parts]:
        blocks, values = opened.blocks(info.name), opened.read(info.name)
        assert blocks is not None and (blocks.kind, blocks.shape) == (kind, info.shape)
        np.testing.assert_array_equal(blocks.dequantise().astype(values.dtype), values)
        np.testing.assert_array_equal(blocks.rows(3, 9).dequantise().astype(values.dtype), values[3:9])
    plan, logits = run(path, exact=False)
    _, exact = run(path)
    np.testing.assert_allclose(logits, exact, atol=0.02 * exact.std() if name in ROUNDED else 1e-4)
    formats = CpuBackend(1).plan(plan.program, "bfloat16", CAPACITY, plan.stored_types).weight_formats
    shapes = [decl.shape for decl in plan.program.weights if len(decl.shape) == 2]
    held = {kind.lower(): sum(held_bytes(kind, *shape) for shape in shapes[1:]), "bfloat16": 2 * 128 * 64}
    assert formats == {**held, "vectors": formats["vectors"]} and shapes[0] == (128, 64)


def held_bytes(kind: str, outputs: int, inputs: int) -> int:
    """Of a matrix in small floats, 16 outputs at a time: the numbers, four bytes for each group's scale (or its four
    scales), and of FP4_16 two floats."""
    size, group = {"FP8_128": (1, 128), "FP8_32": (1, 32)}.get(kind, (0.5, 64))
    more = 8 if kind == "FP4_16" else 0
    return int(-(-outputs // 16) * 16 * (inputs * size + 4 * -(-inputs // group) + more))


def test_other_numbers_of_four_bits_are_kept_by_their_values(tmp_path: Path) -> None:
    config, tensors = as_model(Fixture("bnb-nf4"))
    tensors[f"{PATH}.weight.quant_map"] = tensors[f"{PATH}.weight.quant_map"] * np.float32(0.5)
    opened = open_checkpoint(write_folder(tmp_path, config, tensors))
    assert opened.blocks(f"{PATH}.weight") is None
    assert opened.blocks(f"{PATH.replace('up', 'down')}.weight") is not None
    opened.close()


def test_blocks_of_128_by_128_are_kept(tmp_path: Path) -> None:
    """Widths that are no multiple of 128, as transformers computes them."""
    sizes = {"hidden_size": 160, "intermediate_size": 288, "num_attention_heads": 5, "num_key_value_heads": 5}
    config: dict[str, Any] = {**MODEL, **sizes, "head_dim": 32}
    tensors = tiny_tensors(config, dtype="float32")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        rows, inputs = (-(-size // 128) for size in weight.shape)
        padded = np.zeros((128 * rows, 128 * inputs), np.float32)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        scales = np.abs(padded.reshape(rows, 128, inputs, 128)).max((1, 3)) / 448
        codes = weight / scales.repeat(128, 0).repeat(128, 1)[: weight.shape[0], : weight.shape[1]]
        tensors |= {name: codes.astype(DTYPES["F8_E4M3"]), f"{name}_scale_inv": scales.astype(np.float32)}
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = write_folder(tmp_path / "m", config, tensors)
    plan, logits = run(path, exact=False)
    np.testing.assert_allclose(logits, Oracle(path, tied=False).logits(PROMPT), atol=1e-4)
    planned = [
        CpuBackend(1, exact=exact).plan(plan.program, "bfloat16", CAPACITY, plan.stored_types).weight_formats
        for exact in (False, True)
    ]
    shapes = [decl.shape for decl in plan.program.weights if len(decl.shape) == 2 and decl.shape[0] != 128]
    assert planned[0]["fp8_128"] == sum(held_bytes("FP8_128", *shape) for shape in shapes)
    assert planned[1]["bfloat16"] - planned[0]["bfloat16"] == sum(2 * outputs * inputs for outputs, inputs in shapes)


@pytest.mark.parametrize("suffix", [".weight", ".weight_scale_inv"])
def test_what_is_not_finite_is_refused_where_it_would_be_kept(tmp_path: Path, suffix: str) -> None:
    config, tensors = as_model(Fixture("fp8-channel"))
    bits = tensors[f"{PATH}{suffix}"].copy()
    bits.view(np.uint8).reshape(-1)[-4:] = 0xFF  # NaN in either
    tensors[f"{PATH}{suffix}"] = bits
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight in .* holds (4|64) NaN"):
        run(write_folder(tmp_path / "m", config, tensors), exact=False)


def test_stacked_experts_of_mxfp4_are_kept_in_blocks_along_their_inputs(tmp_path: Path) -> None:
    fixture = Fixture("mxfp4-experts")
    config = {**MODEL, "quantization_config": fixture.config}
    opened = open_checkpoint(write_folder(tmp_path / "m", config, fixture.tensors))
    for name in fixture.expected:
        values, blocks = opened.read(name).astype(np.float32).swapaxes(1, 2), opened.blocks(name)
        assert blocks is not None and (blocks.kind, blocks.shape) == ("Q5_0", values.shape)
        np.testing.assert_array_equal(blocks.dequantise(), values)
        np.testing.assert_array_equal(blocks.output_rows(slice(1, None, 2))[2].dequantise(), values[2, 1::2])


@pytest.mark.parametrize("stored", [0x77777777, 0x76777777])
def test_symmetric_groups_are_packed_without_minimums_unless_the_file_contradicts(tmp_path: Path, stored: int) -> None:
    config, tensors = as_model(Fixture("gptq-4"))
    config["quantization_config"]["sym"] = True
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name] = np.full_like(tensors[name], 0x77777777)
    tensors[f"{PATH}.qzeros"][0, 0] = stored
    path = write_folder(tmp_path / "m", config, tensors)
    opened = open_checkpoint(path)
    assert opened.info(f"{PATH}.weight").values == "Q4_0"
    blocks = opened.blocks(f"{PATH}.weight")
    assert (blocks is None) is (stored != 0x77777777)
    _, logits = run(path, exact=False)
    _, exact = run(path)
    assert np.abs(logits - exact).max() < 0.2 * exact.std()


@pytest.mark.parametrize("zero", [128, 100])
def test_integers_that_do_not_fit_eight_signed_bits_are_not_packed(tmp_path: Path, zero: int) -> None:
    fixture = Fixture("gptq-8")
    fixture.config["sym"] = True
    stored = zero - 1 + (zero - 1 << 8) + (zero - 1 << 16) + (zero - 1 << 24)
    for name in fixture.tensors:
        if name.endswith("qzeros"):
            fixture.tensors[name] = np.full_like(fixture.tensors[name], stored)
    opened = open_checkpoint(write_folder(tmp_path, {**MODEL, "quantization_config": fixture.config}, fixture.tensors))
    blocks, values = opened.blocks("tall.weight"), opened.read("tall.weight").astype(np.float32)
    assert (blocks is None) is (zero == 100)
    if blocks is not None:
        np.testing.assert_allclose(blocks.dequantise(), values, atol=np.abs(values).max() * 2**-8)


def test_a_matrix_whose_rows_are_sorted_is_planned_as_it_is_read(tmp_path: Path) -> None:
    """Its blocks are sorted by whole rows (fused modules of GPT-NeoX, Falcon)."""
    opened = open_checkpoint(write_folder(tmp_path, *as_model(Fixture("fp8-channel"))))
    plan = plan_model(opened)
    last = next(decl for decl in reversed(plan.program.weights) if decl.parts[0].name.endswith("down_proj.weight"))
    parts = (structs.replace(last.parts[0], order=RowOrder(2, (last.shape[0] // 2,))),)
    weights = tuple(replace(decl, parts=parts) if decl is last else decl for decl in plan.program.weights)
    plan = replace(plan, program=replace(plan.program, weights=weights))
    planned = planned_weights(plan.program, WeightOptions("bfloat16"), plan.stored_types)
    pull = WeightReader(opened, plan, block_kinds=CpuBackend(1).block_kinds)
    for decl, (form, _) in zip(plan.program.weights, planned, strict=True):
        packed = [isinstance(part, QuantisedArray) for part in pull(decl)]
        assert packed == [form == "fp8_128"] * len(packed) and (decl.id != last.id or form == "fp8_128")
