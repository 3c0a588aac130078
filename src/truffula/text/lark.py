"""Lark grammars in llguidance's dialect: checks for what it accepts although no text matches, and renaming rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from truffula.errors import InvalidRequest

MAX_RULES = 2000
"""llguidance recurses over rules, and ends its process when they are too many."""
_REFUSED = ("max_tokens", "stop", "stop_capture", "temperature")
"""Attributes of a rule that concern other things than which texts match."""
_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r\f]+|//[^\n]*|\#[^\n]*|\\[ \t]*\n)|(?P<line>\n)
    |(?P<text>"(?:\\.|[^"\\\n])*"i?|/(?:\\.|[^/\\\n])+/[a-z]*|<[^<>\s]+>|@[\w-]+)
    |(?P<json>%(?:json|regex|llguidance)\b[ \t\r\n]*)|(?P<directive>%[a-z]+)
    |(?P<name>[A-Za-z_][\w-]*)|(?P<repeat>\{[ \t]*\d*[ \t]*(?:,[ \t]*\d*[ \t]*)?\}|~[ \t]*\d+(?:\.\.\d+)?)
    |(?P<number>\d+(?:\.\d+)?)
    |(?P<mark>\.\.|->|[:|()\[\]?*+!&~.,={}])""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    at: int


def tokens(source: str) -> Iterator[Token]:
    """The tokens of ``source``, blanks and comments included. Raises ``InvalidRequest``."""
    at = 0
    while at < len(source):
        found = _TOKEN.match(source, at)
        if found is None:
            line = source.count("\n", 0, at) + 1
            raise InvalidRequest(f"The grammar has no valid token at {source[at : at + 20]!r}, in line {line}.")
        kind, end = str(found.lastgroup), found.end()
        if kind == "json":
            try:
                _, end = json.JSONDecoder().raw_decode(source, end)
            except ValueError as error:
                raise InvalidRequest(f"The grammar has {found[0].strip()} without a JSON value: {error}.") from error
        yield Token(kind, source[at:end], at)
        at = end


def renamed(source: str, root: str) -> str:
    """``source`` with rule ``start`` called ``root``, so that it can be part of another grammar."""
    parts = []
    for token in tokens(source):
        if token.kind == "directive" or token.text.startswith("%llguidance"):
            raise InvalidRequest(
                f"The grammar has {token.text[:20]}, which cannot be combined with tools or reasoning; leave it out."
            )
        parts.append(root if token.kind == "name" and token.text == "start" else token.text)
    return "".join(parts)


def check_lark(source: str) -> None:
    """Raise ``InvalidRequest`` for a grammar with too many rules, with a rule that no text matches, or with attributes
    that are not supported. Syntax is left to llguidance.
    """
    rules = _Rules([token for token in tokens(source) if token.kind != "blank"])
    if len(rules.found) > MAX_RULES:
        raise InvalidRequest(f"The grammar has {len(rules.found)} rules; the limit is {MAX_RULES}.")
    possible: set[str] = set()
    while new := {name for name, rule in rules.found.items() if name not in possible and rule(possible)}:
        possible |= new
    for name in rules.found:
        if name not in possible:
            raise InvalidRequest(f"No text matches rule {name!r} of the grammar: it has no alternative that ends.")


Rule = Callable[[set[str]], bool]
"""Whether some text matches, where the rules of a set are known to match some."""


class _Rules:
    """The rules of a grammar by name, terminals included."""

    def __init__(self, listed: Sequence[Token]) -> None:
        self._tokens = listed
        self._at = 0
        self.found: dict[str, Rule] = {}
        while self._at < len(self._tokens):
            if self._begins_rule():
                self._rule()
            else:
                self._at += 1

    def _begins_rule(self) -> bool:
        """Whether a definition begins here: ``name:``, ``?name:``, ``name[lazy]:``, ``name.2:``, at a line's start."""
        at = self._at
        if at and self._tokens[at - 1].kind != "line":
            return False
        while at < len(self._tokens) and self._tokens[at].text in ("?", "!"):
            at += 1
        if at >= len(self._tokens) or self._tokens[at].kind != "name":
            return False
        while at < len(self._tokens) and self._tokens[at].kind != "line" and self._tokens[at].text != ":":
            at += 1
        return at < len(self._tokens) and self._tokens[at].text == ":"

    def _rule(self) -> None:
        while self._text() in ("?", "!"):
            self._at += 1
        name = self._text()
        while self._text() != ":":
            if self._text() in _REFUSED and self._tokens[self._at].kind == "name" and self._text() != name:
                raise InvalidRequest(f"Rule {name!r} of the grammar has {self._text()}, which is not supported.")
            self._at += 1
        self._at += 1
        rule = self._alternatives()
        self.found.setdefault(name, rule)

    def _text(self) -> str:
        return self._tokens[self._at].text if self._at < len(self._tokens) else ""

    def _skip_lines(self) -> None:
        """Go past line breaks that do not end the rule."""
        while self._at < len(self._tokens) and self._tokens[self._at].kind == "line":
            self._at += 1

    def _alternatives(self) -> Rule:
        options = [self._sequence()]
        while True:
            before = self._at
            self._skip_lines()
            if self._text() != "|":
                self._at = before
                break
            self._at += 1
            self._skip_lines()
            options.append(self._sequence())
        return options[0] if len(options) == 1 else lambda possible: any(one(possible) for one in options)

    def _sequence(self) -> Rule:
        parts: list[Rule] = []
        while self._at < len(self._tokens):
            token = self._tokens[self._at]
            if token.text in ("|", ")", "]"):
                break
            if token.kind == "line":
                before = self._at
                self._skip_lines()
                if self._at >= len(self._tokens) or self._begins_rule() or self._tokens[self._at].kind == "directive":
                    break
                if self._text() == "|":
                    self._at = before
                    break
                continue
            self._at += 1
            self._part(token, parts)
        return parts[0] if len(parts) == 1 else lambda possible: all(one(possible) for one in parts)

    def _part(self, token: Token, parts: list[Rule]) -> None:
        """Adds what ``token`` begins, or repeats, to ``parts``."""
        if token.text in ("(", "["):
            inside = self._alternatives()
            self._skip_lines()
            self._at += 1  # its end
            parts.append(inside if token.text == "(" else _always)
        elif token.text in ("?", "*") or (token.kind == "repeat" and re.match(r"[{~]\s*0*\s*(,|\}|\.)", token.text)):
            if parts:
                parts[-1] = _always
        elif token.text == "->":
            self._at += 1  # an alias
        elif token.kind == "name":
            name = token.text
            # llguidance knows whether a terminal and a name that is defined nowhere are valid.
            parts.append(lambda possible: name in possible or name not in self.found)
        elif token.kind in ("text", "json"):
            parts.append(_always)


def _always(possible: set[str]) -> bool:
    return True
