"""A GGUF vocabulary that is incomplete or contradicts itself: read as llama.cpp reads it, or refused by its key."""

from __future__ import annotations

import math
from typing import Any

import pytest
from gguf_writer import write_gguf
from test_gguf_end_tokens import ALPHABET, CONTROL, NORMAL, metadata
from tokenizers import Tokenizer

from truffula.weights.gguf.tokenizer import read_tokenizer
from truffula.weights.gguf.vocabulary import unread_keys
from truffula.weights.text_files import ModelTexts
from truffula.weights.texts import read_texts

MARKS = {"<|endoftext|>": CONTROL, "ab": NORMAL, "bc": NORMAL, "abc": NORMAL}
SIZE = len(MARKS) + len(ALPHABET)


def read(changed: dict[str, Any], drop: tuple[str, ...] = ()) -> ModelTexts:
    found = metadata(MARKS, eos_token_id=0, merges=["a b", "b c", "ab c"]) | {
        f"tokenizer.{key}": value for key, value in changed.items()
    }
    return read_tokenizer({key: value for key, value in found.items() if key.removeprefix("tokenizer.") not in drop})


def ids(found: ModelTexts, text: str) -> list[int]:
    encoded: list[int] = Tokenizer.from_str(found.tokenizer["tokenizer.json"].decode()).encode(text).ids
    return encoded


SPM = {"ggml.model": "llama", "ggml.merges": None}
RANKED = [-float(rank) for rank in range(SIZE)]


@pytest.mark.parametrize(
    ("changed", "drop", "words"),
    [
        ({}, ("ggml.merges",), "tokenizer.ggml.merges is missing"),
        ({"ggml.merges": [1, 2]}, (), "tokenizer.ggml.merges is not a list"),
        ({"ggml.merges": ["x y", "q r", "a b"]}, (), "another vocabulary"),
        ({"ggml.token_type": [1] * (SIZE - 1)}, (), f"tokenizer.ggml.token_type has {SIZE - 1} entries for {SIZE}"),
        ({"ggml.token_type": ["1"] * SIZE}, (), "tokenizer.ggml.token_type is not a list"),
        (SPM, (), "tokenizer.ggml.scores is missing"),
        (SPM | {"ggml.scores": [0.0]}, (), "tokenizer.ggml.scores has 1 entries"),
        (SPM | {"ggml.scores": [-1000.0] * SIZE}, (), "tokenizer.ggml.scores are all equal"),
        (SPM | {"ggml.scores": [math.nan] * SIZE}, (), "tokenizer.ggml.scores holds a NaN"),
        ({"ggml.tokens": ["a", "b", "a"]}, (), "tokenizer.ggml.tokens lists 'a' twice"),
        ({"ggml.tokens": []}, (), "tokenizer.ggml.tokens"),
        ({}, ("ggml.tokens",), "tokenizer.ggml.tokens"),
        ({}, ("ggml.model",), "tokenizer.ggml.model is None"),
        ({"ggml.model": "bert"}, (), "tokenizer.ggml.model is 'bert'"),
        ({"ggml.pre": "nobody-bpe"}, (), "tokenizer.ggml.pre is 'nobody-bpe'"),
        ({"ggml.pre": ["gpt-2"]}, (), "tokenizer.ggml.pre"),
        ({"ggml.add_bos_token": True}, (), "tokenizer.ggml.add_bos_token is true, but no tokenizer.ggml.bos_token_id"),
        ({"ggml.add_bos_token": 1}, (), "tokenizer.ggml.add_bos_token is 1"),
        ({"ggml.add_eos_token": True}, ("ggml.eos_token_id",), "no tokenizer.ggml.eos_token_id"),
        (SPM | {"ggml.scores": RANKED, "ggml.add_space_prefix": "no"}, (), "tokenizer.ggml.add_space_prefix"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_key(changed: dict[str, Any], drop: tuple[str, ...], words: str) -> None:
    found = read(changed, drop)
    assert found.tokenizer == {}
    assert words in found.no_tokenizer


def test_a_refused_tokenizer_still_says_where_completions_end() -> None:
    (end,) = read({"ggml.pre": "nobody-bpe"}).end_tokens
    assert (end.id, end.text) == (0, "<|endoftext|>")


def test_missing_types_are_all_normal_but_for_marks() -> None:
    found = read({}, ("ggml.token_type",))
    assert any("tokenizer.ggml.token_type is missing" in text for text in found.warnings)
    assert ids(found, "abc<|endoftext|>") == [3, 0]
    assert [token.id for token in found.end_tokens] == [0]


def test_lists_longer_than_the_vocabulary_are_cut() -> None:
    assert ids(read({"ggml.token_type": [3] + [1] * (SIZE + 5)}), "ab<|endoftext|>") == [1, 0]


def test_merges_of_what_the_vocabulary_lacks_are_left_out_and_counted() -> None:
    found = read({"ggml.merges": ["a b", "a c", "ab c", "nospace"]})
    assert ids(found, "abc") == [3]
    (warning,) = (text for text in found.warnings if "merges" in text)
    assert "2 of 4 entries of tokenizer.ggml.merges, the first 'a c'" in warning
    assert read({}).warnings == ()


def test_of_a_merge_that_is_written_twice_the_first_counts() -> None:
    assert ids(read({"ggml.merges": ["a b", "b c", "a b"]}), "abc") == ids(read({"ggml.merges": ["a b", "b c"]}), "abc")


@pytest.mark.parametrize(
    ("merges", "expected"),
    [
        (None, ["ab", "c"]),  # the better score
        (["b c"], ["a", "bc"]),
        (["b c", "x y"], ["ab", "c"]),  # of another vocabulary: llama.cpp reads the scores alone
    ],
)
def test_sentencepiece_merges_count_where_all_are_of_the_vocabulary(merges: Any, expected: list[str]) -> None:
    tokens = ["<|endoftext|>", "ab", "bc", "zz", *ALPHABET]
    found = read(
        {"ggml.model": "llama", "ggml.merges": merges, "ggml.tokens": tokens}
        | {"ggml.scores": [0.0, -1.0, -2.0, -3.0, *[0.0] * len(ALPHABET)], "ggml.token_type": [3] + [1] * (SIZE - 1)}
        | {"ggml.add_bos_token": False, "ggml.add_space_prefix": False}
    )
    assert ids(found, "abc") == [tokens.index(token) for token in expected]


def test_empty_tokens_are_named_by_their_place() -> None:
    tokens = ["<|endoftext|>", "", "", *ALPHABET]
    types = [3] + [1] * (len(tokens) - 1)
    found = read({"ggml.tokens": tokens, "ggml.token_type": types, "ggml.merges": []})
    library = Tokenizer.from_str(found.tokenizer["tokenizer.json"].decode())
    assert [library.id_to_token(1), library.id_to_token(2)] == ["[EMPTY_1]", "[EMPTY_2]"]


def test_keys_that_nothing_reads_are_reported() -> None:
    unread = {"ggml.suppress_tokens": [5], "ggml.new_switch": True}
    found = read(unread)
    assert found.tokenizer
    for key in unread:
        assert any(f"tokenizer.{key} (" in text and "not read" in text for text in found.warnings)
    known = {"ggml.padding_token_id": 0, "ggml.remove_extra_whitespaces": False, "chat_template": "x"}
    assert read(known).warnings == ()
    assert unread_keys({"tokenizer.chat_template.tool": "x", "llama.block_count": 3, "tokenizer.x": 1}) == [
        "tokenizer.x"
    ]


def test_marks_of_phi_3_take_the_blanks_after_them() -> None:
    marks = {"<|end|>": CONTROL, "<|endoftext|>": CONTROL}
    pairs = metadata(marks, eos_token_id=1)
    plain, phi = (read_tokenizer(pairs | {"general.name": name}) for name in ("tiny", "Phi-3 Mini"))
    space, a = (2 + ALPHABET.index(char) for char in ("Ġ", "a"))
    assert ids(plain, "<|end|> a<|endoftext|> a") == [0, space, a, 1, space, a]
    assert ids(phi, "<|end|> a<|endoftext|> a") == [0, a, 1, space, a]


def test_fewer_tokens_than_rows_are_reported(tmp_path: Any) -> None:
    import numpy as np

    for rows, warned in ((SIZE, False), (SIZE + 3, True), (SIZE - 3, False)):
        path = write_gguf(
            tmp_path / "x.gguf",
            metadata(MARKS, eos_token_id=0),
            {"token_embd.weight": np.zeros((rows, 8), np.float32)},
        )
        texts = read_texts(path)
        assert texts.no_tokenizer == ""
        assert any(f"lists {SIZE} tokens" in text for text in texts.warnings) is warned
