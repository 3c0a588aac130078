"""verify compares a GGUF model with transformers also where transformers' loader drops what the metadata says."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_dense_cases import CASES
from gguf_expert_cases import CASES as EXPERTS
from gguf_models import FAMILIES, write_tiny_gguf
from gguf_pairs import Case, write_pair
from gguf_writer import write_gguf

from truffula.errors import UnsupportedModel
from truffula.model.load import plan_model
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.parity import VerifyReport, verify_model
from truffula.weights.open import open_checkpoint

PROMPT = [[7, 31, 12, 55, 40, 9, 23, 18, 50, 4, 36, 27]]  # longer than the sliding windows
LINEAR = {"rope__scaling__factor": 4.0}
YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 128}


def verify(path: Path) -> VerifyReport:
    return verify_model(path, prompts=PROMPT, new_tokens=4)


@pytest.mark.parametrize(
    ("architecture", "keys", "named"),
    [
        *((name, {}, None) for name in FAMILIES),
        ("llama", LINEAR, "rope_parameters"),
        ("gemma3", LINEAR, "rope_parameters"),
        ("qwen2", YARN, "rope_parameters"),
        *(
            pytest.param(name, LINEAR, "rope_parameters", marks=pytest.mark.slow)
            for name in FAMILIES
            if name not in ("llama", "gemma3")
        ),
        *(pytest.param(name, YARN, "rope_parameters", marks=pytest.mark.slow) for name in ("llama", "qwen3")),
        ("gemma3", {"attention__sliding_window_pattern": 3}, "layer_types"),
        ("gemma3", {"rope__freq_base_swa": 777.0}, "rope_parameters"),
        ("gemma2", {"final_logit_softcapping": 5.0}, "final_logit_softcapping"),
    ],
)
def test_what_transformers_drops_of_the_metadata_is_compared_too(
    tmp_path: Path, architecture: str, keys: dict[str, Any], named: str | None
) -> None:
    report = verify(write_tiny_gguf(tmp_path / "m.gguf", architecture, **keys).path)
    assert report.ok, report.first_divergence
    told = [text for text in report.warnings if "transformers' GGUF loader does not read" in text]
    if named:
        assert len(told) == 1 and named in told[0]
    elif architecture == "llama":  # of the others it takes defaults that tiny models do not have
        assert not told


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if number in (2, 22) else [pytest.mark.slow], id=case.name)
        for number, case in enumerate(CASES)
        if case.architecture != "muse-glimmer"  # transformers does not build its text part alone
    ],
)
def test_families_that_transformers_does_not_read_from_files(tmp_path: Path, case: Case) -> None:
    """transformers computes them with the values that truffula reads."""
    report = verify(write_pair(tmp_path, case)[1])
    assert report.ok, report.first_divergence


# Of these transformers has the matrices of experts in other forms, or an indexer in layers without one here.
OTHERWISE = {"Mistral Large 3", "Mistral 4", "DeepSeek V3.2", "GLM-5", "Llama 4", "Granite 3 (shared)", "DBRX"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "Laguna XS" else [pytest.mark.slow]) for name in EXPERTS]
)
def test_experts_that_a_file_stacks(tmp_path: Path, name: str) -> None:
    file = write_pair(tmp_path, EXPERTS[name])[1]
    if name in OTHERWISE:
        with pytest.raises(UnsupportedModel, match="in another form than a GGUF file"):
            verify(file)
    else:
        report = verify(file)
        assert report.ok, report.first_divergence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("gemma4", ["q_proj", "gate_proj", "per_layer_projection"]),
        ("gptneox", ["query_key_value", "dense_h_to_4h"]),
        ("gpt2", ["c_attn", "c_fc"]),
        ("stablelm", ["q_proj", "down_proj"]),
        ("falcon", ["query_key_value", "dense"]),
    ],
)
def test_adapters_have_the_names_of_transformers(tmp_path: Path, architecture: str, targets: list[str]) -> None:
    """On blocks, too, whose rows are put in order."""
    case = next(case for case in CASES if case.architecture == architecture)
    _, file = write_pair(tmp_path, case, blocks=True)
    with closing(open_checkpoint(file)) as checkpoint:
        sites = plan_model(checkpoint).program.sites
    adapter = write_tiny_adapter(tmp_path / "adapter", sites, targets=targets, alpha=16)
    report = verify_model(file, adapter=adapter, prompts=PROMPT, new_tokens=4)
    assert report.ok, report.first_divergence


def test_a_table_of_rope_factors_is_compared_too(tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", rope__freq_base=500000.0, width=64)
    turns = 500000.0 ** (-np.arange(32) / 32) / (2 * np.pi)
    smooth = np.clip((8192 * turns - 1) / 3, 0, 1)
    stored = {**tiny.stored, "rope_freqs.weight": (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)}
    report = verify(write_gguf(tmp_path / "m.gguf", tiny.metadata, stored))
    assert report.ok, report.first_divergence
    assert "rope_parameters" in report.warnings[-1]


def test_an_architecture_that_transformers_takes_for_another_is_refused(tmp_path: Path) -> None:
    """llama.cpp's converter writes Mistral with its sliding window as llama; transformers drops the window."""
    with pytest.raises(
        UnsupportedModel, match="is a mistral model by its metadata, and transformers loads it as llama"
    ):
        verify(write_tiny_gguf(tmp_path / "m.gguf", "llama", attention__sliding_window=64).path)


def test_the_text_part_of_a_multimodal_model_is_refused(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.architecture == "muse-glimmer")
    with pytest.raises(UnsupportedModel, match="text part of a muse_glimmer model"):
        verify(write_pair(tmp_path, case)[1])
