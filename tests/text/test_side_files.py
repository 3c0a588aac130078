"""Tokens that only the files beside tokenizer.json name, against transformers on the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import byte_level_json

from truffula.errors import CheckpointError
from truffula.text.tokenizer import Tokenizer, load_tokenizer

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
SIZE = 402  # tokens of tokenizer.json: <|begin|> 0, <|end|> 1, <|role|> 2 are special, "née token" 401 is not
TEXT = "a<|im_start|>user née token hello <|end|> <img> <tool>x</tool><pad>  <|im_end|> b<|role|>"
CASES: dict[str, dict[str, Any]] = {
    "added_tokens_decoder": {
        CONFIG: {
            "added_tokens_decoder": {
                "402": {"content": "<|im_start|>", "special": True, "normalized": False},
                "403": {"content": "<tool>", "special": False, "lstrip": True, "normalized": False},
            }
        }
    },
    "added_tokens_decoder changes a known token": {
        CONFIG: {"added_tokens_decoder": {"401": {"content": "née token", "special": True, "normalized": False}}}
    },
    "added_tokens_decoder hides the other files": {
        CONFIG: {"added_tokens_decoder": {"402": {"content": "<tool>", "special": False}}, "eos_token": "<|end|>"},
        MAP: {"eos_token": "<|role|>", "additional_special_tokens": ["<|im_start|>"]},
        ADDED: {"<|im_end|>": 402},
    },
    "additional_special_tokens": {CONFIG: {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|end|>"]}},
    "extra_special_tokens, a list": {CONFIG: {"extra_special_tokens": ["<|im_end|>"]}},
    "extra_special_tokens, an object": {CONFIG: {"extra_special_tokens": {"image_token": "<img>"}}},
    "a name of its own": {CONFIG: {"image_token": "<img>", "add_bos_token": False}},
    "the map": {MAP: {"pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>"]}},
    "the map with flags": {MAP: {"pad_token": {"content": "<pad>", "lstrip": True, "rstrip": True}}},
    "the map wins": {CONFIG: {"eos_token": "<|end|>"}, MAP: {"eos_token": "<|role|>"}},
    "added_tokens.json": {ADDED: {"<tool>": 402, "</tool>": 403}},
    "added_tokens.json, out of order": {ADDED: {"</tool>": 403, "<tool>": 402}},
    "added_tokens.json, some special": {
        ADDED: {"<tool>": 402, "<|im_end|>": 403, "<pad>": 404},
        CONFIG: {"eos_token": "<|im_end|>"},
        MAP: {"pad_token": "<pad>"},
    },
    "a named token that is plain in tokenizer.json": {CONFIG: {"pad_token": "née token"}},
    "a named token of the vocabulary": {CONFIG: {"pad_token": "hello"}},
}


def written(folder: Path, files: dict[str, Any]) -> Tokenizer:
    contents = {"tokenizer.json": byte_level_json()} | {name: json.dumps(v).encode() for name, v in files.items()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    tokenizer = load_tokenizer(contents)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens_as_in_transformers(case: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files = {CONFIG: {}, **CASES[case]}
    files[CONFIG] = {"tokenizer_class": "PreTrainedTokenizerFast", **files[CONFIG]}
    ours = written(tmp_path, files)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert ours.added_ids == set(theirs.added_tokens_decoder)
    special = {index for index, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_ids == special
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    for name in ("eos_token", "pad_token", "image_token"):
        assert ours.special_tokens.get(name) == getattr(theirs, name, None)
    if ours.eos_id is not None:
        assert [token.id for token in ours.end_tokens] == [theirs.eos_token_id]


def test_where_the_end_token_comes_from(tmp_path: Path) -> None:
    for files, source in (
        ({CONFIG: {"eos_token": "<|end|>"}}, "tokenizer_config.json eos_token"),
        ({CONFIG: {"eos_token": {"content": "<|end|>"}}}, "tokenizer_config.json eos_token"),
        ({CONFIG: {"eos_token": "<|role|>"}, MAP: {"eos_token": "<|end|>"}}, "special_tokens_map.json eos_token"),
    ):
        (end,) = written(tmp_path, files).end_tokens
        assert (end.id, end.text, end.source) == (1, "<|end|>", source)
    for none in ({}, {CONFIG: {"eos_token": None}}, {CONFIG: {"eos_token": ""}}, {CONFIG: {"bos_token": "<|end|>"}}):
        assert written(tmp_path, none).end_tokens == ()


def test_an_id_that_the_token_does_not_get_is_reported(tmp_path: Path) -> None:
    for name, files in (
        (ADDED, {ADDED: {"<tool>": 500}}),
        (CONFIG, {CONFIG: {"added_tokens_decoder": {"500": {"content": "<tool>"}}}}),
    ):
        (warning,) = written(tmp_path, files).warnings
        assert name in warning and "'<tool>' the id 500" in warning and "the id 402" in warning
    assert written(tmp_path, {ADDED: {"<tool>": SIZE}}).warnings == ()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({CONFIG: {"eos_token": ["<|end|>", "<|role|>"]}}, "eos_token is .*generation_config"),
        ({CONFIG: {"pad_token": 7}}, "pad_token is '7'"),
        ({MAP: {"eos_token": {"content": 3}}}, "eos_token"),
        ({CONFIG: {"additional_special_tokens": "<x>"}}, "additional_special_tokens"),
        ({CONFIG: {"additional_special_tokens": [7]}}, "additional_special_tokens"),
        ({CONFIG: {"added_tokens_decoder": {"x": {"content": "<a>"}}}}, "added_tokens_decoder"),
        ({CONFIG: {"added_tokens_decoder": {"7": "<a>"}}}, "added_tokens_decoder"),
        ({CONFIG: {"added_tokens_decoder": ["<a>"]}}, "added_tokens_decoder"),
        ({ADDED: {"<a>": "7"}}, "<a>"),
    ],
)
def test_what_is_no_token_is_refused_by_file_and_key(files: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        written(tmp_path, files)
    assert caught.value.param == next(iter(files))
