"""A Jinja environment for templates nobody has read: no access to Python, and a bounded bill.

jinja2's sandbox keeps a template away from Python's internals but lets it burn time and memory: ``range(99999)`` in
nested loops, ``'x' * 10**9``, a string that doubles fifty times, a list that holds itself twice fifty times. Here every
construct that can loop, call or grow goes through a ``Meter`` with limits on steps, wall time, the size of any one
value, and all bytes made. Each single operation in between is bounded by the sizes, so a bomb ends within milliseconds
of a limit. It is done in the code generator and in wrapped filters; nothing runs in another thread or process.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import wraps
from string import Formatter
from typing import Any

import jinja2.ext
from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 500_000
MAX_INT_BITS = 8192
MAX_NUMBER = 100_000  # of a number given to a filter or a method: widths, counts, precisions
MAX_WIDTH = 10_000
ITEM = 4  # characters that an item of a list is counted as, besides its text
STR_METHODS = frozenset(
    """
    capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii isdecimal
    isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition
    removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip
    swapcase title upper zfill
    """.split()  # noqa: SIM905  # forty quoted words on forty lines read no better
)


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
            raise LimitExceeded(f"a value would grow to {chars} characters; {self.max_chars} are allowed")
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


class MeteredGenerator(CodeGenerator):
    """Puts a call to the environment where the generated Python would loop, join or build by itself."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        join = "markup_join" if frame.eval_ctx.autoescape or frame.eval_ctx.volatile else "str_join"
        self.write(f"environment.bounded_join({join}, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._checked(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._checked(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._checked(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._checked(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _checked(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.checked(")
        visit(node, frame)
        self.write(")")


class Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}`` marks what the assistant said, for training; here it is only its
    content.
    """

    tags = {"generation"}  # noqa: RUF012  # jinja2's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class PlainNamespace(Namespace):
    """Refuses names with an underscore in front, which would reach Python's protocols (``__html__``)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute may not begin with an underscore, as {name!r} does")


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """One for all templates of a model; each rendering thread has its own ``Meter``."""

    code_generator_class = MeteredGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
            # Folding constants would run filters while compiling, where nothing is metered; so would finalize without a
            # context.
            optimized=False,
            finalize=_finalize,
        )
        self._local = threading.local()
        for name in ("urlize", "xmlattr", "random", "wordwrap", "pprint"):
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = to_json
        self.filters = {name: self._metered(name, function) for name, function in self.filters.items()}
        self.tests = {name: self._timed(function) for name, function in self.tests.items()}
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": PlainNamespace,
        }

    @property
    def meter(self) -> Meter:
        meter: Meter = self._local.meter
        return meter

    def metered_by(self, meter: Meter) -> None:
        """Everything this thread renders from now on is on this bill."""
        self._local.meter = meter

    def tick(self) -> None:
        """Called by generated code at each turn of a loop."""

    def checked(self, value: Any) -> Any:
        """``value``, which was just made, if it is not too large."""
        meter = self.meter
        meter.tick()
        meter.grow(meter.weigh(value))
        return value

    def bounded_join(self, join: Callable[[Sequence[Any]], str], parts: Sequence[Any]) -> str:
        meter = self.meter
        meter.tick()
        meter.grow(sum(map(meter.weigh, parts)))
        return join(parts)

    def concat(self, parts: Iterable[str]) -> str:
        """Join the buffer of a macro or a block."""
        buffer = list(parts)
        self.meter.grow(sum(map(len, buffer)))
        return "".join(buffer)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        meter.tick()
        if operator == "+":
            if isinstance(left, str | bytes | list | tuple):
                meter.grow(meter.weigh(left) + meter.weigh(right))
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    meter.grow(meter.weigh(value) * max(times, 0))
            _check_bits(left, right, _bits(left) + _bits(right))
        elif operator == "**":
            _check_bits(left, right, _bits(left) * abs(right) if isinstance(right, int) else 0)
        elif isinstance(left, str):
            _check_percent(meter, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self.meter
        meter.tick()
        _check_numbers([*args, *kwargs.values()])
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            args = _sized(args, 0) if method.__name__ == "join" else args
            _check_method(meter, method.__name__, owner, [*args, *kwargs.values()])
        return __self.checked(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and callable(value) and attr not in STR_METHODS:
            return False
        if isinstance(obj, bytes) or attr == "to_bytes":
            return False
        return super().is_safe_attribute(obj, attr, value)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # What jinja2 passes first (context, environment) is not the template's value.
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            meter = self.meter
            meter.tick()
            args = _sized(args, first) if name == "join" else args
            given = [*args[first + 1 :], *kwargs.values()]
            _check_numbers(given)
            for value in [*args[first:], *kwargs.values()]:
                # A namespace may have grown since it was put where it is.
                if isinstance(value, list | tuple | dict | Namespace) and meter.weigh(value) > meter.max_chars:
                    raise LimitExceeded(f"a value would take more than {meter.max_chars} characters")
            _check_filter(meter, name, args[first] if len(args) > first else "", given)
            return self.checked(function(*args, **kwargs))

        return filtered

    def _timed(self, function: Any) -> Callable[..., bool]:
        @wraps(function)
        def tested(*args: Any, **kwargs: Any) -> bool:
            self.meter.tick()
            return bool(function(*args, **kwargs))

        return tested


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """What ``{{ … }}`` writes: anything but text is weighed before it becomes text."""
    environment = context.environment
    assert isinstance(environment, MeteredEnvironment)
    return value if isinstance(value, str) else environment.checked(value)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_bits(left: Any, right: Any, bits: int) -> None:
    if isinstance(left, int) and isinstance(right, int) and bits > MAX_INT_BITS:
        raise LimitExceeded(f"a number would have {bits} bits; {MAX_INT_BITS} are allowed")


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER and value == value:
            raise LimitExceeded(f"it calls something with {value}; {MAX_NUMBER} is the limit")


def _sized(args: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    """``args`` with a generator at ``at`` run into a list, so that its length is known."""
    if len(args) <= at or hasattr(args[at], "__len__"):
        return args
    return (*args[:at], list(args[at]), *args[at + 1 :])


def _check_percent(meter: Meter, template: str, values: Any) -> None:
    """``template % values``: no widths out of proportion, no multiplication of large values."""
    if re.search(r"%[^%a-zA-Z]*(\*|\d{5})", template):
        raise LimitExceeded("a format asks for too great a width")
    meter.grow(len(template) + template.count("%") * meter.weigh(values))


def _check_join(meter: Meter, separator: Any, items: Any) -> None:
    meter.grow(meter.weigh(items) + len(items) * meter.weigh(separator))


def _check_method(meter: Meter, name: str, text: str, given: Sequence[Any]) -> None:
    """Refuse, before it happens, a method of str that multiplies its operands."""
    if name == "replace" and len(given) >= 2 and isinstance(given[0], str):
        meter.grow(len(text) + text.count(given[0]) * meter.weigh(given[1]))
    elif name == "join" and given:
        _check_join(meter, text, given[0])
    elif name in ("format", "format_map"):
        if any(spec and ("{" in spec or re.search(r"\d{5}", spec)) for spec in _specs(text)):
            raise LimitExceeded("a format asks for too great a width")
        meter.grow(len(text) + text.count("{") * meter.weigh(list(given)))
    elif name == "expandtabs":
        width = given[0] if given and isinstance(given[0], int) else 8
        meter.grow(len(text) + text.count("\t") * abs(width))


def _check_filter(meter: Meter, name: str, value: Any, given: Sequence[Any]) -> None:
    """The same for filters."""
    if name == "replace" and len(given) >= 2:
        meter.grow(meter.weigh(value) + str(value).count(str(given[0])) * meter.weigh(given[1]))
    elif name == "join":
        _check_join(meter, given[0] if given else "", value)
    elif name == "format":
        _check_percent(meter, str(value), list(given))
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


def raise_exception(message: str) -> None:
    """For templates: refuse the messages."""
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(form: str) -> str:
    """For templates: the local time of day."""
    return datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as written for a model: no HTML escapes, unlike jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
