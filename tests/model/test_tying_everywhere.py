"""Tying over every architecture: the table of ``tying_table.py`` on checkpoints, against transformers' own loading.

For each type, flag and set of files: which tensors serve as input table and head, that the logits are those of
transformers with these tensors, and that where transformers would compute with random values truffula refuses or has
been told by the names in the files.
"""

from __future__ import annotations

import json
import logging
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from kernel_backends import SINGLE
from tying_table import (
    CELLS,
    FILES,
    NESTED,
    RANDOM_HEAD,
    RANDOM_TABLE,
    REFUSED,
    REVERSED,
    SEPARATE,
    TIED,
    Flag,
    TinyModel,
    theirs,
)

from truffula.errors import TyingError
from truffula.model.architectures import ARCHITECTURES
from truffula.model.load import ModelPlan, WeightReader, plan_model
from truffula.testing.programs import Driver, capacity_for
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import FLAG

PROMPT = [5, 17, 3, 90, 41, 8, 60]
READ_AS = {"kimi_k2": "deepseek_v3"}
"""Types of files without a class of their own in transformers."""


class Reference:
    """transformers' model of ``folder`` as ``from_pretrained`` loads it. ``answer`` says what it made of the tables."""

    def __init__(self, folder: Path, model: TinyModel) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        logging.getLogger("transformers").setLevel(logging.ERROR)
        written = json.loads((folder / "config.json").read_text())
        written["model_type"] = READ_AS.get(written["model_type"], written["model_type"])
        config: Any = AutoConfig.for_model(**written)
        causal = type(config) in AutoModelForCausalLM._model_mapping
        auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
        self.model = auto.from_pretrained(folder, config=config, dtype="float32", experts_implementation="eager").eval()
        self.embed, self.head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        one = self.embed.weight is self.head.weight
        self.answer = {
            ("no head", "no head"): TIED if one else SEPARATE,
            ("no head", "different head"): SEPARATE,
            ("different head", "different head"): REVERSED,
            ("no head", "random"): RANDOM_HEAD,
            ("random", "different head"): RANDOM_TABLE,
        }[self._source(self.embed, model), self._source(self.head, model)]

    def _source(self, module: Any, model: TinyModel) -> str:
        values = module.weight.detach().numpy()
        return next((name for name, table in model.tables.items() if np.array_equal(table, values)), "random")

    def fill(self) -> None:
        """Put the one table that is no random one on both sides."""
        module, other = (self.head, self.embed) if self.answer == RANDOM_HEAD else (self.embed, self.head)
        module.weight = other.weight

    def logits(self) -> Any:
        with torch.no_grad():
            return self.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()


def served(folder: Path) -> tuple[ModelPlan, Any]:
    checkpoint = open_checkpoint(folder)
    plan = plan_model(checkpoint)
    capacity = capacity_for(len(PROMPT))
    backend = list(SINGLE.values())[-1]
    executable = backend.load(plan.program, "float32", WeightReader(checkpoint, plan), capacity)
    logits = Driver(executable, capacity).feed(PROMPT)
    executable.close()
    return plan, logits


def check(folder: Path, model: TinyModel, files: str, flag: Flag, answer: str, there: str | None) -> list[str]:
    """truffula's warnings about a model whose flag is ``flag``; see the module. ``there`` None: whatever."""
    if there == REFUSED:
        with pytest.raises(StrictDataclassClassValidationError, match=FLAG):
            Reference(folder, model)
        plan = plan_model(open_checkpoint(folder))
        assert plan.tying.tie.value == answer
        return [text for text in plan.warnings if FLAG in text]
    reference = Reference(folder, model)
    assert there in (None, reference.answer), "transformers has changed its mind: mend tying_table.py"
    if answer == REFUSED:
        missing = model.head if files == "no head" else model.embed
        with pytest.raises(TyingError, match=f"{missing} is not in the files.*{FLAG}: false"):
            plan_model(open_checkpoint(folder))
        assert there is None or there in (RANDOM_HEAD, RANDOM_TABLE)
        return []
    plan, logits = served(folder)
    assert plan.tying.tie.value == answer
    assert (plan.saved_bytes > 0) == (answer != SEPARATE)
    if reference.answer in (RANDOM_HEAD, RANDOM_TABLE):
        reference.fill()
    np.testing.assert_allclose(logits, reference.logits(), atol=1e-4)
    return [text for text in plan.warnings if FLAG in text]


def check_cell(folder: Path, model_type: str, flag: Flag, files: str) -> None:
    model = TinyModel.of(model_type)
    cell = CELLS[flag, files]
    path = model.write(folder, files, flag)
    warnings = check(path, model, files, flag, cell.ours, theirs(model_type, flag, files, model.class_default))
    assert bool(warnings) == (model.class_default in cell.warns)


SPREAD: list[tuple[str, Flag, str]] = [
    ("phi", True, "no head"),  # the head has a bias
    ("gpt_neox", None, "head alone"),  # odd names
    ("cohere", None, "different head"),  # logits are scaled
    ("granitemoehybrid", False, "no head"),  # the input rows are scaled
    ("opt", None, "no head"),  # projections to and from the tables' width
    ("nemotron_h", True, "no head"),  # transformers ties nothing
]


@pytest.mark.parametrize(("model_type", "flag", "files"), SPREAD)
def test_a_spread_of_the_table(tmp_path: Path, model_type: str, flag: Flag, files: str) -> None:
    check_cell(tmp_path, model_type, flag, files)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_row_of_the_table(tmp_path: Path, model_type: str) -> None:
    """80 s for the 83 types."""
    for number, (flag, files) in enumerate(CELLS):
        check_cell(tmp_path / str(number), model_type, flag, files)


FLAGS: list[Flag] = [True, False, None]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", NESTED)
def test_two_levels_of_flags(tmp_path: Path, model_type: str) -> None:
    """Two written values that disagree count as none, one counts wherever it is."""
    model = TinyModel.of(model_type)
    for number, (flag, text, files) in enumerate(product(FLAGS, FLAGS[:2], FILES)):
        effective = text if flag in (None, text) else None
        path = model.write(tmp_path / str(number), files, flag, text)
        warnings = check(path, model, files, effective, CELLS[effective, files].ours, None)
        assert any("contradicts itself" in each for each in warnings) == (effective is None)
