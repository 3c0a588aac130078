"""The rule of tying, row by row, and that no input gives an answer the files don't support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.errors import TyingError
from truffula.testing.files import write_safetensors
from truffula.weights.folder import FolderCheckpoint
from truffula.weights.tying import FLAG, Tie, decide, equal_as_stored, read_flag

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
T, S, R, REFUSE = Tie.TIED, Tie.SEPARATE, Tie.REVERSED, None
NO, YES = False, True
# flag, embed, head, equal, same shape, class default -> answer, whether there is a warning
ROWS: list[tuple[bool | None, bool, bool, bool, bool, bool | None, Tie | None, bool]] = [
    (True, YES, NO, False, True, False, T, NO),
    (True, YES, YES, True, True, False, T, NO),
    (True, YES, YES, False, True, True, S, YES),
    (True, YES, YES, False, False, True, REFUSE, NO),
    (True, NO, YES, False, True, True, R, NO),
    (True, NO, NO, False, True, True, REFUSE, NO),
    (False, YES, NO, False, True, True, REFUSE, NO),
    (False, NO, YES, False, True, True, REFUSE, NO),
    (False, NO, NO, False, True, False, REFUSE, NO),
    (False, YES, YES, True, True, True, S, NO),
    (False, YES, YES, False, True, True, S, NO),
    (False, YES, YES, False, False, True, S, NO),
    (None, YES, NO, False, True, False, T, YES),
    (None, YES, NO, False, True, True, T, NO),
    (None, YES, NO, False, True, None, T, NO),
    (None, NO, YES, False, True, False, R, YES),
    (None, NO, YES, False, True, True, R, YES),
    (None, NO, NO, False, True, False, REFUSE, NO),
    (None, YES, YES, True, True, False, T, NO),
    (None, YES, YES, True, True, True, T, NO),
    (None, YES, YES, False, True, True, S, YES),
    (None, YES, YES, False, True, False, S, NO),
    (None, YES, YES, False, False, None, S, NO),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_each_row_of_the_table(row: tuple[Any, ...]) -> None:
    flag, has_embed, has_head, equal, same_shape, default, answer, warns = row

    def ask() -> Any:
        return decide(
            flag,
            has_embed=has_embed,
            has_head=has_head,
            equal=equal,
            same_shape=same_shape,
            class_default=default,
            embed_name=EMBED,
            head_name=HEAD,
        )

    if answer is REFUSE:
        with pytest.raises(TyingError, match=FLAG) as caught:
            ask()
        missing = HEAD if has_embed or has_head is has_embed else EMBED
        assert missing in caught.value.message
        assert caught.value.param in {EMBED, HEAD}
        return
    decision = ask()
    assert decision.tie is answer
    assert decision.reason.startswith(answer.value)
    assert HEAD in decision.reason and EMBED in decision.reason
    assert (decision.warning is not None) is warns
    if warns:
        assert FLAG in decision.warning


BOOLS = st.booleans()


@given(
    flag=st.none() | BOOLS,
    has_embed=BOOLS,
    has_head=BOOLS,
    equal=BOOLS,
    same_shape=BOOLS,
    default=st.none() | BOOLS,
)
@settings(max_examples=300, deadline=None)
def test_no_answer_without_its_tensors(
    flag: bool | None, has_embed: bool, has_head: bool, equal: bool, same_shape: bool, default: bool | None
) -> None:
    try:
        decision = decide(
            flag,
            has_embed=has_embed,
            has_head=has_head,
            equal=equal,
            same_shape=same_shape,
            class_default=default,
            embed_name=EMBED,
            head_name=HEAD,
        )
    except TyingError:
        complete = has_embed and has_head
        assert not complete or (flag is True and not same_shape)
        assert flag is not None or not (has_embed or has_head)
        return
    if decision.tie is Tie.TIED:
        assert has_embed and flag is not False and (not has_head or (equal and same_shape))
    elif decision.tie is Tie.REVERSED:
        assert has_head and not has_embed and flag is not False
    else:
        assert has_embed and has_head and (flag is False or not equal or not same_shape)


def text(value: Any) -> dict[str, Any]:
    return {"text_config": {} if value == "-" else {FLAG: value}}


# config -> value, how many warnings
FLAGS: list[tuple[dict[str, Any], bool | None, int]] = [
    ({}, None, 0),
    ({FLAG: True}, True, 0),
    ({FLAG: False}, False, 0),
    ({FLAG: None}, None, 1),
    (text("-"), None, 0),
    (text(True), True, 0),
    (text(False), False, 0),
    (text(None), None, 1),
    ({FLAG: True, **text("-")}, True, 0),
    ({FLAG: True, **text(True)}, True, 0),
    ({FLAG: True, **text(False)}, None, 1),
    ({FLAG: False, **text("-")}, False, 0),
    ({FLAG: False, **text(False)}, False, 0),
    ({FLAG: False, **text(True)}, None, 1),
    ({FLAG: None, **text(True)}, True, 1),
    ({FLAG: True, **text(None)}, True, 1),
    ({FLAG: None, **text(None)}, None, 2),
    ({FLAG: True, "text_config": None}, True, 0),
    ({FLAG: False, "llm_config": {FLAG: True}}, None, 1),
]


@pytest.mark.parametrize(("config", "value", "warnings"), FLAGS, ids=str)
def test_reading_the_flag(config: dict[str, Any], value: bool | None, warnings: int) -> None:
    found, said = read_flag(config)
    assert found is value
    assert len(said) == warnings
    assert all(FLAG in warning for warning in said)


@pytest.mark.parametrize("wrong", [1, 0, "true", "", [], {}, 1.0])
@pytest.mark.parametrize("nested", [False, True])
def test_a_flag_that_is_no_boolean_is_refused(wrong: Any, nested: bool) -> None:
    with pytest.raises(TyingError, match=FLAG) as caught:
        read_flag({"text_config": {FLAG: wrong}} if nested else {FLAG: wrong})
    assert repr(wrong) in caught.value.message


def compared(folder: Path, embed: np.ndarray, head: np.ndarray) -> bool:
    (folder / "config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {EMBED: embed, HEAD: head})
    return equal_as_stored(FolderCheckpoint(folder), EMBED, HEAD)


def test_equality_is_of_bits_as_stored(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((700, 500)).astype(np.float32)
    assert compared(tmp_path, table, table)
    for at in (0, 12345, table.size - 1):
        other = table.copy()
        other.reshape(-1)[at] = np.nextafter(other.reshape(-1)[at], np.float32(10))
        assert not compared(tmp_path, table, other), at
    assert not compared(tmp_path, table, table.astype(ml_dtypes.bfloat16).astype(np.float32)), "a rounded head"
    assert not compared(tmp_path, table, table.astype(ml_dtypes.bfloat16)), "another dtype"
    assert not compared(tmp_path, table, table.reshape(500, 700)), "another shape"
    assert not compared(tmp_path, table, table[:-1]), "fewer rows"
    assert compared(tmp_path, table[:0], table[:0])
