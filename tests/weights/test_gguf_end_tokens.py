"""Which tokens of a GGUF file end a completion and which are marks, as llama.cpp's vocabulary loader has it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from truffula.text.tokenizer import load_tokenizer
from truffula.weights.gguf.tokenizer import generation_config, read_tokenizer
from truffula.weights.gguf.vocabulary import Vocabulary
from truffula.weights.text_files import ModelTexts

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def metadata(marks: dict[str, int], **keys: Any) -> dict[str, Any]:
    """A byte-level vocabulary: ``marks`` (text → type) first, then a token per byte."""
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*marks, *ALPHABET],
        "tokenizer.ggml.token_type": [*marks.values()] + [NORMAL] * len(ALPHABET),
        "tokenizer.ggml.merges": [],
        **named,
    }


def ends(found: ModelTexts) -> dict[str, str]:
    return {token.text: token.source for token in found.end_tokens}


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
@pytest.mark.parametrize("keys", [{}, {"eot_token_id": 2}], ids=["no eot id", "eot id"])
def test_turn_marks_are_single_tokens_and_end_the_answer_whatever_their_type(kind: int, keys: dict[str, int]) -> None:
    marks = {"<|endoftext|>": CONTROL, "<|im_start|>": kind, "<|im_end|>": kind}
    found = read_tokenizer(metadata(marks, eos_token_id=0, **keys))
    source = "tokenizer.ggml.eot_token_id" if keys else "recognised by its text"
    assert ends(found) == {"<|endoftext|>": "tokenizer.ggml.eos_token_id", "<|im_end|>": source}
    tokenizer = load_tokenizer(found.tokenizer, found.end_tokens)
    assert tokenizer is not None
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, 3 + ALPHABET.index("a"), 2]
    assert tokenizer.end_tokens == found.end_tokens
    assert 2 in tokenizer.special_ids
    named = [text for text in found.warnings if "token_type has" in text]
    assert len(named) == (kind == NORMAL)
    assert all("'<|im_start|>' (1), '<|im_end|>' (2)" in text for text in named)


@pytest.mark.parametrize(
    "text",
    [
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
        "[EOT]", "[EOS]", "</s>", "<eos>", "<|eom_id|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<turn|>",
        "<|tool_response>", "[e~[", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
        "<|fim_pad|>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<reponame>", "<|file_sep|>",
    ],
)  # fmt: skip
def test_a_text_that_ends_a_completion(text: str) -> None:
    """Every text that llama.cpp puts on its end-of-generation list; it also makes them control tokens."""
    vocabulary = Vocabulary(metadata({text: NORMAL}))
    assert [token.text for token in vocabulary.ends] == [text]
    assert vocabulary.types[0] == CONTROL


@pytest.mark.parametrize("text", ["<|im_start|>", "<start_of_turn>", "<think>", "</think>", "<tool_call>", "<0x0A>"])
def test_other_marks_end_nothing(text: str) -> None:
    assert Vocabulary(metadata({text: NORMAL})).ends == ()


@pytest.mark.parametrize(
    ("texts", "left_out", "kind"),
    [
        (["<|end|>", "<|return|>", "<|call|>"], "<|end|>", USER_DEFINED),
        (["<|end|>", "<|calls|>", "<|flush|>"], "<|end|>", USER_DEFINED),
        (["<|end|>", "<|call|>", "<|flush|>"], "<|end|>", USER_DEFINED),
        (["</s>", "<|tool_response>"], "</s>", USER_DEFINED),
        (["<|end|>", "<|return|>"], None, CONTROL),
        (["<|end|>", "<|calls|>"], None, CONTROL),
    ],
)
def test_what_ends_only_a_part_of_an_answer_beside_others(texts: list[str], left_out: str | None, kind: int) -> None:
    vocabulary = Vocabulary(metadata(dict.fromkeys(texts, CONTROL)))
    assert {token.text for token in vocabulary.ends} == set(texts) - {left_out}
    assert vocabulary.types[0] == kind


def test_the_structure_of_harmony_is_part_of_the_text() -> None:
    texts = ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"]
    assert Vocabulary(metadata(dict.fromkeys(texts, CONTROL))).types[:4] == [USER_DEFINED] * 4


def test_a_key_names_a_fill_in_mark_before_its_text() -> None:
    vocabulary = Vocabulary(metadata({"<PAD>": CONTROL, "<x>": NORMAL}, fim_pad_token_id=1))
    assert [(token.id, token.source) for token in vocabulary.ends] == [(1, "tokenizer.ggml.fim_pad_token_id")]
    assert vocabulary.types[:2] == [CONTROL, CONTROL]


def test_ids_that_are_no_tokens_are_not_used() -> None:
    found = read_tokenizer(metadata({"<|im_end|>": CONTROL}, eos_token_id=10**6, eot_token_id=-1, bos_token_id="a"))
    assert ends(found) == {"<|im_end|>": "recognised by its text"}
    for name in ("eos", "eot", "bos"):
        assert any(f"tokenizer.ggml.{name}_token_id is" in text for text in found.warnings)
    # The engine, which does not read the vocabulary, looks at their range itself.
    assert generation_config(metadata({}, eos_token_id=5, eot_token_id=5, eom_token_id=7)) == {"eos_token_id": [5, 7]}
    assert generation_config(metadata({}, eos_token_id=True)) == {}


def test_sentencepiece_has_default_ids() -> None:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "<end>", *bytes_, "a"]
    found = read_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1],
        }
    )
    assert ends(found) == {"<end>": "the default eos_token_id of tokenizer.ggml.model llama"}
    assert Tokenizer.from_str(found.tokenizer["tokenizer.json"].decode()).encode("a").ids[0] == 1
    config = json.loads(found.tokenizer["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "<end>", "<unk>")


def test_text_that_a_file_gives_as_bos_stays_text() -> None:
    """Converted Qwen files have been seen with ``,`` as bos: a special token would be left out of every answer."""
    comma = 1 + ALPHABET.index(",")
    found = read_tokenizer(metadata({"<|im_end|>": CONTROL}, bos_token_id=comma, add_bos_token=False, eos_token_id=0))
    tokenizer = load_tokenizer(found.tokenizer, found.end_tokens)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("a,b<|im_end|>"), skip_special_tokens=True) == "a,b"
    assert "bos_token" not in tokenizer.special_tokens
