"""The Jinja environment of chat templates: jinja2's own sandbox, with the functions that transformers gives templates.

The sandbox keeps a template away from Python's internals; it bounds neither time nor memory. A server therefore renders
in its own process only what ``plain_template`` accepts, and everything else in a text worker, which is killed at its
limits. In a program that uses ``LLM``, templates run in the caller's process, without limits.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}`` marks an assistant's text for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def template_environment() -> ImmutableSandboxedEnvironment:
    """A new environment with transformers' settings, filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def raise_exception(message: str) -> None:
    """For templates: reject the messages."""
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
