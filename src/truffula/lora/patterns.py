"""Regular expressions from untrusted files, matched in bounded time.

An adapter's configuration holds patterns (``target_modules`` as a string, the keys of ``rank_pattern``) that PEFT runs
through Python's backtracking engine; a short hostile one hangs it for ever. Here a pattern is parsed by Python's own
parser, so that syntax and meaning are Python's, and then run as a set of states moved over the text one character at a
time: ``len(text) * states`` steps at most (times ``len(text)`` with look-arounds), whatever the pattern. Only whether
there is a match is asked, so greedy and lazy repeats are the same. What needs backtracking (back-references,
conditionals, possessive and atomic groups) and inline flags are refused.

Source: Thompson 1968; Cox, "Regular Expression Matching Can Be Simple And Fast", 2007.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from truffula.errors import AdapterError

MAX_PATTERN_CHARS = 16_384
MAX_STATES = 20_000
MAX_STEPS = 20_000_000  # of one adapter's matching altogether: a few seconds of the worker

# Private since 3.11, and the only way to have Python's own syntax; the tests compare every construct with ``re``.
_PARSER = importlib.import_module("re._parser")

Test = Callable[[str], bool]


@dataclass
class Steps:
    """What is left of an adapter's allowance for matching."""

    left: int = MAX_STEPS

    def take(self, count: int, field: str) -> None:
        self.left -= count
        if self.left < 0:
            raise AdapterError(f"{field}: its patterns take too long to match (limit: {MAX_STEPS} steps).", param=field)


@dataclass(frozen=True)
class _Consume:
    """One character that passes ``test``."""

    test: Test
    then: int


@dataclass(frozen=True)
class _Fork:
    then: tuple[int, ...]


@dataclass(frozen=True)
class _Assert:
    """A position that passes ``test(text, index)``."""

    test: Callable[[str, int], bool]
    then: int


@dataclass(frozen=True)
class _Look:
    """A position where the sub-program at ``start`` does (or does not) match: ahead, or ``width`` characters behind."""

    start: int
    negative: bool
    width: int
    then: int


_ACCEPT = 0
State = _Consume | _Fork | _Assert | _Look | None


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _category(name: str) -> Test:
    kinds: dict[str, Test] = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}
    kind = name.removeprefix("CATEGORY_")
    test = kinds[kind.removeprefix("NOT_")]
    return (lambda c: not test(c)) if kind.startswith("NOT_") else test


def _class(items: list[tuple[Any, Any]]) -> Test:
    """``[...]``: any of its items, or none of them when it begins with a negation."""
    negative = bool(items) and str(items[0][0]) == "NEGATE"
    tests: list[Test] = []
    for op, value in items[1:] if negative else items:
        tests.append(_single(str(op), value))
    return lambda c: any(test(c) for test in tests) != negative


def _single(op: str, value: Any) -> Test:
    if op == "LITERAL":
        return lambda c: ord(c) == value
    if op == "NOT_LITERAL":
        return lambda c: ord(c) != value
    if op == "RANGE":
        return lambda c: value[0] <= ord(c) <= value[1]
    if op == "CATEGORY":
        return _category(str(value))
    if op == "IN":
        return _class(value)
    if op == "ANY":
        return lambda c: c != "\n"
    raise AdapterError(f"cannot match {op.lower()}")


def _boundary(text: str, index: int) -> bool:
    before = index > 0 and _is_word(text[index - 1])
    return before != (index < len(text) and _is_word(text[index]))


def _at(name: str) -> Callable[[str, int], bool]:
    if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return lambda text, index: index == 0
    if name == "AT_END":
        return lambda text, index: index == len(text) or (index == len(text) - 1 and text[index] == "\n")
    if name == "AT_END_STRING":
        return lambda text, index: index == len(text)
    if name == "AT_BOUNDARY":
        return _boundary
    return lambda text, index: not _boundary(text, index)  # AT_NON_BOUNDARY


def _where(source: str, shift: int, error: re.error) -> str:
    """What is wrong and where in ``source``, of which the parser saw ``shift`` more characters in front."""
    try:
        _PARSER.parse(source)
    except re.error as own:
        error, shift = own, 0  # its position is within ``source``
    at = min(max((error.pos or 0) - shift, 0), len(source))
    return f"{error.msg} at character {at + 1}, {source[at : at + 20]!r}" if source[at:] else f"{error.msg} at its end"


class Pattern:
    """One compiled pattern: ``source``, a string of Python's syntax, between ``before`` and ``after``.

    Raises ``AdapterError`` with ``param`` set to ``field`` when it is no valid pattern (saying where), is too long, or
    needs backtracking.
    """

    def __init__(self, source: str, field: str, steps: Steps, before: str = "", after: str = "") -> None:
        self.source = source
        self.field = field
        self._steps = steps
        self._states: list[State] = [None]
        if len(source) > MAX_PATTERN_CHARS:
            raise self._refused(f"{len(source)} characters; the limit is {MAX_PATTERN_CHARS}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # sets that may read otherwise in a later Python
                parsed = _PARSER.parse(before + source + after)
            if parsed.state.flags & ~re.UNICODE.value:
                raise self._refused("inline flags are not supported")
            self._start = self._sequence(list(parsed), _ACCEPT)
        except re.error as error:
            raise self._refused(f"not a valid regular expression: {_where(source, len(before), error)}") from error
        except OverflowError as error:
            raise self._refused(f"not a valid regular expression: {error}") from error
        except RecursionError as error:
            raise self._refused("nested too deeply") from error

    def match(self, text: str, *, full: bool = False) -> bool:
        """Whether ``re.match`` (or ``re.fullmatch``) of this pattern would find something in ``text``."""
        try:
            return self._run(self._start, text, 0, full)
        except RecursionError as error:
            raise self._refused("nested too deeply") from error

    def _refused(self, why: str) -> AdapterError:
        shown = self.source if len(self.source) <= 80 else self.source[:77] + "..."
        return AdapterError(f"{self.field}: pattern {shown!r}: {why}.", param=self.field, pattern=shown)

    def _new(self, state: State) -> int:
        if len(self._states) >= MAX_STATES:
            raise self._refused(f"more than {MAX_STATES} states; make its repeats smaller")
        self._states.append(state)
        return len(self._states) - 1

    def _sequence(self, items: Iterable[tuple[Any, Any]], then: int) -> int:
        for op, value in reversed(list(items)):
            then = self._item(str(op), value, then)
        return then

    def _item(self, op: str, value: Any, then: int) -> int:
        if op in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
            return self._new(_Consume(_single(op, value), then))
        if op == "AT":
            return self._new(_Assert(_at(str(value)), then))
        if op == "BRANCH":
            return self._new(_Fork(tuple(self._sequence(branch, then) for branch in value[1])))
        if op == "SUBPATTERN":
            _, added, removed, inside = value
            if added or removed:
                raise self._refused("inline flags are not supported")
            return self._sequence(inside, then)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(value[0], value[1], list(value[2]), then)
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, inside = value
            width = inside.getwidth()[0] if direction < 0 else 0
            start = self._sequence(inside, _ACCEPT)
            return self._new(_Look(start, op == "ASSERT_NOT", width, then))
        if op == "FAILURE":
            return self._new(_Fork(()))
        words = {
            "GROUPREF": "a back-reference",
            "GROUPREF_EXISTS": "a conditional group",
            "ATOMIC_GROUP": "an atomic group",
        }
        what = words.get(op, "a possessive repeat" if op == "POSSESSIVE_REPEAT" else op.lower())
        raise self._refused(f"{what} is not supported: it cannot be matched in bounded time")

    def _repeat(self, low: int, high: Any, inside: list[tuple[Any, Any]], then: int) -> int:
        if high is _PARSER.MAXREPEAT or high == _PARSER.MAXREPEAT:
            loop = self._new(None)
            body = self._sequence(inside, loop)
            self._states[loop] = _Fork((body, then))
            entry = loop
        else:
            entry = then
            for _ in range(high - low):
                entry = self._new(_Fork((self._sequence(inside, entry), then)))
        for _ in range(low):
            before = len(self._states)
            entry = self._sequence(inside, entry)
            if len(self._states) == before:
                break  # an empty body: repeating it adds nothing, however often it is asked
        return entry

    def _run(self, start: int, text: str, index: int, full: bool, end: int | None = None) -> bool:
        """Move the set of states from ``index`` on. With ``end`` the match must end exactly there."""
        stop = len(text) if end is None else end
        current = self._closure([start], text, index)
        while True:
            if _ACCEPT in current and (not full or index == stop):
                return True
            if index == stop or not current:
                return False
            character = text[index]
            index += 1
            moved = [
                state.then
                for number in current
                if isinstance(state := self._states[number], _Consume) and state.test(character)
            ]
            current = self._closure(moved, text, index)

    def _closure(self, numbers: list[int], text: str, index: int) -> set[int]:
        """All states reachable without consuming."""
        found: set[int] = set()
        waiting = numbers
        while waiting:
            number = waiting.pop()
            if number in found:
                continue
            found.add(number)
            state = self._states[number]
            if isinstance(state, _Fork):
                waiting.extend(state.then)
            elif (isinstance(state, _Assert) and state.test(text, index)) or (
                isinstance(state, _Look) and self._looks(state, text, index)
            ):
                waiting.append(state.then)
        self._steps.take(len(found) + 1, self.field)
        return found

    def _looks(self, state: _Look, text: str, index: int) -> bool:
        if state.width:
            seen = index >= state.width and self._run(state.start, text, index - state.width, True, index)
        else:
            seen = self._run(state.start, text, index, False)
        return seen != state.negative


_LITERAL = re.compile(r"[A-Za-z0-9_.\-]*\Z")


class Suffix:
    """A pattern of ``rank_pattern``/``alpha_pattern`` as PEFT reads it: ``re.match(r"(.*\\.)?(p)$", module)``."""

    def __init__(self, source: str, field: str, steps: Steps) -> None:
        self.source = source
        self._literal = _LITERAL.match(source) is not None
        self._pattern = None if self._literal else Pattern(source, field, steps, r"(.*\.)?(", ")$")

    def match(self, module: str) -> bool:
        if self._pattern is not None:
            return self._pattern.match(module)
        # Plain names, nearly all there are, without the machine. A dot in them matches anything, as in any pattern.
        start = len(module) - len(self.source)
        if start < 0 or (start and module[start - 1] != "."):
            return False
        return all(p in (".", c) for p, c in zip(self.source, module[start:], strict=True))


class PatternTable:
    """``rank_pattern`` or ``alpha_pattern``: the first hit in file order wins.

    ``conflicts`` collects the modules that two patterns give different values: the file's order (sorted by PEFT when
    saving) then decides, and it need not be the order of training.
    """

    def __init__(self, entries: Mapping[str, Any], field: str, steps: Steps) -> None:
        self._field = field
        self._steps = steps
        self._rows = [(Suffix(source, field, steps), value) for source, value in entries.items()]
        self._used: set[str] = set()
        self.conflicts: list[tuple[str, str, str]] = []  # module, the pattern that won, the one that lost

    def value(self, module: str, default: Any) -> Any:
        """The value for ``module``, or ``default``."""
        self._steps.take(len(self._rows), self._field)
        hits = [(row.source, value) for row, value in self._rows if row.match(module)]
        if not hits:
            return default
        winner, chosen = hits[0]
        self._used.add(winner)
        for loser, value in hits[1:]:
            self._used.add(loser)
            if value != chosen:
                self.conflicts.append((module, winner, loser))
        return chosen

    def unused(self, others: Collection[str] = ()) -> list[str]:
        """Patterns that have hit no module so far, nor one of ``others``."""
        left = [row for row, _ in self._rows if row.source not in self._used]
        return [row.source for row in left if not any(row.match(module) for module in others)]
