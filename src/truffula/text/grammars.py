"""Compiles constraints with llguidance, and uses the grammar a little. For text workers: llguidance ends its process on
some grammars, and takes long on others.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from functools import cache

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from truffula.engine.constraints import parser_limits, without_forcing
from truffula.errors import InvalidRequest
from truffula.items import Constraint
from truffula.text.constraints import decoded, json_rule, rules_of
from truffula.text.json_schema import Schema, enforceable, subschemas

STACK_BYTES = 1 << 20
"""llguidance must do with an eighth of the stack that the engine's threads have."""
WALKS, WALK_STEPS = 4, 128
LOCATE_TRIES = 200
"""How many subschemas are compiled to find the one that llguidance's error is about."""

_KEYWORD_ERRORS = (
    ("oneOf constraints", "oneOf: more than one of its options may hold for a value; use anyOf."),
    ("sibling keys", "$ref: beside a $ref to a schema around it no other keywords are supported."),
    ("patternProperty", "patternProperties: {}"),
    ("min/maxProperties only", "minProperties, maxProperties: every name in properties must be required beside them."),
    ("Regex is empty", "pattern: no string meets it together with the other keywords."),
    ("if regex is empty", "pattern: it is too complex together with the other keywords."),
    ("regex", "pattern: {}"),
    ("too many digits", "multipleOf: {}"),
)
"""Words of llguidance's errors, and what the client is told."""


def compile_source(constraint: Constraint, special: tuple[str, ...] = ()) -> str:
    """llguidance's grammar of a constraint, which was used on a vocabulary of bytes and the ``special`` tokens.

    Raises ``InvalidRequest`` without a param.
    """
    try:
        return on_small_stack(lambda: _compile(constraint, special))
    except RecursionError as error:
        raise InvalidRequest("The schema or grammar is nested too deeply.") from error


def _compile(constraint: Constraint, special: tuple[str, ...]) -> str:
    source = LLMatcher.grammar_from_lark(rules_of(constraint))
    vocabulary = stand_in(special)
    tried(source, vocabulary, _noun(constraint), lambda error: _explained(constraint, error, vocabulary))
    return source


def tried(source: str, vocabulary: LLTokenizer, noun: str, explained: Callable[[str], str]) -> None:
    """Use a grammar as the engine does. Raises ``InvalidRequest`` where it is invalid, fails, or has no end.

    ``noun`` names it in errors; ``explained`` makes a sentence of llguidance's error.
    """
    matcher = _matcher(source, vocabulary)
    if matcher.is_error():
        raise InvalidRequest(explained(matcher.get_error()))
    if warnings := matcher.get_grammar_warnings():
        raise InvalidRequest(f"The grammar cannot be enforced: {short(str(warnings[0]))}")
    first = matcher.deep_copy()
    _, allowed = _allowed(first, vocabulary)
    if not allowed:
        what = "only the empty text" if first.is_accepting() else "no text"
        raise InvalidRequest(f"The {noun} matches {what}.")
    for walk in range(WALKS):
        _walk(matcher.deep_copy(), vocabulary, random.Random(walk), noun)


def _walk(matcher: LLMatcher, vocabulary: LLTokenizer, draw: random.Random, noun: str) -> None:
    """Follow ``matcher`` for some steps. Raises ``InvalidRequest`` where it fails, or cannot reach an end."""
    for _ in range(WALK_STEPS):
        error, allowed = _allowed(matcher, vocabulary)
        if not error and not allowed:
            if matcher.is_accepting():
                return
            error = "after some beginnings no text can follow"
        if error:
            raise InvalidRequest(f"The {noun} cannot be used: {short(error)}")
        matcher.consume_token(draw.choice(allowed))


def _allowed(matcher: LLMatcher, vocabulary: LLTokenizer) -> tuple[str, list[int]]:
    """llguidance's error, and the tokens that may follow, without the end."""
    bits = int.from_bytes(matcher.compute_bitmask(), "little")
    error = matcher.get_error() if matcher.is_error() else ""
    end = vocabulary.eos_token
    return error, [token for token in range(vocabulary.vocab_size) if bits >> token & 1 and token != end]


def _explained(constraint: Constraint, error: str, vocabulary: LLTokenizer) -> str:
    """llguidance's error as a sentence; of a schema with the place in it."""
    if constraint.kind == "json_schema":
        schema = enforceable(decoded(constraint.value))
        place, error = _find_place(schema, error, vocabulary)
        said = next((text for words, text in _KEYWORD_ERRORS if words in error), "{}").format(short(error))
        return f"The schema cannot be enforced: at {place[:200]}: {said}"
    return f"The {_noun(constraint)} is not valid: {short(error)}"


def _find_place(schema: Schema, error: str, vocabulary: LLTokenizer) -> tuple[str, str]:
    """The deepest subschema for which llguidance has an error of the same kind, and that error."""
    definitions = schema.pop("$defs", {}) if isinstance(schema, dict) else {}
    left = LOCATE_TRIES
    place, found = "#", error
    inside = [*((one, f"#/$defs/{name}") for name, one in definitions.items()), *subschemas(schema, place)]
    while inside and left:
        one, at = inside.pop(0)
        left -= 1
        whole = {**one, "$defs": definitions} if isinstance(one, dict) else one
        if whole is False:
            continue
        matcher = _matcher(LLMatcher.grammar_from_lark(f"start: {json_rule(whole)}"), vocabulary)
        if matcher.is_error() and _kind(matcher.get_error()) == _kind(found):
            place, found = at, matcher.get_error()
            inside = list(subschemas(one, at))
    return place, found


def _kind(error: str) -> str:
    return "unsatisfiable" if "nsatisfiable" in error else short(error)


def short(error: str) -> str:
    """The first sentence of llguidance's error, without its excerpt of the grammar and its state."""
    text = error.split("\n<state>")[0].split("\n   1 |")[0].split("\n  while processing")[0]
    for known in ("failed to compile JSON schema: ", "(in regex): "):
        text = text.split(known)[-1]
    text = " ".join(text.split())
    text = text.replace("Unsatisfiable schema:", "no value meets it:")
    return f"{text[:300].rstrip('.')}."


def _noun(constraint: Constraint) -> str:
    nouns = {"json_schema": "schema", "regex": "regular expression", "lark": "grammar"}
    return nouns.get(constraint.kind, constraint.kind.replace("_", " "))


def _matcher(source: str, vocabulary: LLTokenizer) -> LLMatcher:
    """As the engine makes one."""
    return LLMatcher(vocabulary, without_forcing(source), log_level=0, limits=parser_limits())


class _Bytes:
    """A vocabulary of every byte, the end, and special tokens."""

    bos_token_id = None
    eos_token_id = 256

    def __init__(self, special: Sequence[str]) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)]
        self.tokens += [b"\xff" + text.encode() for text in ("<|end|>", *special)]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def stand_in(special: tuple[str, ...]) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes(special)), slices=[])


def on_small_stack(work: Callable[[], str]) -> str:
    """The result of ``work`` in a thread with ``STACK_BYTES``."""
    found: list[str] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001  # raised below, in the caller's thread
            errors.append(error)

    before = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="truffula-grammar")
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return found[0]
