"""A normalizer that multiplies a text is refused before it gets one. The oracle is the library's own normalizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level_json, load, metaspace_json, sentence_piece_json, word_piece_json
from tokenizers import Tokenizer as Library

from truffula.errors import CheckpointError, is_rust_panic
from truffula.text.expansion import MAX_EXPANSION, check_expansion

WORDS = st.text("abcﷺ ", max_size=40)
RULES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(
        lambda old, new: {"type": "Replace", "pattern": {"String": old}, "content": new},
        st.sampled_from(["a", "b", "c", "ab", " "]),
        WORDS,
    ),
    st.builds(lambda new: {"type": "Replace", "pattern": {"Regex": "a*"}, "content": new}, st.text("ab", max_size=40)),
    st.builds(lambda new: {"type": "Prepend", "prepend": new}, st.text("ab", min_size=1, max_size=40)),
    st.sampled_from([{"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")]),
)
CHAINS = st.lists(RULES, max_size=4).map(lambda rules: {"type": "Sequence", "normalizers": rules})


def with_normalizer(normalizer: Any) -> bytes:
    return json.dumps(json.loads(byte_level_json()) | {"normalizer": normalizer}).encode()


@settings(max_examples=200, deadline=None)
@given(CHAINS, st.text("abc ﷺİ", min_size=1, max_size=20))
def test_no_accepted_normalizer_makes_a_text_longer_than_the_limit(chain: dict[str, Any], text: str) -> None:
    try:
        check_expansion(chain, None)
    except CheckpointError:
        return
    try:
        normalizer = Library.from_str(with_normalizer(chain).decode()).normalizer
        longer = normalizer.normalize_str(text)
    except BaseException as error:  # noqa: BLE001
        assert is_rust_panic(error)  # a regular expression that matches "", before NFC
        return
    assert len(longer) <= MAX_EXPANSION * (len(text) + 1)


@pytest.mark.parametrize(
    "rules",
    [
        [("a", "b" * 10_000), ("b", "c" * 10_000), ("c", "d" * 10_000)],
        [("a", "b" * 100), ("b", "a" * 100)],
        [("a", "b" * 1000)],
    ],
)
def test_a_normalizer_that_multiplies_is_an_error_of_the_model(rules: list[tuple[str, str]]) -> None:
    steps = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in rules]
    with pytest.raises(CheckpointError, match=r"normalizer could make a text .* as long") as caught:
        load(with_normalizer({"type": "Sequence", "normalizers": steps}))
    assert caught.value.param == "tokenizer.json"


@pytest.mark.parametrize("source", [byte_level_json, metaspace_json, sentence_piece_json, word_piece_json])
def test_the_usual_tokenizers_are_accepted(source: Any) -> None:
    assert load(source()).encode("The Lorax")
