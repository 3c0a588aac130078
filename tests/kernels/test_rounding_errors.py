"""What ``inspect --quantize`` says is lost is what gguf's own rounding loses, by kind of site, and only of what is
rounded."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from truffula.errors import KernelError
from truffula.kernels.cpu.formats import BLOCK_KINDS
from truffula.kernels.cpu.rounding import Rounding, q8_0_loss, rounding_errors
from truffula.model.load import plan_model, puller
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint


def rounding(folder: Path) -> Rounding:
    checkpoint = open_checkpoint(folder)
    plan = plan_model(checkpoint)
    pull = puller(checkpoint, plan, block_kinds=frozenset(BLOCK_KINDS))
    return rounding_errors(plan.program, pull, plan.stored_types)


def relative(values: np.ndarray) -> float:
    back = quants.dequantize(quants.quantize(values, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    return float(np.sqrt(np.square(back - values, dtype=np.float64).sum() / np.square(values, dtype=np.float64).sum()))


def test_the_loss_is_ggufs() -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((33, 96)) * np.exp(2 * rng.standard_normal((33, 1)))).astype(np.float32)
    values[0], values[1, 5:] = 0, 1e-9
    squares, lost = q8_0_loss(values, "w")
    assert np.sqrt(lost / squares) == pytest.approx(relative(values), rel=1e-6)


def test_numbers_too_small_for_a_scale_are_lost_whole() -> None:
    squares, lost = q8_0_loss(np.full((1, 32), 1e-38, np.float32), "w")  # 1 / its scale is infinite
    assert lost == squares > 0


def test_sites_are_told_apart_and_the_worst_is_named(tmp_path: Path) -> None:
    config = tiny_config("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    coarse = np.full((64, 96), 1e-3, np.float32)
    coarse[:, ::32] = 1.0  # one large number a block: the small ones are lost
    down = "model.layers.1.mlp.down_proj.weight"
    write_tiny_checkpoint(tmp_path, config, dtype="bfloat16", extra={down: coarse.astype(ml_dtypes.bfloat16)})
    found, checkpoint = rounding(tmp_path), open_checkpoint(tmp_path)
    assert {name: kind.tensors for name, kind in found.kinds.items()} == {
        "q": 3, "k": 3, "v": 3, "o": 3, "gate": 3, "up": 3, "down": 3, "head": 1,
    }  # fmt: skip
    assert found.kept == 1  # the table, which is looked up in only
    assert found.kinds["down"].worst == found.all.worst or found.all.worst_error > found.kinds["down"].worst_error
    ks = [checkpoint.read(f"model.layers.{i}.self_attn.k_proj.weight").astype(np.float32) for i in range(3)]
    assert found.kinds["k"].error == pytest.approx(relative(np.concatenate(ks)), rel=1e-6)
    assert found.kinds["k"].worst_error == pytest.approx(max(map(relative, ks)), rel=1e-6)
    assert found.kinds["down"].worst_error >= relative(checkpoint.read(down).astype(np.float32)) * (1 - 1e-6)


def test_widths_that_are_no_whole_blocks_are_kept(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, tiny_config("llama"))  # 56 inputs of down are not blocks of 32
    found = rounding(tmp_path)
    assert "down" not in found.kinds and found.kept >= 3


def test_a_scale_beyond_float16_names_the_tensor() -> None:
    with pytest.raises(KernelError, match=r"some\.weight"):
        q8_0_loss(np.full((1, 32), 3e38, np.float32), "some.weight")
