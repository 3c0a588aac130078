"""Published models from their config alone: ``inspect`` says what their cards say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fallback_types import small_config
from published import PUBLISHED, Published

from truffula.errors import UnsupportedModel
from truffula.model.config_alone import ConfigAlone
from truffula.model.facts import parameter_counts
from truffula.model.load import plan_model
from truffula.weights.tying import Tie

FAST = ("Qwen2.5-3B-Instruct", "Llama-3.2-1B", "gpt-oss-20b", "Qwen3.5-4B", "Gemma-4-E4B", "Kimi-K3")


def write(folder: Path, model: Published) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({"dtype": "bfloat16", **model.config}))
    return file


def agrees(found: int, card: str) -> bool:
    """Whether a number of parameters is the card's, which rounds or cuts its last digit."""
    digits = len(card.partition(".")[2])
    unit = 10.0**-digits if "." in card else 10.0 ** (len(card) - len(card.rstrip("0")))
    return abs(found / 1e9 - float(card)) <= unit


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in PUBLISHED]
)  # the slow ones: 10 s
def test_facts_are_those_of_the_card(tmp_path: Path, name: str) -> None:
    model = PUBLISHED[name]
    if model.refused:
        with pytest.raises(UnsupportedModel, match=model.refused):
            ConfigAlone(write(tmp_path, model))
        return
    plan: Any = plan_model(ConfigAlone(write(tmp_path, model)))
    tied = plan.tying.tie is not Tie.SEPARATE
    total, active = parameter_counts(plan.spec, tied=tied)
    table = plan.spec.vocab_size * plan.spec.hidden
    assert agrees(total, model.parameters), total
    # Some cards count the input table, of which a token reads a row.
    assert not model.active or agrees(active, model.active) or agrees(active + table, model.active), active
    assert plan.implementation.kind == "native" and tied is model.tied and plan.max_model_len == model.context
    sizes = {group.window: 2 * sum(plane.width for plane in group.planes) for group in plan.interface.kv_groups}
    assert sizes.pop(None) == model.kv
    assert sum(window * size for window, size in sizes.items()) == model.windows


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["granite_swa", "jetmoe", "mamba", "minimax", "persimmon"])
def test_a_model_of_transformers_from_its_config_alone(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    config = small_config(model_type)
    config.save_pretrained(tmp_path)
    plan = plan_model(ConfigAlone(tmp_path / "config.json"))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    buffers = {name for name, _ in theirs.named_buffers()}
    found = sum(math.prod(decl.shape) for decl in plan.program.weights if decl.name not in buffers)
    assert found == theirs.num_parameters()
    assert plan.implementation.kind in ("fallback", "serial")
