"""The formats in which chat models write tool calls and reasoning, and which of them a model has.

``tool_formats.toml`` is the table of formats. ``output_parser.py`` reads answers in them, ``answer_grammar.py`` makes
grammars of them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import msgspec

from truffula.errors import ConfigError


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model writes tool calls. Texts are literal; the grammar writes them exactly, the parser skips whitespace
    at their borders.

    Args:
        syntax: ``json``: objects with a name and arguments; ``named``: the name, then an object; ``tagged``: the name,
            then keys and values between tags; ``pythonic``: a list of Python calls; ``harmony``: messages in channels.
        section: Texts before the first and after the last call.
        begin: Text before each call, or before the list of calls.
        end: Text after each call, or after the list of calls. Optional when parsing.
        between: Text between two calls.
        bare: First character of an answer that is a call without ``begin``.
        list: Whether the calls are a JSON array; the parser accepts one in any case.
        arguments: Key of the arguments of a call in JSON. The parser accepts ``arguments`` and ``parameters``.
        before_name: Text before the name of a call.
        name_prefix: Text that the name starts with.
        name_number: Text between the name and the number of the call.
        after_id: Text before the id of a call, which follows the name. Optional.
        after_name: Text after the name.
        values: Notation of arguments: ``json``, or ``gemma``: bare keys, strings between ``<|"|>``.
        before_key, before_value, after_value: Texts around the key and the value of one argument.
        before_json: Text before values in JSON, where ``before_value`` is before strings only. Without it, the tool's
            schema tells the type of a value.
        newlines: Whether a line break at each border of a value is not part of it.
        close: Text after the last argument.
        ends_reasoning: Whether a call that starts in reasoning ends the reasoning.
        detect: Texts that a chat template of this format has; without any, it is chosen by option only.
            ``detect_not``: texts that it does not have.
    """

    name: str
    syntax: Literal["json", "named", "tagged", "pythonic", "harmony"]
    section: tuple[str, str] | None = None
    begin: str = ""
    end: str = ""
    between: str = ""
    bare: str = ""
    list: bool = False
    arguments: str = "arguments"
    before_name: str = ""
    name_prefix: str = ""
    name_number: str = ""
    after_id: str = ""
    after_name: str = ""
    values: Literal["json", "gemma"] = "json"
    before_key: str = ""
    before_value: str = ""
    before_json: str = ""
    after_value: str = ""
    newlines: bool = False
    close: str = ""
    ends_reasoning: bool = False
    detect: tuple[str, ...] = ()
    detect_not: tuple[str, ...] = ()


class ReasoningFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model marks its reasoning. Whitespace at the borders of reasoning is not part of it.

    Args:
        open, close: Texts before and after the reasoning. Empty: its channel tells it (``harmony``).
        always: Whether an answer starts with reasoning, although nothing opened it.
        after_text: Whether reasoning may also start after text; otherwise only at the start and after calls.
        drop: Texts around the rest of the answer that are not part of it.
        detect, detect_not: As of ``ToolFormat``.
    """

    name: str
    open: str = ""
    close: str = ""
    always: bool = False
    after_text: bool = False
    drop: tuple[str, ...] = ()
    detect: tuple[str, ...] = ()
    detect_not: tuple[str, ...] = ()


class OutputFormat(msgspec.Struct, frozen=True):
    """What the answers of a model look like; None: it has no tool calls, or no reasoning, that is known."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None

    @property
    def described(self) -> str:
        """One line for reports, such as ``tool calls hermes, reasoning think``."""
        tools, reasoning = self.tools, self.reasoning
        return f"tool calls {tools.name if tools else 'none'}, reasoning {reasoning.name if reasoning else 'none'}"


Row = TypeVar("Row", ToolFormat, ReasoningFormat)
_OPERATOR = re.compile(r"(?<!\\)[.^$*+?{}()\[\]|]|\\\w")
_TABLE = tomllib.loads(Path(__file__).with_name("tool_formats.toml").read_text(encoding="utf-8"))


TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {name: msgspec.convert({"name": name, **row}, ToolFormat) for name, row in _TABLE["tools"].items()}
)
REASONING_FORMATS: Mapping[str, ReasoningFormat] = MappingProxyType(
    {name: msgspec.convert({"name": name, **row}, ReasoningFormat) for name, row in _TABLE["reasoning"].items()}
)


def detect_format(
    template: str,
    response_template: Mapping[str, Any] | None = None,
    override_tools: str | None = None,
    override_reasoning: str | None = None,
) -> OutputFormat:
    """The format of a model's answers.

    Args:
        template: Source of the chat template.
        response_template: What tokenizer_config.json has under this name (transformers 5): the format of answers, in
            regular expressions. Where it describes a row of the table, or plain tags, it decides.
        override_tools: Name of a row, ``none`` for no tool calls; None or ``auto``: detect.
        override_reasoning: Likewise.

    Raises ``ConfigError`` for a name that is not in the table.
    """
    found = _from_response(response_template or {})
    tools = found.tools or _detected(template, TOOL_FORMATS)
    reasoning = found.reasoning or _detected(template, REASONING_FORMATS)
    return OutputFormat(
        _chosen(override_tools, TOOL_FORMATS, tools, "tool_format"),
        _chosen(override_reasoning, REASONING_FORMATS, reasoning, "reasoning_format"),
    )


def _chosen(name: str | None, rows: Mapping[str, Row], found: Row | None, param: str) -> Row | None:
    if name in (None, "auto"):
        return found
    if name == "none":
        return None
    if name not in rows:
        flag = "--" + param.replace("_", "-")
        raise ConfigError(f"{flag} is {name!r}; it must be one of auto, none, {', '.join(rows)}.", param=param)
    return rows[name]


def _detected(text: str, rows: Mapping[str, Row]) -> Row | None:
    for row in rows.values():
        if row.detect and all(part in text for part in row.detect) and not any(part in text for part in row.detect_not):
            return row
    return None


def _from_response(spec: Mapping[str, Any]) -> OutputFormat:
    """What a response template says. Its patterns escape the texts that the table looks for."""
    fields = spec.get("fields")
    if not isinstance(fields, Mapping):
        return OutputFormat()
    named = {name: field for name, field in fields.items() if isinstance(field, Mapping)}
    calls = named.get("tool_calls")
    tools = None
    if calls is not None:
        text = re.sub(r"\\([^\w\s])", r"\1", " ".join(_strings(calls)))
        tools = _detected(text, TOOL_FORMATS)
        begin, end = _literal(calls, "open"), _literal(calls, "close")
        if calls.get("content") == "json" and begin and end and "open" in calls:
            known = tools is not None and (tools.begin.strip(), tools.end.strip()) == (begin, end)
            tools = tools if known else ToolFormat(name="response_template", syntax="json", begin=begin, end=end)
    thought = next((named[name] for name in ("reasoning_content", "thinking", "reasoning") if name in named), {})
    opened, closed = _literal(thought, "open"), _literal(thought, "close")
    reasoning = None
    if "<|channel|>" in opened:
        reasoning = REASONING_FORMATS["harmony"]
    elif opened and closed:
        like = _detected(f"{opened} {closed}", REASONING_FORMATS)
        known = like is not None and (like.open.strip(), like.close.strip()) == (opened.strip(), closed)
        reasoning = like if known else ReasoningFormat(name="response_template", open=opened, close=closed)
    return OutputFormat(tools, reasoning)


def _strings(value: Any) -> list[str]:
    found, waiting = [], [value]
    while waiting:  # no recursion: an adapter's file may be nested deeply
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        waiting += reversed([*one.values()] if isinstance(one, Mapping) else one if isinstance(one, list) else [])
    return found


def _literal(field: Mapping[str, Any], key: str) -> str:
    """The literal text of an anchor; "" where it is a pattern with more than whitespace at its end."""
    if isinstance(literal := field.get(key), str):
        return literal
    pattern = field.get(f"{key}_pattern")
    if not isinstance(pattern, str):
        return ""
    plain = pattern.removesuffix(r"\s*")
    return "" if _OPERATOR.search(plain) else re.sub(r"\\(.)", r"\1", plain)
