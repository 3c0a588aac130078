"""Structural tags (vLLM's and xgrammar's): free text with tagged parts in it that follow a grammar, as Lark rules."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest

MAX_FORMATS = 1000
ANY_TEXT = r"/(.|\n)*/"
_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "const_string": "value",
        "json_schema": "json_schema",
        "regex": "pattern",
        "sequence": "elements",
        "or": "elements",
        "tag": "begin content end",
        "triggered_tags": "triggers tags at_least_one stop_after_first",
        "tags_with_separator": "tags separator at_least_one stop_after_first",
    }
)
"""The formats, and their keys beside ``type``."""


def structural_rules(
    value: Any, root: str, *, json_rule: Callable[[Any], str], regex_rule: Callable[[str], str]
) -> str:
    """Lark rules for a structural tag, the older form with ``structures`` and ``triggers`` or the one with ``format``.

    Raises ``InvalidRequest`` without a param.
    """
    if not isinstance(value, Mapping) or value.get("type", "structural_tag") != "structural_tag":
        raise InvalidRequest("A structural tag is an object with type 'structural_tag'.")
    rules = _Rules(root, json_rule, regex_rule)
    if "format" in value:
        body = rules.of(value["format"])
    else:
        tags = []
        for one in _objects(value.get("structures"), "structures"):
            _check_keys(one, ("begin", "schema", "end"), "a structure")
            content = {"type": "json_schema", "json_schema": one.get("schema")}
            tags.append({"begin": one.get("begin"), "content": content, "end": one.get("end")})
        body = rules.of({"type": "triggered_tags", "triggers": value.get("triggers"), "tags": tags})
    return "\n".join([f"{root}: {body}", f"{root.upper()}_TEXT: {ANY_TEXT}", *rules.lines, ""])


def _check_keys(form: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    for key, value in form.items():
        if key not in known and value not in (None, False, [], ""):
            raise InvalidRequest(f"{key[:64]!r} of {what} of the structural tag is not supported; leave it out.")


def _objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        raise InvalidRequest(f"{name} of the structural tag must be a list of objects that is not empty.")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{name} of the structural tag must be a string that is not empty.")
    return json.dumps(value).replace("\x7f", "\\u007f")


class _Rules:
    """Rules of one structural tag; ``lines`` are those beside the root."""

    def __init__(self, root: str, json_rule: Callable[[Any], str], regex_rule: Callable[[str], str]) -> None:
        self._root = root
        self._json_rule = json_rule
        self._regex_rule = regex_rule
        self.lines: list[str] = []

    def of(self, form: Any) -> str:
        """The name of the rule for one ``format``."""
        kind = form.get("type") if isinstance(form, Mapping) else None
        if not isinstance(kind, str) or kind not in _KEYS:
            raise InvalidRequest(
                f"{str(kind)[:40]!r} is not a format of structural tags that this server knows: {', '.join(_KEYS)}."
            )
        _check_keys(form, ("type", *_KEYS[kind].split()), kind)
        if kind == "json_schema":
            return self._rule(self._json_rule(form.get("json_schema")))
        if kind == "regex":
            return self._rule(self._regex_rule(str(form.get("pattern"))))
        if kind == "const_string":
            return self._rule(_text(form.get("value"), "value"))
        if kind in ("sequence", "or"):
            parts = [self.of(one) for one in _objects(form.get("elements"), "elements")]
            return self._rule((" " if kind == "sequence" else " | ").join(parts))
        if kind == "tag":
            return self._rule(f"{_text(form.get('begin'), 'begin')} {self._content(form)}")
        if kind == "triggered_tags":
            return self._triggered(form)
        return self._separated(form)

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"{self._root}_{len(self.lines)}"
        if len(self.lines) >= MAX_FORMATS:
            raise InvalidRequest(f"The structural tag has more than {MAX_FORMATS} parts.")
        self.lines.append(f"{name}{attributes}: {body}")
        return name

    def _content(self, tag: Mapping[str, Any]) -> str:
        """What follows the beginning of a tag: its content and its end."""
        content, end = tag.get("content"), tag.get("end")
        if isinstance(content, Mapping) and content.get("type") == "any_text":
            return self._rule(f"{self._root.upper()}_TEXT {_text(end, 'end')}", "[lazy]")
        return f"{self.of(content)} {_text(end, 'end') if end else ''}"

    def _triggered(self, form: Mapping[str, Any]) -> str:
        """Free text in which each trigger begins one of its tags."""
        triggers = form.get("triggers")
        if not isinstance(triggers, list) or not triggers:
            raise InvalidRequest("triggers of the structural tag must be a list of strings that is not empty.")
        by_trigger: dict[str, list[str]] = {one: [] for one in triggers if _text(one, "a trigger")}
        for tag in _objects(form.get("tags"), "tags"):
            _check_keys(tag, ("type", *_KEYS["tag"].split()), "a tag")
            begin = tag.get("begin")
            _text(begin, "begin")
            fitting = [one for one in by_trigger if str(begin).startswith(one)]
            if len(fitting) != 1:
                raise InvalidRequest(
                    f"begin {str(begin)[:60]!r} of the structural tag must start with exactly one of the triggers."
                )
            rest = str(begin)[len(fitting[0]) :]
            by_trigger[fitting[0]].append(f"{_text(rest, 'begin') if rest else ''} {self._content(tag)}")
        options = []
        for trigger, bodies in by_trigger.items():
            if bodies:
                head = self._rule(f"{self._root.upper()}_TEXT {_text(trigger, 'a trigger')}", "[lazy]")
                options.append(self._rule(f"{head} ({' | '.join(bodies)})"))
        if form.get("stop_after_first"):
            once = self._rule(" | ".join(options))
            return once if form.get("at_least_one") else self._rule(f"{once} | {self._root.upper()}_TEXT")
        tail = self._rule(f"{self._root.upper()}_TEXT")
        repeat = "+" if form.get("at_least_one") else "*"
        return self._rule(f"({' | '.join(options)}){repeat} {tail}")

    def _separated(self, form: Mapping[str, Any]) -> str:
        """Tags with a separator between them, and no free text."""
        tags = [self.of({"type": "tag", **one}) for one in _objects(form.get("tags"), "tags")]
        one = self._rule(" | ".join(tags))
        if form.get("stop_after_first"):
            many = one
        else:
            separator = form.get("separator")
            between = _text(separator, "separator") if separator else ""
            many = self._rule(f"{one} ({between} {one})*")
        return many if form.get("at_least_one") else self._rule(f"{many}?")
