"""Rotary tables that depend on a sequence's length: each request has its own, as ``generate`` has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from truffula import LLM, SamplingParams
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint

BORDER, NEW = 16, 14
LONGROPE = {
    "original_max_position_embeddings": BORDER,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 4.0, 7.0, 9.0]},
}
DYNAMIC = {"max_position_embeddings": BORDER, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
CONFIGS: dict[str, dict[str, Any]] = {
    "longrope": tiny_config("phi3", sliding_window=None, **LONGROPE),
    "longrope, window": tiny_config("phi3", sliding_window=5, **LONGROPE),
    "dynamic": tiny_config("llama", **DYNAMIC),
}
IDS = np.random.default_rng(7).integers(3, 101, 40).tolist()
# Prefixes of one text: below the border, across it while they are answered, one step before it, on it and beyond it.
PROMPTS = [IDS[:n] for n in (2, 9, 15, 16, 17, 30, 33)]


def generate(folder: Path, prompt: list[int]) -> list[int]:
    # Loaded anew: a dynamic table keeps the longest length that a model object has seen.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "name", ["longrope", *(pytest.param(name, marks=pytest.mark.slow) for name in ("longrope, window", "dynamic"))]
)  # the slow ones: 6 s
def test_each_request_is_answered_as_alone(tmp_path: Path, name: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model", CONFIGS[name], seed=2)
    expected = [generate(folder, prompt) for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    options = {"memory_bytes": 2**27, "dtype": "float32", "block_size": 4, "step_tokens": 9, "threads": 1}
    with LLM(folder, **options) as llm:
        together = [out.token_ids for out in llm.generate(PROMPTS, params)]
        again = [llm.generate(prompt, params)[0].token_ids for prompt in PROMPTS]  # with prefix hits
        cached = llm.stats().prefix_hit_tokens
    assert together == expected
    assert again == expected
    assert cached > 0
