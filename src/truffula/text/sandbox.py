"""A Jinja environment for templates nobody has read: no access to Python, and a bounded bill.

jinja2's sandbox keeps a template away from Python's internals but lets it burn time and memory: ``range(99999)`` in
nested loops, ``'x' * 10**9``, a string that doubles fifty times, a list that holds itself twice fifty times. Here every
construct that can loop, call or grow goes through a ``Meter`` with limits on steps, wall time, the size of any one
value, and all bytes made. Each single operation in between is bounded by the sizes, so a bomb ends within milliseconds
of a limit. It is done in the code generator and in wrapped filters; nothing runs in another thread or process.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2.ext
from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from truffula.text.growth import (
    LimitExceeded,
    Meter,
    bits,
    check_bits,
    check_filter,
    check_method,
    check_numbers,
    check_percent,
    sized,
)

STR_METHODS = frozenset(
    """
    capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii isdecimal
    isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition
    removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip
    swapcase title upper zfill
    """.split()  # noqa: SIM905  # forty quoted words on forty lines read no better
)


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
            check_bits(left, right, bits(left) + bits(right))
        elif operator == "**":
            check_bits(left, right, bits(left) * abs(right) if isinstance(right, int) else 0)
        elif isinstance(left, str):
            check_percent(meter, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self.meter
        meter.tick()
        check_numbers([*args, *kwargs.values()])
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            args = sized(args, 0) if method.__name__ == "join" else args
            check_method(meter, method.__name__, owner, [*args, *kwargs.values()])
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
            args = sized(args, first) if name == "join" else args
            given = [*args[first + 1 :], *kwargs.values()]
            check_numbers(given)
            for value in [*args[first:], *kwargs.values()]:
                # A namespace may have grown since it was put where it is.
                if isinstance(value, list | tuple | dict | Namespace) and meter.weigh(value) > meter.max_chars:
                    raise LimitExceeded(f"a value would take more than {meter.max_chars} characters")
            check_filter(meter, name, args[first] if len(args) > first else "", given)
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
