"""Blocks of GGUF files handed out as they are stored: rows in order, scales judged, and served to the same values."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf_models import HEADS, KV_HEADS, interleave, write_tiny_gguf
from gguf_writer import GgufBlocks, write_gguf

from truffula.config import EngineConfig
from truffula.engine.build import build_engine
from truffula.errors import CheckpointError, ConfigError
from truffula.kernels.backend import QuantisedArray
from truffula.kernels.cpu import CpuBackend, available
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Linear
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.select import Precision, select_backend
from truffula.model.load import WeightReader, plan_model
from truffula.testing.programs import Part, fill_step
from truffula.weights.gguf.quants import FORMATS
from truffula.weights.open import open_checkpoint

KINDS = {"Q8_0": 8, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7}
native = pytest.mark.skipif(not available(), reason="the native library was not built")
CAPACITY = Capacity(
    max_tokens=16, max_seqs=1, max_logit_rows=16, max_segments=1, num_blocks=3, block_size=16, max_blocks_per_seq=2
)


def packed_file(path: Path, kind: str, head: str = "Q8_0", spoil: str = "") -> Path:
    """A tiny llama with matrices in blocks of ``kind``, its table in ``head``; one scale of ``spoil`` is infinite."""
    tiny = write_tiny_gguf(path.with_suffix(".plain"), "llama", hidden=64)
    stored: dict[str, Any] = dict(tiny.stored)
    for name, array in tiny.stored.items():
        if array.ndim != 2:
            continue
        type_ = KINDS[head if name == "token_embd.weight" else kind]
        heads = HEADS if "attn_q" in name else KV_HEADS if "attn_k" in name else 0
        data = quants.quantize(np.asarray(array, np.float32), GGMLQuantizationType(type_))
        assert heads == 0 or data.shape == interleave(data, heads).shape
        if name == spoil:
            data[3, :2] = np.array([np.inf], np.float16).view(np.uint8)
        stored[name] = GgufBlocks(type_, array.shape, data.tobytes())
    return write_gguf(path, tiny.metadata, stored)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_stand_for_what_is_read(tmp_path: Path, kind: str) -> None:
    checkpoint = open_checkpoint(packed_file(tmp_path / "a.gguf", kind))
    offered = 0
    for name, info in checkpoint.tensors.items():
        blocks = checkpoint.blocks(name)
        if blocks is None:
            assert len(info.shape) == 1 or info.dtype == "Q5_1"
            continue
        offered += 1
        values = checkpoint.read(name)
        assert blocks.kind == info.dtype and blocks.shape == info.shape and blocks.nbytes == info.nbytes
        np.testing.assert_array_equal(blocks.dequantise(), values)
        np.testing.assert_array_equal(blocks.rows(3, 9).dequantise(), values[3:9])
    assert offered
    checkpoint.close()


def test_plain_numbers_have_no_blocks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "a.gguf", "llama").path)
    assert all(checkpoint.blocks(name) is None for name in checkpoint.tensors)


def test_only_the_kinds_asked_for_come_as_blocks(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(packed_file(tmp_path / "a.gguf", "Q4_1"))
    plan = plan_model(checkpoint)
    assert {plan.stored_types[part.name] for part in plan.program.weights[0].parts} == {"Q8_0"}
    seen = []
    pull = WeightReader(checkpoint, plan, block_kinds=frozenset({"Q4_1"}), progress=lambda *step: seen.append(step))
    for decl in plan.program.weights:
        for part in pull(decl):
            assert isinstance(part, QuantisedArray) == (len(decl.shape) == 2 and decl.shape[0] != plan.spec.vocab_size)
    pull.finish()
    assert seen[-1][1] == plan.stored_bytes


def test_a_scale_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(packed_file(tmp_path / "a.gguf", "Q4_0", spoil="blk.1.ffn_up.weight"))
    plan = plan_model(checkpoint)
    pull = WeightReader(checkpoint, plan, block_kinds=frozenset(KINDS))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight .* holds 32 NaN or infinite values"):
        for decl in plan.program.weights:
            pull(decl)


def logits(path: Path, backend: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of ten positions, with what the first product gives."""
    checkpoint = open_checkpoint(path)
    plan = plan_model(checkpoint)
    pull = WeightReader(checkpoint, plan, block_kinds=backend.block_kinds)
    executable = backend.load(plan.program, "float32", pull, CAPACITY, debug=True)
    pull.finish()
    fill_step(executable.inputs, [Part(tuple(range(5, 15)), 0, (1, 2), None, "all")], 16)
    executable.run()
    first = next(index for index, op in enumerate(plan.program.ops) if isinstance(op, Linear))
    made = executable.logits(), executable.tap(first)
    executable.close()
    return made


def relative(made: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(((made - wanted) ** 2).mean() / (wanted**2).mean()))


@native
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_blocks(tmp_path: Path, kind: str) -> None:
    """Exact: the reference's values. In whole numbers: the same up to the 8 bits of the activations."""
    path = packed_file(tmp_path / "a.gguf", kind)
    wanted = logits(path, ReferenceBackend())
    np.testing.assert_allclose(logits(path, CpuBackend(2, exact=True))[0], wanted[0], rtol=1e-4, atol=1e-4)
    made = logits(path, CpuBackend(2))
    # Behind it the error grows: random weights damp nothing.
    assert relative(made[1], wanted[1]) < 0.01
    assert 0 < relative(made[0], wanted[0]) < 0.3


@native
def test_planned_bytes_are_those_of_the_blocks(tmp_path: Path) -> None:
    plan = plan_model(open_checkpoint(packed_file(tmp_path / "a.gguf", "Q4_0")))
    found = CpuBackend(1).plan(plan.program, "bfloat16", CAPACITY, plan.stored_types)
    assert found.weight_formats.keys() == {"q4_0", "q8_0", "vectors"}
    assert found.weight_bytes == sum(found.weight_formats.values())
    exact = CpuBackend(1, exact=True).plan(plan.program, "bfloat16", CAPACITY, plan.stored_types)
    assert found.weight_bytes < 0.5 * exact.weight_bytes


@native
def test_an_engine_rounds_a_float_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", "llama", hidden=64).path
    with caplog.at_level(logging.INFO, "truffula"):
        engine, info = build_engine(EngineConfig(model=str(path), backend="cpu", quantize="q8_0", memory_bytes=2**26))
    engine.close()
    assert info.quantize == "q8_0" and not info.exact
    assert set(info.weight_formats) == {"q8_0", "vectors"}
    assert "tensors rounded to Q8_0, relative RMS error" in caplog.text


def test_what_contradicts_itself_or_is_not_served() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        EngineConfig(model="m", quantize="q8_0", exact=True)
    with pytest.raises(ConfigError, match="quantize"):
        EngineConfig(model="m", quantize="q3_k")
    with pytest.raises(ConfigError, match="reference"):
        select_backend("reference", precision=Precision("q8_0"))
    assert {format.name for format in FORMATS.values() if format.scales} == set(KINDS) - {"Q5_1"}
