"""What ``inspect --quantize`` says is lost is what gguf's own rounding loses, and only of what is rounded."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from kernel_backends import needs_native

from truffula.errors import KernelError
from truffula.kernels.cpu.backend import CpuBackend
from truffula.kernels.cpu.weights import Rounding
from truffula.model.load import WeightReader, plan_model
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

pytestmark = needs_native


def rounding(folder: Path) -> Rounding:
    checkpoint = open_checkpoint(folder)
    plan, backend = plan_model(checkpoint), CpuBackend(1, quantize="q8_0")
    return backend.rounding(plan.program, WeightReader(checkpoint, plan, block_kinds=backend.block_kinds))


def relative(values: np.ndarray) -> float:
    back = quants.dequantize(quants.quantize(values, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    return float(np.sqrt(np.square(back - values, dtype=np.float64).sum() / np.square(values, dtype=np.float64).sum()))


def test_the_loss_of_each_tensor_is_ggufs(tmp_path: Path) -> None:
    config = tiny_config("llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    coarse = np.full((64, 96), 1e-3, np.float32)
    coarse[:, ::32] = 1.0  # one large number a block: the small ones are lost
    down = "model.layers.1.mlp.down_proj.weight"
    write_tiny_checkpoint(tmp_path, config, dtype="bfloat16", extra={down: coarse.astype(ml_dtypes.bfloat16)})
    found, checkpoint = rounding(tmp_path), open_checkpoint(tmp_path)
    matrices = {name for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    assert set(found.sums) == matrices - {"model.embed_tokens.weight"}  # the table is looked up in only
    for name in found.sums:
        assert found.error([name]) == pytest.approx(relative(checkpoint.read(name).astype(np.float32)), rel=1e-5)
    assert found.error([down]) > 1e-4
    ks = [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(3)]
    together = relative(np.concatenate([checkpoint.read(name).astype(np.float32) for name in ks]))
    assert found.error(ks) == pytest.approx(together, rel=1e-5)
    assert found.error([found.worst(ks)]) == max(found.error([name]) for name in ks)


def test_widths_that_are_no_whole_blocks_are_kept(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, tiny_config("llama"))  # 56 inputs of down are not blocks of 32
    assert not any("down_proj" in name for name in rounding(tmp_path).sums)


def test_a_scale_beyond_float16_names_the_weight(tmp_path: Path) -> None:
    large = np.full((32, 32), 3e38, np.float32)
    name = "model.layers.1.self_attn.o_proj.weight"
    write_tiny_checkpoint(tmp_path, tiny_config("llama"), extra={name: large})
    with pytest.raises(KernelError, match=r"layers\.1\.self_attn\.o_proj.*float16"):
        rounding(tmp_path)
