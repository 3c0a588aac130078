"""Grammars over a vocabulary of 97 tokens, and an oracle that follows an answer from its beginning."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jsonschema
from llguidance import LLMatcher, LLTokenizer

from truffula.engine.constraints import without_forcing
from truffula.items import Grammar
from truffula.types import EngineRequest, Vocabulary

_CHARS = b'{}[]":,.-+0123456789abcdefghijklmnopqrstuvwxyz ABC\n\\'
_WORDS = [
    b'{"', b'":', b'",', b'","', b"true", b"false", b"null", b"12", b"007", b"ab", b"abc", b"aa", b"aaa", b"bc", b'a"',
    b"}}", b"]}", b"[1", b", ", b": ", b"  ", b"re", b"gr", b"een", b"blue", b"red", b"\xc3", b"\xa9", b"\xc3\xa9",
]  # fmt: skip
TOOL, PAD, EOS = b"<|tool|>", b"<|pad|>", b"<|end|>"
_TEXT = [bytes([char]) for char in _CHARS] + _WORDS
VOCAB = 97
_TOKENS = _TEXT + [b""] * (VOCAB - 3 - len(_TEXT)) + [TOOL, PAD, EOS]
VOCABULARY = Vocabulary(tokens=_TOKENS, special_ids=[VOCAB - 3, VOCAB - 2, VOCAB - 1], end_ids=[VOCAB - 1])


def ids_of(*tokens: bytes) -> list[int]:
    return [_TOKENS.index(token) for token in tokens]


def text_of(ids: Sequence[int]) -> bytes:
    return b"".join(_TOKENS[i] for i in ids)


@dataclass(frozen=True)
class Rule:
    """A grammar, and whether a text is one of its."""

    grammar: Grammar
    holds: Callable[[bytes], bool]


def _lark(name: str, source: str, pattern: bytes) -> Rule:
    return Rule(Grammar(key=name, source=source), lambda text: re.fullmatch(pattern, text) is not None)


def _schema(name: str, schema: dict) -> Rule:
    def holds(text: bytes) -> bool:
        jsonschema.validate(json.loads(text), schema)
        return True

    source = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
    return Rule(Grammar(key=name, source=source), holds)


_OBJECT = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -20, "maximum": 300},
        "b": {"type": "array", "items": {"enum": ["red", "green", True]}, "maxItems": 2},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
RULES = {
    rule.grammar.key: rule
    for rule in (
        _schema("object", _OBJECT),
        _schema("any", {"type": ["integer", "boolean", "null"]}),
        Rule(
            Grammar(key="regex", source=LLMatcher.grammar_from_regex("[ab]{1,6}c?")),
            lambda text: re.fullmatch(b"[ab]{1,6}c?", text) is not None,
        ),
        _lark("choice", 'start: "red" | "green" | "greenre" | "blue"', b"red|green|greenre|blue"),
        _lark("open", "start: /[a-z ]*/", b"[a-z ]*"),
        _lark("empty", 'start: "ab"?', b"(ab)?"),
        _lark("accent", "start: /é+/ /[0-9]/", "(é)+[0-9]".encode()),
        _lark("named", 'start: "a" <|tool|> /[0-9]{2}/ <|end|>', rb"a<\|tool\|>[0-9]{2}(<\|end\|>)?"),
        _lark("nested", 'start: value\nvalue: "[" (value ("," value)*)? "]" | "1"', rb"[\[\]1,]+"),
    )
}


@cache
def _tokenizer() -> LLTokenizer:
    """A tokenizer of its own, without the slices of the engine's."""

    class Tokens:
        is_tokenizer_wrapper = True
        eos_token_id, bos_token_id = VOCABULARY.end_ids[0], None
        tokens, special_token_ids = VOCABULARY.tokens, VOCABULARY.special_ids

        def __call__(self, text: str) -> list[int]:
            raise NotImplementedError

    return LLTokenizer(Tokens(), slices=[])  # type: ignore[arg-type]


def check_answer(req: EngineRequest, token_ids: Sequence[int], finish: str, stop_reason: int | None) -> None:
    """Every id of an answer, behind ``resume_ids``, was allowed, and it ended where it had to end."""
    assert req.grammar is not None
    rule = RULES[req.grammar.key]
    oracle = LLMatcher(_tokenizer(), without_forcing(req.grammar.source), log_level=0)
    eos = set(VOCABULARY.end_ids)
    stops = set(req.params.stop_token_ids)
    ids = [*req.resume_ids, *token_ids]
    for place, token in enumerate(ids):
        assert not oracle.is_stopped(), f"token {place} follows the end"
        allowed = {token for token in range(VOCAB) if oracle.validate_tokens([token]) == 1}
        mask = int.from_bytes(oracle.compute_bitmask(), "little")  # knows the EOS ids that a grammar names, too
        allowed |= {token for token in eos if mask >> token & 1}
        accepting = oracle.is_accepting()
        last = place == len(ids) - 1
        if token in eos | stops and accepting:
            assert last and (finish, stop_reason) == ("stop", token), "an end id ends the answer"
            early = place < req.params.min_tokens
            if early or (req.params.ignore_eos and token in eos - stops):
                assert not allowed - eos - stops, "an end id was drawn where others were allowed"
            assert rule.holds(text_of(ids[:-1]))
            return
        assert token in allowed - (stops - eos), f"token {token} is forbidden after {text_of(ids[:place])!r}"
        assert oracle.consume_token(token)
    if oracle.is_stopped():
        assert finish == "stop", "nothing may follow, and the answer goes on"
    if finish == "stop":
        assert oracle.is_stopped(), "the answer ended before its grammar"
        assert rule.holds(text_of(ids))
    elif finish == "length":
        assert len(ids) == req.params.max_tokens
