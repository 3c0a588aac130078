"""Every architecture on awkward configs: logits within 1e-4 of transformers in float32, and the same greedy tokens.

The files are written by us and read by both sides, so names, rope spellings and class defaults are compared as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity_cases_delta
import parity_cases_dense
import parity_cases_hybrids
import parity_cases_mla
import parity_cases_moe
import parity_cases_older
import parity_cases_state
import pytest
from kernel_backends import on_the_best

from truffula.kernels.backend import Backend
from truffula.model.load import ModelPlan, WeightReader, plan_model
from truffula.testing.oracle import Oracle
from truffula.testing.parity import NEAR_TIE
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie

LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
SLIDING, FULL = "sliding_attention", "full_attention"
BOTH = [FULL, SLIDING]
NESTED = {
    FULL: {"rope_type": "linear", "factor": 3.0, "rope_theta": 7e5},
    SLIDING: {"rope_type": "default", "rope_theta": 2e3},
}
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
WINDOW4 = {"sliding_window": 4, "use_sliding_window": True}
TIGHT_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
LINEAR8 = {
    "rope_theta": 1e5,
    "rope_local_base_freq": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
PROMPT, NEW = 23, 16

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "plain", {}),
    ("llama", "tied", {"tie_word_embeddings": True}),
    ("llama", "head_dim wider than hidden over heads", {"head_dim": 14}),
    ("llama", "head_dim null, kv heads null", {"head_dim": None, "num_key_value_heads": None}),
    ("llama", "one kv head, odd vocabulary", {"num_key_value_heads": 1, "vocab_size": 97}),
    ("llama", "biases everywhere", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "large eps, gelu", {"rms_norm_eps": 0.01, "hidden_act": "gelu"}),
    ("llama", "rope theta, old spelling", {"rope_theta": 500000.0}),
    ("llama", "rope linear, old spelling", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    ("llama", "rope llama3, old spelling", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    ("llama", "rope llama3, new spelling", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}}),
    ("llama", "rope yarn, old spelling", {"rope_scaling": {"type": "yarn", **YARN}}),
    ("llama", "rope yarn, mscale", {"rope_scaling": {"type": "yarn", **YARN, "mscale": 1.2, "mscale_all_dim": 0.7}}),
    ("llama", "rope yarn, its factor given", {"rope_scaling": {"type": "yarn", **YARN, "attention_factor": 1.3}}),
    ("llama", "rope yarn, not truncated", {"rope_parameters": {"rope_type": "yarn", **YARN, "truncate": False}}),
    ("llama", "rope yarn, betas", {"rope_parameters": {"rope_type": "yarn", **YARN, "beta_fast": 8, "beta_slow": 2}}),
    ("mistral", "window shorter than the prompt", {}),
    ("mistral", "window null, tied", {"sliding_window": None, "tie_word_embeddings": True}),
    ("mistral", "hidden not divisible by heads", {"hidden_size": 30, "head_dim": 8, "num_key_value_heads": 1}),
    ("mistral", "layer_types make it ministral", {"head_dim": 8, "layer_types": [SLIDING, FULL, SLIDING]}),
    ("ministral", "all layers slide", {}),
    ("ministral", "mixed layers, gqa", {"layer_types": [FULL, SLIDING, FULL]}),
    ("qwen2", "plain", {}),
    ("qwen2", "tied, odd vocabulary", {"tie_word_embeddings": True, "vocab_size": 131}),
    ("qwen2", "a window that is switched off", {"sliding_window": 5, "use_sliding_window": False}),
    ("qwen2", "window from layer 1 on", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2", "layer_types", {**WINDOW4, "layer_types": [SLIDING, FULL, SLIDING]}),
    ("qwen2", "own head_dim, hidden not divisible", {"hidden_size": 30, "head_dim": 6, "num_key_value_heads": 4}),
    ("qwen2", "rope yarn", {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}}),
    ("qwen3", "plain", {}),
    ("qwen3", "biases, tied", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3", "one kv head, hidden not divisible", {"hidden_size": 30, "num_key_value_heads": 1}),
    ("qwen3", "window from layer 2 on", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
    ("gemma2", "plain", {}),
    ("gemma2", "tight softcaps, one kv head", {**TIGHT_CAPS, "num_key_value_heads": 1}),
    ("gemma2", "no softcaps, untied", {**NO_CAPS, "tie_word_embeddings": False}),
    ("gemma2", "biases, odd vocabulary", {"attention_bias": True, "vocab_size": 113}),
    ("gemma2", "layer_types", {"layer_types": [FULL, SLIDING, SLIDING]}),
    ("gemma3_text", "plain", {}),
    ("gemma3_text", "logit softcap, untied", {"final_logit_softcapping": 1.5, "tie_word_embeddings": False}),
    ("gemma3_text", "a score cap without effect", {"attn_logit_softcapping": 0.5, "num_hidden_layers": 2}),
    ("gemma3_text", "pattern 2, scaled full layers", {"sliding_window_pattern": 2, "num_hidden_layers": 4, **LINEAR8}),
    ("gemma3_text", "nested ropes", {"layer_types": BOTH, "rope_parameters": NESTED, "num_hidden_layers": 2}),
    ("gemma3_text", "one kv head, biases", {"num_key_value_heads": 1, "attention_bias": True}),
]  # fmt: skip


def spread(cases: list[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    """Parameter sets of which only the first of each type runs in the fast suite."""
    made, seen = [], set()
    for case in cases:
        made.append(pytest.param(*case, id=f"{case[0]}: {case[1]}", marks=[pytest.mark.slow] * (case[0] in seen)))
        seen.add(case[0])
    return made


def write(folder: Path, model_type: str, overrides: dict[str, Any]) -> Path:
    return write_tiny_checkpoint(folder, tiny_config(model_type, **overrides), seed=3)


def compare(folder: Path, backend: Backend) -> ModelPlan:
    """Prefill at once and in chunks, then decode over pages of 4, against transformers on the same files."""
    checkpoint = open_checkpoint(folder)
    plan = plan_model(checkpoint)
    pull, capacity = WeightReader(checkpoint, plan), capacity_for(PROMPT + NEW, block_size=4)
    executable = backend.load(plan.program, "float32", pull, capacity)
    pull.finish()
    prompt = np.random.default_rng(1).integers(3, plan.spec.vocab_size, PROMPT).tolist()
    chosen, decoded = Driver(executable, capacity).greedy(prompt, NEW, chunk=5)
    oracle = Oracle(folder, tied=plan.tying.tie is not Tie.SEPARATE)
    theirs = oracle.logits([*prompt, *chosen[:-1]])
    np.testing.assert_allclose(Driver(executable, capacity).feed(prompt), theirs[:PROMPT], atol=1e-4)
    np.testing.assert_allclose(decoded, theirs[PROMPT - 1 :], atol=1e-4)
    for token, row in zip(chosen, theirs[PROMPT - 1 :], strict=True):
        assert token == row.argmax() or row.max() - row[token] < NEAR_TIE
    executable.close()
    return plan


@on_the_best
@pytest.mark.parametrize(
    ("model_type", "name", "overrides"),
    [
        *(pytest.param(*case, id=f"{case[0]}: {case[1]}") for case in CASES),
        *spread(parity_cases_dense.CASES),
        *spread(parity_cases_mla.CASES),
        *spread(parity_cases_older.CASES),
        *spread(parity_cases_moe.CASES),
        *spread(parity_cases_state.CASES),
        *spread(parity_cases_delta.CASES),
        *spread(parity_cases_hybrids.CASES),
    ],
)  # the slow ones: 20 s
def test_parity_with_transformers(
    tmp_path: Path, model_type: str, name: str, overrides: dict[str, Any], backend: Backend
) -> None:
    plan = compare(write(tmp_path / "model", model_type, overrides), backend)
    assert plan.warnings == (), name


@on_the_best
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_in_sixteen_bits_computed_in_float32(tmp_path: Path, dtype: str, backend: Backend) -> None:
    config = tiny_config("qwen2", tie_word_embeddings=True)
    assert compare(write_tiny_checkpoint(tmp_path, config, dtype=dtype), backend).stored_dtype == dtype


TINY_VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14, "model_type": "siglip_vision_model", "vision_use_head": False,
}  # fmt: skip


@on_the_best
@pytest.mark.parametrize("body", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_gemma3(tmp_path: Path, body: str, backend: Backend) -> None:
    config = tiny_config("gemma3", num_hidden_layers=3, sliding_window_pattern=2) | {"vision_config": TINY_VISION}
    config["mm_tokens_per_image"] = 4
    write_tiny_checkpoint(tmp_path / "old", config)
    old = open_checkpoint(tmp_path / "old")
    moved = {name.replace("language_model.model.", body): old.read(name) for name in old.tensors}
    vision = {"vision_tower.vision_model.embeddings.position_embedding.weight": np.zeros((4, 8), np.float32)}
    folder = write_tiny_checkpoint(tmp_path / "new", config, drop=tuple(old.tensors), extra=moved | vision)
    plan = compare(folder, backend)
    assert plan.unused == tuple(vision)
    assert any("only the text part" in text for text in plan.warnings)
    assert plan.program.sites[1].module == "model.language_model.layers.0.self_attn.q_proj"
