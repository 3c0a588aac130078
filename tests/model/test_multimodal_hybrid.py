"""Qwen3.5 as it is published: a multimodal checkpoint, whose text part is served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from kernel_backends import on_the_best
from test_architecture_parity import compare

from truffula.kernels.backend import Backend
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

# As in the published files; the first two are not read by transformers.
PUBLISHED = {
    "attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "full_attention_interval": 4,
    "mtp_use_dedicated_embeddings": False,
}  # fmt: skip
VISION = {"model_type": "qwen3_5", "depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8}


@on_the_best
def test_the_text_part_of_a_multimodal_checkpoint(tmp_path: Path, backend: Backend) -> None:
    config = tiny_config("qwen3_5", tie_word_embeddings=True, **PUBLISHED)
    config |= {"vision_config": VISION, "image_token_id": 98, "vision_start_token_id": 97}
    write_tiny_checkpoint(tmp_path / "text", config)
    text = open_checkpoint(tmp_path / "text")
    moved = {name.replace("model.", "model.language_model."): text.read(name) for name in text.tensors}
    others = {
        "model.visual.patch_embed.proj.bias": np.zeros(8, np.float32),
        "mtp.layers.0.input_layernorm.weight": np.zeros(32, np.float32),
        "mtp.fc.weight": np.zeros((32, 64), np.float32),
    }
    folder = write_tiny_checkpoint(tmp_path / "model", config, drop=tuple(text.tensors), extra=moved | others)
    plan = compare(folder, backend)
    assert sorted(plan.unused) == sorted(others)
    assert len(plan.warnings) == 1 and "only the text part is served" in plan.warnings[0]
    assert plan.program.sites[1].module == "model.layers.0.linear_attn.in_proj_qkv"
