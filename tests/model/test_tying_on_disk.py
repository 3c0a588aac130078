"""The tying tables, each row a checkpoint on disk: tokens as with tables set by hand, or a refusal by tensor and flag.

The reference is a transformers model without any tying whose two tables the test fills itself; in five of these rows
``from_pretrained`` would compute with a random one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from truffula.errors import CheckpointError, TyingError
from truffula.kernels.reference import ReferenceBackend
from truffula.model.load import ModelPlan, WeightReader, plan_model
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_config, tiny_tensors, write_tiny_checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie

Array = npt.NDArray[Any]
EMBED, HEAD, FLAG = "model.embed_tokens.weight", "lm_head.weight", "tie_word_embeddings"
PROMPT, NEW = [5, 17, 3, 99, 41, 8, 60], 8
MISSING = "missing"


def serve(folder: Path) -> tuple[ModelPlan, list[int], npt.NDArray[np.float32]]:
    checkpoint = open_checkpoint(folder)
    plan = plan_model(checkpoint)
    capacity = capacity_for(len(PROMPT) + NEW)
    executable = ReferenceBackend().load(plan.program, "float32", WeightReader(checkpoint, plan), capacity)
    tokens, logits = Driver(executable, capacity).greedy(PROMPT, NEW)
    return plan, tokens, logits


def by_hand(config: Mapping[str, Any], tensors: Mapping[str, Array], embed: Array, head: Array) -> list[int]:
    """Greedy tokens of an untied transformers model with these two tables and the body of ``tensors``."""
    settings = {key: value for key, value in config.items() if key not in ("model_type", FLAG)}
    model_config = AutoConfig.for_model(config["model_type"], **settings, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(model_config).eval()
    state = dict(tensors) | {EMBED: embed, HEAD: head}
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()})
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def tables(seed: int = 0, **overrides: Any) -> tuple[dict[str, Any], dict[str, Array], dict[str, Array]]:
    """A tiny llama: its config without the flag, its body, and the tables to choose from."""
    config = tiny_config("llama", num_hidden_layers=2, **overrides)
    tensors = tiny_tensors(config | {FLAG: False}, seed=seed)
    embed, head = tensors.pop(EMBED), tensors.pop(HEAD)
    choices = {"embed": embed, "equal": embed.copy(), "different": head, "wrong rows": head[:-1].copy()}
    return config, tensors, choices


ROWS = [
    # flag, embed there, head, then: what serves as (input table, head), the decision, and whether the author is warned
    (True, True, None, ("embed", "embed"), Tie.TIED, False),
    (True, True, "equal", ("embed", "embed"), Tie.TIED, False),
    (True, True, "different", ("embed", "different"), Tie.SEPARATE, True),
    (True, True, "wrong rows", "lm_head.weight.*tie_word_embeddings: true", None, False),
    (True, False, "different", ("different", "different"), Tie.REVERSED, False),
    (True, False, None, "Neither model.embed_tokens.weight nor lm_head.weight", None, False),
    (False, True, None, "lm_head.weight is not in the files.*tie_word_embeddings: false", None, False),
    (
        False,
        False,
        "different",
        "model.embed_tokens.weight is not in the files.*tie_word_embeddings: false",
        None,
        False,
    ),
    (False, True, "equal", ("embed", "equal"), Tie.SEPARATE, False),
    (False, True, "different", ("embed", "different"), Tie.SEPARATE, False),
    (MISSING, True, None, ("embed", "embed"), Tie.TIED, True),
    (MISSING, False, "different", ("different", "different"), Tie.REVERSED, True),
    (MISSING, True, "equal", ("embed", "embed"), Tie.TIED, False),
    (MISSING, True, "different", ("embed", "different"), Tie.SEPARATE, False),
    (None, True, None, ("embed", "embed"), Tie.TIED, True),
]


@pytest.mark.parametrize(("flag", "has_embed", "head", "outcome", "tie", "warned"), ROWS)
def test_each_row_of_the_table(
    tmp_path: Path, flag: Any, has_embed: bool, head: str | None, outcome: Any, tie: Tie | None, warned: bool
) -> None:
    config, body, choices = tables()
    written = config if flag == MISSING else config | {FLAG: flag}
    extra = body | ({EMBED: choices["embed"]} if has_embed else {}) | ({HEAD: choices[head]} if head else {})
    write_tiny_checkpoint(tmp_path, config, drop=tiny_tensors(config), extra=extra)
    write_config(tmp_path, written)
    if isinstance(outcome, str):
        with pytest.raises(TyingError, match=outcome):
            plan_model(open_checkpoint(tmp_path))
        return
    plan, tokens, _ = serve(tmp_path)
    assert plan.tying.tie is tie
    assert bool(plan.warnings) is warned
    assert tokens == by_hand(config, body, choices[outcome[0]], choices[outcome[1]])
    tables_held = [decl for decl in plan.program.weights if decl.shape == choices["embed"].shape]
    if tie is Tie.SEPARATE:
        assert [decl.uses for decl in tables_held] == [{"rows"}, {"matmul"}]
        assert plan.saved_bytes == 0
    else:
        assert [decl.uses for decl in tables_held] == [{"rows", "matmul"}]
        assert plan.saved_bytes == choices["embed"].nbytes
        assert plan.unused == ((HEAD,) if head == "equal" else ())


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_an_unwritten_flag_of_a_class_that_ties_warns_of_a_different_head(tmp_path: Path) -> None:
    config = tiny_config("gemma2", num_hidden_layers=2)
    head = tiny_tensors(config | {FLAG: False})[HEAD]
    plan, _, _ = serve(write_tiny_checkpoint(tmp_path, config, extra={HEAD: head}))
    assert plan.tying.tie is Tie.SEPARATE
    assert any(FLAG in text for text in plan.warnings)


def test_a_head_that_is_the_rounded_input_table_is_another_head(tmp_path: Path) -> None:
    config, body, choices = tables()
    rounded = choices["embed"].astype(ml_dtypes.bfloat16)
    extra = body | {EMBED: choices["embed"], HEAD: rounded}
    write_tiny_checkpoint(tmp_path, config | {FLAG: True}, drop=tiny_tensors(config), extra=extra)
    plan, tokens, _ = serve(tmp_path)
    assert plan.tying.tie is Tie.SEPARATE
    assert tokens == by_hand(config, body, choices["embed"], rounded.astype(np.float32))


def test_not_a_number_in_both_tables_is_named_not_compared(tmp_path: Path) -> None:
    config, body, choices = tables()
    choices["embed"][3, 5] = np.nan
    extra = body | {EMBED: choices["embed"], HEAD: choices["embed"].copy()}
    write_tiny_checkpoint(tmp_path, config | {FLAG: True}, drop=tiny_tensors(config), extra=extra)
    with pytest.raises(
        CheckpointError, match=r"model.embed_tokens.weight in .* holds 1 NaN or infinite values, .* at \(3, 5\)"
    ):
        serve(tmp_path)


@pytest.mark.parametrize("value", [1, 0, "true"])
def test_a_flag_that_is_no_boolean_is_refused(tmp_path: Path, value: Any) -> None:
    write_tiny_checkpoint(tmp_path, tiny_config("llama"))
    write_config(tmp_path, tiny_config("llama") | {FLAG: value})
    with pytest.raises(TyingError, match=FLAG):
        plan_model(open_checkpoint(tmp_path))


LEVELS = [True, False, MISSING]


@pytest.mark.parametrize("top", LEVELS)
@pytest.mark.parametrize("text", LEVELS)
@pytest.mark.parametrize("head", [None, "equal", "different"])
def test_nested_configs_all_nine_combinations(tmp_path: Path, top: Any, text: Any, head: str | None) -> None:
    inner = tiny_config("gemma3_text", num_hidden_layers=2)
    tensors = {name.removeprefix("model."): array for name, array in tiny_tensors(inner | {FLAG: False}).items()}
    different = tensors.pop(HEAD)
    chosen = {"equal": tensors["embed_tokens.weight"], "different": different}
    extra = {f"language_model.model.{name}": array for name, array in tensors.items()}
    extra |= {f"language_model.{HEAD}": chosen[head]} if head else {}
    config = {"model_type": "gemma3", "text_config": inner | ({} if text == MISSING else {FLAG: text})}
    config |= {} if top == MISSING else {FLAG: top}
    write_tiny_checkpoint(tmp_path, config, drop=tiny_tensors(config), extra=extra)
    contradiction = {top, text} == {True, False}
    written = {value for value in (top, text) if value != MISSING}
    effective = None if contradiction or not written else next(iter(written))
    if effective is False and head is None:
        with pytest.raises(TyingError, match=r"language_model.lm_head.weight.*tie_word_embeddings: false"):
            plan_model(open_checkpoint(tmp_path))
        return
    plan, tokens, _ = serve(tmp_path)
    assert any("contradicts itself" in warning for warning in plan.warnings) is contradiction
    separate = head == "different" or (head == "equal" and effective is False)
    assert (plan.tying.tie is Tie.SEPARATE) is separate
    body = {f"model.{name}": array for name, array in tensors.items()}
    embed = tensors["embed_tokens.weight"]
    assert tokens == by_hand(inner, body, embed, different if head == "different" else embed)


def test_no_architecture_decides_for_itself() -> None:
    """The fault this project began with: each model file chose its head from the flag alone."""
    import truffula.model.architectures as package

    files = sorted(Path(package.__file__).parent.glob("*.py"))
    assert len(files) > 4
    for file in files:
        # Whether the head has a bias (phimoe) or a multiplier (falcon_h1) says nothing about its matrix.
        text = file.read_text().replace('view.flag("lm_head_bias")', "").replace('"lm_head_multiplier"', "")
        for word in ("lm_head", "tie_word", "embed_out"):
            assert word not in text, f"{file.name} speaks of {word}; the head is weights/tying.py's affair"
