"""A suffix becomes part of the prompt in the model's own form, where the vocabulary has one."""

from __future__ import annotations

import pytest
from tiny_tokenizers import byte_level_json, load
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from truffula.errors import InvalidRequest
from truffula.text.infill import infill_prompt
from truffula.text.tokenizer import Tokenizer


def tokenizer_with(*tokens: str) -> Tokenizer:
    library = Library.from_buffer(byte_level_json())
    library.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return load(library.to_str().encode())


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"),
        (("<fim_prefix>", "<fim_middle>", "<fim_suffix>"), "<fim_prefix>a<fim_suffix>b<fim_middle>"),
        (("[PREFIX]", "[SUFFIX]"), "[SUFFIX]b[PREFIX]a"),
    ],
    ids=["qwen", "starcoder", "codestral"],
)
def test_the_form_is_that_of_the_vocabulary(tokens: tuple[str, ...], expected: str) -> None:
    tokenizer = tokenizer_with(*tokens)
    text = infill_prompt("a", "b", tokenizer)
    assert text == expected
    assert tokenizer.added_ids.issuperset(tokenizer.encode(text)[i] for i in (0, 2))


def test_a_vocabulary_without_the_tokens_is_refused() -> None:
    for tokens in ((), ("<|fim_prefix|>", "<|fim_suffix|>")):
        with pytest.raises(InvalidRequest) as caught:
            infill_prompt("a", "b", tokenizer_with(*tokens))
        assert caught.value.param == "suffix"
