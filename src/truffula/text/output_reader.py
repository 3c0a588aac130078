"""Reads the text of an answer that arrives in pieces: the parts of ``OutputParser`` that know no format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

from truffula.json_text import json_value

SPACE = " \t\r\n"
MAX_WORD = 1024
MAX_DEPTH = 256
_NO_SPACE = re.compile(r"[^ \t\r\n]")
_NAME = re.compile(r"[^\s<>{}()\[\]\"'=,|｜]*")
_WORD = re.compile(r"[\w+\-.]*")
_JSON_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_JSON_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_PYTHON_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4}|[^xuU])", re.DOTALL
)
_PYTHON_ESCAPES = dict(zip("nrtbfav0", "\n\r\t\b\f\a\v\0", strict=True))

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A step of parsing: it yields when it needs more text."""
Sink = Callable[[str], None]


class MalformedCall(Exception):
    """The text is no call in the format."""


class Markers:
    """Finds the first of several texts, and the end of a text that may become one of them."""

    def __init__(self, texts: Sequence[str]) -> None:
        ordered = sorted({text for text in texts if text}, key=len, reverse=True)
        self._search = re.compile("|".join(map(re.escape, ordered)) or r"(?!)").search
        self._firsts = re.compile(f"[{re.escape(''.join({text[0] for text in ordered}))}]") if ordered else None
        self._prefixes = frozenset(text[:end] for text in ordered for end in range(1, len(text)))
        self._longest = max(map(len, ordered), default=0)

    def find(self, text: str, at: int, ended: bool) -> tuple[int, str]:
        """Where the first marker starts, and the marker; "" for text that is none, and none can start before there."""
        match = self._search(text, at)
        if match is not None and (ended or text[match.start() :] not in self._prefixes):
            return match.start(), match[0]
        stop = len(text) if match is None else match.start()
        if ended or self._firsts is None:
            return stop, ""
        start = max(at, len(text) - self._longest + 1)
        while (first := self._firsts.search(text, start)) is not None:
            start = first.start()
            if text[start:] in self._prefixes:
                return min(start, stop), ""
            start += 1
        return stop, ""


@lru_cache(maxsize=256)
def markers(*texts: str) -> Markers:
    """The ``Markers`` of these texts, made once."""
    return Markers(texts)


class Notation(NamedTuple):
    """How values are written: the quotes of strings, words other than those of JSON, and whether keys may be bare."""

    quotes: tuple[str, ...]
    words: dict[str, str]
    bare_keys: bool


_CONSTANTS = {"true": "true", "false": "false", "null": "null"}
_PYTHON = _CONSTANTS | {"True": "true", "False": "false", "None": "null"}
JSON = Notation(('"',), _CONSTANTS, False)
PYTHON = Notation(("'", '"'), _PYTHON, False)
GEMMA = Notation(('<|"|>', '"'), _PYTHON, True)


def escaped(text: str) -> str:
    """``text`` as it is inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class OutputReader:
    """Text that is not parsed yet.

    Methods that return ``Steps`` yield when they need more text, and then ``push`` adds it; after ``ended`` there is no
    more. ``taken``, if it is a list, records all text that is taken.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self.taken: list[str] | None = None

    def push(self, text: str) -> None:
        self.text = self.text[self.at :] + text
        self.at = 0

    def take(self, count: int) -> str:
        piece = self.text[self.at : self.at + count]
        self.at += count
        if self.taken is not None:
            self.taken.append(piece)
        return piece

    def peek(self) -> Steps[str]:
        """The next character; "" at the end."""
        while self.at == len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def space(self) -> Steps[str]:
        """Takes whitespace."""
        found: list[str] = []
        while True:
            match = _NO_SPACE.search(self.text, self.at)
            end = len(self.text) if match is None else match.start()
            if end > self.at:
                found.append(self.take(end - self.at))
            if match is not None or self.ended:
                return "".join(found)
            yield

    def starts(self, literal: str) -> Steps[bool]:
        """Whether the text starts with ``literal``."""
        while True:
            have = self.text[self.at : self.at + len(literal)]
            if have == literal:
                return True
            if self.ended or not literal.startswith(have):
                return False
            yield

    def accept(self, literal: str) -> Steps[bool]:
        """Takes ``literal``, without whitespace at its borders, and whitespace before it; False where it isn't next."""
        literal = literal.strip(SPACE)
        if not literal:
            return True
        yield from self.space()
        found = yield from self.starts(literal)
        if found:
            self.take(len(literal))
        return found

    def expect(self, literal: str) -> Steps[None]:
        if not (yield from self.accept(literal)):
            raise MalformedCall

    def until(self, finder: Markers, sink: Sink) -> Steps[str]:
        """Passes the text before the next marker to ``sink`` as it arrives. Takes and returns the marker; "" at the
        end.
        """
        while True:
            end, marker = finder.find(self.text, self.at, self.ended)
            if end > self.at:
                sink(self.take(end - self.at))
            if marker:
                return self.take(len(marker))
            if self.ended:
                return ""
            yield

    def _run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Takes what matches ``pattern``, one repeated character class."""
        while True:
            match = pattern.match(self.text, self.at)
            end = self.at if match is None else match.end()
            if end - self.at > MAX_WORD:
                raise MalformedCall
            if end < len(self.text) or self.ended:
                return self.take(end - self.at)
            yield

    def name(self) -> Steps[str]:
        """Takes the name of a tool."""
        yield from self.space()
        name = yield from self._run(_NAME)
        if not name:
            raise MalformedCall
        return name

    def value(self, notation: Notation, sink: Sink) -> Steps[None]:
        """Takes one value, and passes its JSON to ``sink`` as it arrives."""
        closing: list[str] = []
        while True:
            sink((yield from self.space()))
            char = yield from self.peek()
            if char in ("{", "["):
                sink(self.take(1))
                closing.append("}" if char == "{" else "]")
                if len(closing) > MAX_DEPTH:
                    raise MalformedCall
                sink((yield from self.space()))
                if (yield from self.peek()) != closing[-1]:
                    if char == "{":
                        yield from self._key(notation, sink)
                    continue
            elif not (yield from self._string(notation, sink)):
                yield from self._constant(notation, sink)
            while True:  # after a value, or at the end of an empty object or list
                if not closing:
                    return
                sink((yield from self.space()))
                char = yield from self.peek()
                if char == closing[-1]:
                    sink(self.take(1))
                    closing.pop()
                    continue
                if char != ",":
                    raise MalformedCall
                sink(self.take(1))
                if closing[-1] == "}":
                    yield from self._key(notation, sink)
                break

    def _key(self, notation: Notation, sink: Sink) -> Steps[None]:
        sink((yield from self.space()))
        if not (yield from self._string(notation, sink)):
            if not notation.bare_keys:
                raise MalformedCall
            key: list[str] = []
            yield from self.short_until(markers(":"), key)
            sink(json.dumps("".join(key).strip(SPACE), ensure_ascii=False) + ":")
            return
        sink((yield from self.space()))
        yield from self.expect(":")
        sink(":")

    def short_until(self, finder: Markers, found: list[str]) -> Steps[str]:
        """``until`` for a text of at most ``MAX_WORD`` characters. Raises ``MalformedCall`` without a marker."""
        length = 0

        def add(text: str) -> None:
            nonlocal length
            length += len(text)
            if length > MAX_WORD:
                raise MalformedCall
            found.append(text)

        marker = yield from self.until(finder, add)
        if not marker:
            raise MalformedCall
        return marker

    def short_text(self) -> Steps[str]:
        """Takes a JSON string of at most ``MAX_WORD`` characters, and returns its text."""
        pieces: list[str] = []

        def add(text: str) -> None:
            pieces.append(text)
            if len(pieces) > MAX_WORD or len(text) > MAX_WORD:
                raise MalformedCall

        yield from self.space()
        if not (yield from self._string(JSON, add)):
            raise MalformedCall
        text: str = json.loads("".join(pieces))
        return text

    def _constant(self, notation: Notation, sink: Sink) -> Steps[None]:
        word = yield from self._run(_WORD)
        if word in notation.words:
            sink(notation.words[word])
        elif _NUMBER.fullmatch(word):
            sink(word)
        else:
            raise MalformedCall

    def _string(self, notation: Notation, sink: Sink) -> Steps[bool]:
        """Takes a string; False where none starts."""
        for quote in notation.quotes:
            if (yield from self.starts(quote)):
                break
        else:
            return False
        self.take(len(quote))
        sink('"')
        if len(quote) > 1:
            if not (yield from self.until(markers(quote), lambda text: sink(escaped(text)))):
                raise MalformedCall
        elif notation is PYTHON:
            yield from self._python_string(quote, sink)
        else:
            yield from self._json_string(sink)
        sink('"')
        return True

    def _json_string(self, sink: Sink) -> Steps[None]:
        while True:
            match = _JSON_PLAIN.match(self.text, self.at)
            if match is not None:
                sink(self.take(match.end() - self.at))
            char = yield from self.peek()
            if char == '"':
                self.take(1)
                return
            if char == "\\":
                sink((yield from self._escape(_JSON_ESCAPE, 6)))
            elif not char:
                raise MalformedCall
            elif char < " ":  # not JSON, but models write line breaks in strings
                sink(escaped(self.take(1)))

    def _escape(self, pattern: re.Pattern[str], longest: int) -> Steps[str]:
        while True:
            match = pattern.match(self.text, self.at)
            if match is not None:
                return self.take(match.end() - self.at)
            if self.ended or len(self.text) - self.at >= longest:
                raise MalformedCall
            yield

    def _python_string(self, quote: str, sink: Sink) -> Steps[None]:
        finder = markers(quote, "\\")
        while True:
            marker = yield from self.until(finder, lambda text: sink(escaped(text)))
            if marker == quote:
                return
            if not marker:
                raise MalformedCall
            self.at -= 1  # the backslash belongs to the escape
            if self.taken is not None:
                self.taken.pop()
            escape = yield from self._escape(_PYTHON_ESCAPE, 10)
            if escape[1] in "uU" and "\\u" + escape[-4:] == escape:
                sink(escape)  # JSON has the same, also for the halves of a surrogate pair
            elif escape[1] in "xU":
                code = int(escape[2:], 16)
                sink(escaped(chr(code)) if code > 0xFFFF else f"\\u{code:04x}")
            elif escape[1] in "\"'\\\n/":
                sink(escaped(escape[1].strip("\n")))
            else:
                sink(escaped(_PYTHON_ESCAPES.get(escape[1], escape)))


def json_from(text: str) -> str:
    """The JSON of one value, written in JSON or as a Python literal; "" where the text is neither."""
    try:
        json_value(text, partial(json.loads, parse_constant=_refuse))
        return text.strip(SPACE)
    except ValueError:
        pass
    reader, pieces = OutputReader(), list[str]()
    reader.push(text.strip(SPACE))
    reader.ended = True
    try:
        for _ in reader.value(PYTHON, pieces.append):
            pass
    except MalformedCall:
        return ""
    return "".join(pieces) if reader.at == len(reader.text) else ""


def _refuse(constant: str) -> None:
    raise ValueError(constant)
