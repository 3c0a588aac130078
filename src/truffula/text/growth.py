"""What a template's values may come to: the ``Meter`` of one rendering, and the checks made before something grows."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from string import Formatter
from typing import Any

from jinja2.exceptions import TemplateRuntimeError
from jinja2.utils import Namespace

MAX_STEPS = 500_000
MAX_INT_BITS = 8192
MAX_NUMBER = 100_000  # of a number given to a filter or a method: widths, counts, precisions
MAX_WIDTH = 10_000
ITEM = 4  # characters that an item of a list is counted as, besides its text


class LimitExceeded(TemplateRuntimeError):
    """A template took more than it may."""


class Meter:
    """What one rendering has used. ``known`` holds the weights of its inputs, which can't change."""

    def __init__(self, seconds: float, max_chars: int) -> None:
        self.deadline = time.monotonic() + seconds
        self.seconds = seconds
        self.max_chars = max_chars
        self.steps = 0
        self.made = 0
        self.known: dict[int, int] = {}

    def tick(self) -> None:
        """One turn of a loop, call, filter or operation."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise LimitExceeded(f"it took more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise LimitExceeded(f"it took longer than {self.seconds:g} s")

    def grow(self, chars: int) -> None:
        """A value of this weight is about to exist."""
        if chars > self.max_chars:
            raise LimitExceeded(f"a value would grow to {chars} characters; the limit is {self.max_chars}")
        self.made += chars
        if self.made > 16 * self.max_chars:
            raise LimitExceeded(f"its values together hold more than {16 * self.max_chars} characters")

    def weigh(self, value: Any) -> int:
        """Characters and items that writing ``value`` out would take; shared parts count as often as they occur."""
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, list | tuple | dict | set | Namespace):
            return self._weigh(value, {})
        return 1

    def _weigh(self, value: Any, seen: dict[int, int]) -> int:
        if isinstance(value, str | bytes):
            return len(value) + ITEM
        if not isinstance(value, list | tuple | dict | set | Namespace):
            return ITEM
        found = self.known.get(id(value)) or seen.get(id(value))
        if found is None:
            seen[id(value)] = ITEM  # a namespace may hold itself
            inside = value._Namespace__attrs if isinstance(value, Namespace) else value
            items: Iterable[Any] = inside
            if isinstance(inside, dict):
                items = (part for pair in inside.items() for part in pair)
            found = seen[id(value)] = ITEM + sum(self._weigh(item, seen) for item in items)
        return found

    def learn(self, inputs: Any) -> None:
        """Weigh what the template is given, once. The caller keeps it alive."""
        self._weigh(inputs, self.known)


def bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def check_bits(left: Any, right: Any, bits: int) -> None:
    if isinstance(left, int) and isinstance(right, int) and bits > MAX_INT_BITS:
        raise LimitExceeded(f"a number would have {bits} bits; the limit is {MAX_INT_BITS}")


def check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER and value == value:
            raise LimitExceeded(f"it passes {value} to a function; the limit is {MAX_NUMBER}")


def sized(args: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    """``args`` with a generator at ``at`` run into a list, so that its length is known."""
    if len(args) <= at or hasattr(args[at], "__len__"):
        return args
    return (*args[:at], list(args[at]), *args[at + 1 :])


def check_percent(meter: Meter, template: str, values: Any) -> None:
    """``template % values``: no widths out of proportion, no multiplication of large values."""
    if re.search(r"%[^%a-zA-Z]*(\*|\d{5})", template):
        raise LimitExceeded("a format string has too large a width")
    meter.grow(len(template) + template.count("%") * meter.weigh(values))


def _check_join(meter: Meter, separator: Any, items: Any) -> None:
    meter.grow(meter.weigh(items) + len(items) * meter.weigh(separator))


def check_method(meter: Meter, name: str, text: str, given: Sequence[Any]) -> None:
    """Refuse, before it happens, a method of str that multiplies its operands."""
    if name == "replace" and len(given) >= 2 and isinstance(given[0], str):
        meter.grow(len(text) + text.count(given[0]) * meter.weigh(given[1]))
    elif name == "join" and given:
        _check_join(meter, text, given[0])
    elif name in ("format", "format_map"):
        if any(spec and ("{" in spec or re.search(r"\d{5}", spec)) for spec in _specs(text)):
            raise LimitExceeded("a format string has too large a width")
        meter.grow(len(text) + text.count("{") * meter.weigh(list(given)))
    elif name == "expandtabs":
        width = given[0] if given and isinstance(given[0], int) else 8
        meter.grow(len(text) + text.count("\t") * abs(width))


def check_filter(meter: Meter, name: str, value: Any, given: Sequence[Any]) -> None:
    """The same for filters."""
    if name == "replace" and len(given) >= 2:
        meter.grow(meter.weigh(value) + str(value).count(str(given[0])) * meter.weigh(given[1]))
    elif name == "join":
        _check_join(meter, given[0] if given else "", value)
    elif name == "format":
        check_percent(meter, str(value), list(given))
    elif name == "indent":
        width = given[0] if given else 4
        meter.grow(
            meter.weigh(value)
            + (str(value).count("\n") + 1) * (width if isinstance(width, int) else meter.weigh(width))
        )
    elif name == "sum" and any(isinstance(start, list | tuple) for start in given):
        raise LimitExceeded("sum adds numbers only")
    elif name == "tojson" and any(isinstance(indent, int) and indent > 16 for indent in given):
        raise LimitExceeded("tojson may indent by 16 at most")


def _specs(template: str) -> list[str | None]:
    try:
        return [spec for _, _, spec, _ in Formatter().parse(template)]
    except ValueError:
        return []  # the format itself will say what is wrong
