"""Lark rules (llguidance's dialect) for the arguments of tool calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from truffula.errors import InvalidRequest
from truffula.items import Tool
from truffula.text.argument_types import resolved, types_of
from truffula.text.constraints import json_rule
from truffula.text.json_schema import WHITESPACE, enforceable
from truffula.text.output_reader import SPACE
from truffula.text.tool_formats import ToolFormat

_SYNTAX = re.compile(r"[\\.+*?()|\[\]{}^$/#&~\-]")
_KEY = re.compile(r"[\w.$-]+")
_OBJECT = frozenset(
    (
        "type",
        "properties",
        "required",
        "additionalProperties",
        "$defs",
        "definitions",
        "title",
        "description",
        "$schema",
    )
)
"""Keywords of a schema that can be enforced where arguments are not JSON."""
_NOTES = frozenset(("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "nullable"))
_STRING = frozenset(("type", "enum", "const", "minLength", "maxLength", "$ref", *_NOTES))


class Rules:
    """Rules of one grammar.

    Args:
        special: Id by text of special tokens. They are matched as tokens.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self.lines: list[str] = []
        self._special = special
        ordered = sorted(special, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of a new rule."""
        name = f"rule{len(self.lines)}"
        self.lines.append(f"{name}{f'[{attributes}]' if attributes else ''}: {body}")
        return name

    def terminal(self, body: str) -> str:
        name = f"TEXT{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def is_token(self, text: str) -> bool:
        return text in self._special

    def split(self, text: str) -> tuple[str, str]:
        """The special token, or the literal text, that ``text`` starts with, and the rest."""
        match = self._tokens.search(text) if self._tokens else None
        if match is None:
            first = text.rstrip(SPACE)
        else:
            first = match[0] if match.start() == 0 else text[: match.start()]
        return first, text[len(first) :]

    def text(self, text: str) -> str:
        """Matches ``text``."""
        parts = []
        while text:
            match = self._tokens.search(text) if self._tokens else None
            start, end = match.span() if match else (len(text), len(text))
            if start:
                parts.append(quoted(text[:start]))
            if match:
                named = re.fullmatch(r"<[^<>\s\[\]]+>", match[0])
                parts.append(match[0] if named else f"<[{self._special[match[0]]}]>")
            text = text[end:]
        return " ".join(parts)

    def around(self, before: str, given: str, after: str) -> str:
        """Matches ``given``, a text of the client, which is no special token, between two texts of the format."""
        return f"{self.text(before)} {quoted(given)} {self.text(after)}"

    def until(self, marker: str) -> str:
        """Matches any text up to and with ``marker``, which is a special token or literal text."""
        if self.is_token(marker):
            return f"/(?s:.*)/ {self.text(marker)}"
        return self.rule(f"/(?s:.*){escaped_regex(marker)}/", "lazy")


def quoted(text: str) -> str:
    """``text`` as a string of Lark."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def escaped_regex(text: str) -> str:
    return _SYNTAX.sub(lambda found: "\\" + found[0], text).replace("\n", "\\n").replace("\t", "\\t")


class ArgumentRules:
    """The arguments of one tool.

    ``exact``: refuse what cannot be enforced. Otherwise such keywords of the schema have no effect.
    """

    def __init__(self, rules: Rules, form: ToolFormat, tool: Tool, *, exact: bool) -> None:
        self._rules = rules
        self._form = form
        self._tool = tool
        self._exact = exact
        self._root: Mapping[str, Any] = tool.parameters or {"type": "object", "additionalProperties": False}

    def whole(self) -> str:
        """A JSON object."""
        root = self._root if "type" in self._root or "$ref" in self._root else {"type": "object", **self._root}
        return self._rules.rule(self._schema(root))

    def tagged(self) -> str:
        """Keys and values between tags."""
        form, rules, parts = self._form, self._rules, []
        for key, schema, required in self._properties():
            item = rules.rule(f"{rules.around(form.before_key, key, '')} {self._tagged_value(key, schema)}")
            parts.append(item if required else f"{item}?")
        return " ".join(parts)

    def listed(self, equals: str, comma: str) -> str:
        """Keys and values between commas."""
        rules, rest, first = self._rules, "", ""
        for key, schema, required in reversed(list(self._properties())):
            item = rules.rule(f"{quoted(key + equals)} {self._listed_value(schema)}")
            next_one = f"{quoted(comma)} {item}"
            if required:
                first, rest = f"{item} {rest}", f"{next_one} {rest}"
            else:
                first = f"{item} {rest} | {first}" if first else f"({item} {rest})?"
                rest = f"({next_one})? {rest}"
            first, rest = rules.rule(first), rules.rule(rest)
        return first

    def _properties(self) -> Iterator[tuple[str, Any, bool]]:
        """Name, schema and whether it is required, of each argument."""
        root = resolved(self._root, self._root)
        root = root if isinstance(root, Mapping) else {}
        known = root.get("properties") or {}
        required = root.get("required") or []
        for keyword in root:
            if keyword not in _OBJECT:
                self._refuse(keyword)
        for name in required:
            if name not in known:
                self._refuse("required", f"{name!r} is not in properties")
        for name, schema in known.items():
            if not _KEY.fullmatch(name):
                self._refuse(f"the name {name!r}")
            yield name, schema, name in required

    def _refuse(self, keyword: str, why: str = "") -> None:
        if self._exact:
            why = why or f"the format {self._form.name}, in which this model writes arguments, cannot express it"
            raise InvalidRequest(
                f"The parameters of tool {self._tool.name!r} cannot be enforced: {keyword}: {why}.", param="tools"
            )

    def _json(self, schema: Any) -> str:
        """The value of one argument in JSON."""
        for reference in re.findall(r'"\$ref": ("(?:[^"\\]|\\.)*")', json.dumps(schema)):
            if not json.loads(reference).startswith(("#/$defs/", "#/definitions/")):
                self._refuse("$ref", f"{reference} is outside of $defs")
        definitions = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        return self._schema({**definitions, **(schema if isinstance(schema, Mapping) else {})})

    def _schema(self, schema: Mapping[str, Any]) -> str:
        try:
            return json_rule(enforceable(schema))
        except InvalidRequest as error:
            if self._exact:
                raise InvalidRequest(
                    f"The parameters of tool {self._tool.name!r} cannot be enforced: {error.message}", param="tools"
                ) from error
        return f"%json {json.dumps({**schema, 'x-guidance': {**WHITESPACE, 'lenient': True}})}"

    def _strings(self, schema: Any) -> list[str] | None:
        """The strings of an ``enum`` or ``const``; None where any string may be."""
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        return None if values is None else [value for value in values if isinstance(value, str)]

    def _branches(self, schema: Any) -> list[Any]:
        """The options of ``anyOf`` and the like, else ``schema`` itself."""
        schema = resolved(schema, self._root)
        if not isinstance(schema, Mapping):
            return [{}]
        for keyword in ("anyOf", "oneOf", "allOf"):
            options = schema.get(keyword)
            if isinstance(options, list) and (keyword != "allOf" or len(options) == 1):
                return [branch for option in options for branch in self._branches(option)]
        return [schema]

    def _tagged_value(self, key: str, schema: Any) -> str:
        """A value and the texts around it."""
        form, rules = self._form, self._rules
        plain, before = rules.text(form.before_value), rules.text(form.before_json or form.before_value)
        options: list[str] = []
        branches = self._branches(schema)
        for index, branch in enumerate(branches):
            types = types_of(branch, self._root)
            if types and "string" not in types:
                later = [kind for other in branches[index:] for kind in types_of(other, self._root)]
                if not form.before_json and set(branch) - _NOTES - {"type"} and "string" in later:
                    self._refuse(f"a string beside other types in {key!r}")
                options.append(f"{before} {rules.rule(self._json(branch))} {rules.text(form.after_value)}")
                continue
            options.append(f"{plain} {self._plain(key, branch, form.after_value)}")
            if "null" in types:
                options.append(f"{before} {rules.text('null' + form.after_value)}")
        return f"({' | '.join(options)})"

    def _plain(self, key: str, schema: Mapping[str, Any], end: str) -> str:
        """A string without quotes, up to and with ``end``."""
        rules = self._rules
        for keyword in schema:
            if keyword not in _STRING:
                self._refuse(f"{keyword} of {key!r}")
        allowed = self._strings(schema)
        if allowed is not None:
            return "(" + " | ".join(rules.around("", value, end) for value in allowed) + ")"
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        marker = end.strip(SPACE)
        before, _, after = end.partition(marker)
        if not low and high is None:
            return f"{rules.until(marker)} {rules.text(after)}"
        size = f"{{{low},{'' if high is None else high}}}"
        value = rules.terminal(f"/(?s:.{size})/ & ~/(?s:.*){escaped_regex(marker)}(?s:.*)/")
        if rules.is_token(marker):
            return f"{value} {rules.text(end)}"
        value = rules.terminal(f"({value}) {quoted(before + marker)}")
        return f"{value} {rules.text(after)}"

    def _listed_value(self, schema: Any) -> str:
        schema_types = types_of(schema, self._root)
        plain = resolved(schema, self._root)
        if self._form.values == "gemma" and schema_types == ["string"] and not set(plain) - _NOTES - {"type", "enum"}:
            quote = '<|"|>'
            allowed = self._strings(plain)
            if allowed is None:
                return f"{self._rules.text(quote)} {self._rules.until(quote)}"
            return "(" + " | ".join(self._rules.around(quote, value, quote) for value in allowed) + ")"
        return self._rules.rule(self._json(schema))
