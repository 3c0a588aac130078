"""Loading a model's tokenizer from its files."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_tokenizers import (
    byte_level,
    byte_level_json,
    load,
    metaspace,
    sentence_piece,
    sentence_piece_json,
    word_piece,
)
from tokenizers import Tokenizer as Library
from tokenizers import decoders

from truffula.errors import CheckpointError, InvalidRequest
from truffula.text.detokenizer import byte_alphabet, is_utf8
from truffula.text.tokenizer import Tokenizer, check_text, load_tokenizer
from truffula.weights.gguf.tokenizer import read_tokenizer

NESTED = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
"""The library panics on it."""


def with_rule(name: str, rule: dict[str, Any]) -> bytes:
    return json.dumps(json.loads(byte_level_json()) | {name: rule}).encode()


def test_a_folder_without_a_tokenizer_has_none() -> None:
    assert load_tokenizer({"tokenizer_config.json": b"{}"}) is None


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer.json": b"not json"}, "tokenizer.json"),
        ({"tokenizer.json": byte_level_json(), "tokenizer_config.json": b"[1]"}, "tokenizer_config.json"),
        ({"tokenizer.json": byte_level_json(), "special_tokens_map.json": b"{"}, "special_tokens_map.json"),
        ({"tokenizer.json": byte_level_json(), "tokenizer_config.json": NESTED}, "tokenizer_config.json"),
        ({"tokenizer.json": byte_level_json(), "chat_template.json": NESTED}, "chat_template.json"),
        ({"tokenizer.json": NESTED}, "tokenizer.json"),
        ({"tokenizer.json": with_rule("normalizer", PRECOMPILED)}, "tokenizer.json"),
        ({"tokenizer.json": byte_level_json(), "chat_template.jinja": b"\xff\xfe"}, "chat_template.jinja"),
    ],
)
def test_a_broken_file_is_named(files: dict[str, bytes], named: str) -> None:
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")) as caught:
        load_tokenizer(files)
    assert caught.value.param == named


def test_bos_is_added_as_tokenizer_json_says() -> None:
    tokenizer = sentence_piece()
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("the", add_special_tokens=True)[0] == 1
    assert tokenizer.encode("the", add_special_tokens=False)[0] != 1


@pytest.mark.parametrize("add", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("surrounds", [True, False])
def test_tokenizer_json_alone_decides_about_bos_as_in_transformers(add: dict, surrounds: bool, tmp_path) -> None:
    from transformers import PreTrainedTokenizerFast

    content = json.loads(sentence_piece_json())
    if not surrounds:
        content["post_processor"] = None
    config = {"bos_token": "<s>", "eos_token": "</s>", **add}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = load(json.dumps(content).encode(), **config)
    assert ours.encode("the Lorax") == theirs.encode("the Lorax")
    assert (ours.encode("the Lorax")[0] == ours.bos_id) == surrounds


def test_truncation_and_padding_stored_in_the_file_are_off() -> None:
    library = Library.from_buffer(byte_level_json())
    library.enable_truncation(4)
    library.enable_padding(length=8)
    tokenizer = load(library.to_str().encode())
    text = "hello hello world " * 10
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("h")) == 1


def test_named_tokens_are_special_and_written_in_any_form() -> None:
    tokenizer = load_tokenizer(
        {
            "tokenizer.json": byte_level_json(),
            "special_tokens_map.json": json.dumps(
                {"eos_token": "<|end|>", "pad_token": {"content": "<|pad|>"}}
            ).encode(),
            "tokenizer_config.json": json.dumps({"eos_token": {"content": "<|role|>"}, "bos_token": None}).encode(),
        }
    )
    assert tokenizer is not None
    assert tokenizer.special_tokens == {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    assert tokenizer.bos_id is None
    # A named token that tokenizer.json lacks is added behind the others, as transformers does.
    assert tokenizer.id_to_token(tokenizer.vocab_size - 1) == "<|pad|>"
    assert {0, 1, 2, tokenizer.vocab_size - 1} == tokenizer.special_ids


def test_offsets_are_characters_and_added_tokens_lie_nowhere() -> None:
    text = "the 東京 🌲 or"
    encoded = sentence_piece().encode_with_offsets(text)
    assert encoded.ids == sentence_piece().encode(text)
    assert encoded.added == [True] + [False] * (len(encoded.ids) - 1)
    assert encoded.offsets[0] == (0, 0)
    assert max(stop for _, stop in encoded.offsets) == len(text)
    covered = {at for start, stop in encoded.offsets for at in range(start, stop)}
    assert covered == set(range(len(text)))


def test_text_of_one_token_keeps_its_space() -> None:
    tokenizer = sentence_piece()
    the = next(i for i in range(tokenizer.vocab_size) if tokenizer.id_to_token(i) == "▁the")
    assert tokenizer.text_of(the) == " the"
    assert tokenizer.text_of(3 + 0xE2) == "\ufffd"
    assert tokenizer.text_of(10**6) == ""


def gguf_tokenizer(model: str) -> Tokenizer:
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    if model == "gpt2":
        tokens = ["<s>", "</s>", *sorted(byte_alphabet())]
    metadata = {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *([1 if model == "gpt2" else 6] * 256), *([1] * (len(tokens) - 258))],
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.merges": ["\u2581 a"] if model == "llama" else [],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    made = load_tokenizer(read_tokenizer(metadata).tokenizer)
    assert made is not None
    return made


KINDS = {
    "byte level": byte_level,
    "SentencePiece": lambda: sentence_piece(False),
    "GGUF byte level": lambda: gguf_tokenizer("gpt2"),
    "GGUF SentencePiece": lambda: gguf_tokenizer("llama"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_join_to_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for text in (" a 🙂 a", "née", "東京\n", "a\u0301"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(tokenizer.bytes_of(i) or b"" for i in ids) == text.encode()
    parts = [tokenizer.bytes_of(i) for i in tokenizer.encode("🙂", add_special_tokens=False)]
    assert len(parts) > 2 and b"".join(part or b"" for part in parts) == "🙂".encode()
    assert tokenizer.bytes_of(10**6) == b"", "an id without a token adds nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_holds_the_bytes_of_every_token(kind: str) -> None:
    tokenizer = KINDS[kind]()
    vocabulary = tokenizer.vocabulary([2, 1, 2])
    assert (vocabulary.end_ids, vocabulary.special_ids) == ([1, 2], sorted(tokenizer.special_ids))
    assert vocabulary.tokens == [tokenizer.bytes_of(i) for i in range(tokenizer.vocab_size)]
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids]
    whole = [i for i in plain if is_utf8(vocabulary.tokens[i])]
    assert len(whole) > 100
    for token_id in whole:
        # Behind another token, where a decoder strips nothing.
        text = tokenizer.decode([whole[0], token_id])
        assert text.encode() == vocabulary.tokens[whole[0]] + vocabulary.tokens[token_id]
        assert tokenizer._decode([whole[0], token_id]) == text
    for text in ("a 🙂 née", "東京\n"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(vocabulary.tokens[i] for i in ids) == text.encode()


def test_ids_without_a_token_are_empty_in_a_vocabulary() -> None:
    source = json.loads(byte_level_json())
    last = len(source["model"]["vocab"]) + 9
    source["added_tokens"].append(source["added_tokens"][0] | {"id": last, "content": "<far>", "special": False})
    vocabulary = load(json.dumps(source).encode()).vocabulary([])
    far = vocabulary.tokens.index(b"<far>")
    assert far not in vocabulary.special_ids and len(vocabulary.tokens) == far + 1


@pytest.mark.parametrize("tokenizer", [word_piece, metaspace])
def test_a_tokenizer_whose_tokens_have_no_bytes_has_no_vocabulary(tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="Structured output is not possible with this model"):
        tokenizer().vocabulary([1])


def test_the_bytes_of_special_tokens_are_their_text() -> None:
    assert byte_level().bytes_of(1) == b"<|end|>"
    assert sentence_piece().bytes_of(2) == b"</s>"


def test_a_decoder_of_another_kind_tells_bytes_or_says_that_it_does_not() -> None:
    fallback = Library.from_str(sentence_piece_json(False).decode())
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = load(fallback.to_str().encode())
    assert [tokenizer.bytes_of(3 + byte) for byte in (0xF0, 0x41)] == [b"\xf0", b"A"]
    assert tokenizer.bytes_added(3 + 0x82, "🙂") == b"\x82"
    levels = Library.from_str(byte_level_json().decode())
    levels.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    tokenizer = load(levels.to_str().encode())
    part = tokenizer.encode("🙂", add_special_tokens=False)[0]
    assert (tokenizer.bytes_of(part), tokenizer.bytes_added(part, "")) == (None, None)
    (whole,) = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.bytes_of(whole) == b"a"


def test_a_space_that_the_decoder_strips_is_not_among_the_bytes_added() -> None:
    tokenizer = sentence_piece(True)
    (token,) = tokenizer.encode("the", add_special_tokens=False)
    assert (tokenizer.bytes_of(token), tokenizer.bytes_added(token, "the")) == (b" the", b"the")


def test_lone_surrogates_are_refused_by_position() -> None:
    check_text("fine 🌲", "prompt")
    with pytest.raises(InvalidRequest, match=r"U\+D83C\) at character 2") as caught:
        check_text("ab\ud83c!", "prompt")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(("given", "expected"), [({"fields": {}}, {"fields": {}}), (5, {}), (None, {})])
def test_the_response_template_is_that_of_the_config(given: object, expected: dict[str, object]) -> None:
    config = json.dumps({"response_template": given}).encode()
    tokenizer = load_tokenizer({"tokenizer.json": byte_level_json(), "tokenizer_config.json": config})
    assert tokenizer is not None
    assert tokenizer.response_template == expected


def test_the_jinja_file_wins_over_the_config() -> None:
    files = {
        "tokenizer.json": byte_level_json(),
        "tokenizer_config.json": json.dumps({"chat_template": "from the config"}).encode(),
    }
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}, {"name": 3}]
    listed = files | {"tokenizer_config.json": json.dumps({"chat_template": named}).encode()}
    for given, expected in [
        (files, {"default": "from the config"}),
        (files | {"chat_template.jinja": "from a file 🌲".encode()}, {"default": "from a file 🌲"}),
        (files | {"chat_template.json": b'{"chat_template": "older"}'}, {"default": "from the config"}),
        (listed, {"default": "a", "tool_use": "b"}),
    ]:
        tokenizer = load_tokenizer(given)
        assert tokenizer is not None
        assert tokenizer.chat_templates == expected
