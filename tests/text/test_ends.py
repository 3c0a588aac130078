"""Which tokens end a completion: those of the files, and the one that the chat template writes after an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from tiny_tokenizers import byte_level_json

from truffula.text.chat_template import ChatTemplates
from truffula.text.ends import IN_CHATS, EndTokens, describe
from truffula.text.tokenizer import Tokenizer, load_tokenizer
from truffula.types import EndToken

SPECIAL = ["<|im_start|>", "<|im_end|>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<end_of_turn>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    CHATML: "<|im_end|>",
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}": "</s>",
    # a second mark where the conversation ends (phi 3)
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if not add_generation_prompt %}</s>{% endif %}": "<|end|>",
    # the content is trimmed (gemma)
    "{% for m in messages %}<|user|>{{ m.content | trim }}<end_of_turn>\n{% endfor %}": "<end_of_turn>",
    # the end mark stands a line below
    "{% for m in messages %}{{ m.content }}\n\n<|im_end|>{% endfor %}": "<|im_end|>",
    # a token that begins the next turn ends none, nor does one that is written after every conversation
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}": None,
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>": None,
    "{% for m in messages %}{{ m.content }}\n{% endfor %}": None,
    # only the last answer has an end
    "{% for m in messages %}{{ m.content }}\n{% endfor %}</s>": None,
    # a template that refuses, fails, or leaves answers out
    "{{ raise_exception('no') }}": None,
    "{{ messages[7].content }}": None,
    "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}": None,
    "{% broken": None,
}


def tokenizer(eos: str | None = None, special: Sequence[str] = SPECIAL, plain: Sequence[str] = ()) -> Tokenizer:
    decoder = {
        str(500 + i): {"content": text, "special": text in special, "normalized": False}
        for i, text in enumerate([*special, *plain])
    }
    config = {"eos_token": eos, "added_tokens_decoder": decoder}
    found = load_tokenizer({"tokenizer.json": byte_level_json(), "tokenizer_config.json": json.dumps(config).encode()})
    assert found is not None
    return found


def ends_of(
    made: Tokenizer | None,
    template: str | None = None,
    configured: Sequence[EndToken] = (),
    vocab_size: int = 1000,
    named: Sequence[EndToken] | None = None,
) -> EndTokens:
    templates = ChatTemplates({} if template is None else {"default": template}, {})
    if named is None:
        named = () if made is None else made.end_tokens
    return EndTokens(named, configured, tokenizer=made, templates=templates, vocab_size=vocab_size)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_token_after_every_answer(template: str) -> None:
    found = ends_of(tokenizer(), template)
    wanted = TEMPLATES[template]
    assert found.always == []
    assert [(token.text, token.source) for token in found.all] == ([(wanted, IN_CHATS)] if wanted else [])
    assert found.turn_ends.get(template) == (found.all[0] if wanted else None)
    assert any("No file of the model names an end token" in text for text in found.warnings) is (wanted is None)


def test_a_template_that_is_not_the_models_adds_none() -> None:
    found = ends_of(tokenizer(), CHATML)
    assert CHATML + " " not in found.turn_ends


def test_an_end_that_the_files_name_keeps_its_source() -> None:
    made = tokenizer("<|im_end|>")
    found = ends_of(made, CHATML, [EndToken(0, "config.json eos_token_id"), EndToken(made.eos_id, "config.json")])
    assert describe(found.all) == (
        f"<|im_end|> ({made.eos_id}, tokenizer_config.json eos_token), <|begin|> (0, config.json eos_token_id)"
    )
    assert found.all == found.always and found.ids == {0, made.eos_id} and found.warnings == []


def test_an_added_token_that_is_not_special_ends_a_turn_too() -> None:
    made = tokenizer(special=["<|im_start|>"], plain=["<|im_end|>"])
    assert [token.text for token in ends_of(made, CHATML).all] == ["<|im_end|>"]


def test_a_turn_end_that_is_not_one_token_is_reported() -> None:
    found = ends_of(tokenizer(special=["<|im_start|>"]), CHATML, [EndToken(1, "config.json")])
    assert [token.id for token in found.all] == [1]
    (warning,) = found.warnings
    assert "'<|im_end|>'" in warning and "not a single token" in warning


def test_an_end_beyond_the_models_ids_is_reported_and_ends_nothing() -> None:
    made = tokenizer("<|im_end|>")
    found = ends_of(made, CHATML, vocab_size=made.eos_id)
    assert found.all == []
    assert any(f"<|im_end|> ({made.eos_id}, tokenizer_config.json eos_token)" in text for text in found.warnings)


def test_many_ends_are_reported_in_one_line() -> None:
    many = [EndToken(i, "generation_config.json eos_token_id") for i in range(3000)]
    found = EndTokens([], many, tokenizer=None, templates=ChatTemplates({}, {}), vocab_size=1000)
    assert len(found.ids) == 1000
    (warning,) = found.warnings
    assert "beyond the model's 1000 ids" in warning and "1000 (generation_config.json eos_token_id)" in warning
    assert warning.endswith(" and 1980 more.")
    assert describe(found.all).endswith(" and 980 more")


def test_without_a_tokenizer_the_ids_count() -> None:
    found = ends_of(None, None, [EndToken(7, "config.json eos_token_id")], named=[EndToken(5, "by key", "<x>")])
    assert describe(found.all) == "<x> (5, by key), 7 (config.json eos_token_id)"
    assert describe([]) == ""
