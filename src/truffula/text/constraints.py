"""Constraints to Lark text in llguidance's dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest
from truffula.items import Constraint
from truffula.json_text import json_value
from truffula.text.json_schema import WHITESPACE, Schema, enforceable, regex_problem
from truffula.text.lark import check_lark, renamed
from truffula.text.structural_tags import structural_rules

MAX_CHOICES = 10_000
MAX_CHARS = 1 << 17
"""Of a regular expression or a grammar."""
MAX_JSON_CHARS = 1 << 20
_IN_LARK: Mapping[str, str] = MappingProxyType({"/": r"\/", r"\d": "[0-9]", r"\D": "[^0-9]"})
"""Parts of a regular expression that are written otherwise: digits are those of ASCII."""
_GBNF = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_ESCAPE = re.compile(r"\\\\|\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")


def rules_of(constraint: Constraint, root: str = "start") -> str:
    """The Lark text (llguidance's dialect) whose rule ``root`` matches what ``constraint`` allows.

    ``root`` is lower case; other names in the text begin with it, unless they are the client's. Raises
    ``InvalidRequest`` without a param.
    """
    value = constraint.value
    if len(value) > (most := MAX_CHARS if constraint.kind in ("regex", "lark") else MAX_JSON_CHARS):
        raise InvalidRequest(f"The constraint has {len(value)} characters; the limit is {most}.")
    if constraint.kind == "json_object":
        return f"{root}: {json_rule({'type': 'object'})}\n"
    if constraint.kind == "json_schema":
        return f"{root}: {json_rule(enforceable(decoded(value)))}\n"
    if constraint.kind == "regex":
        return f"{root}: {regex_rule(value)}\n"
    if constraint.kind == "choice":
        return _choice(decoded(value), root)
    if constraint.kind == "structural_tag":
        return structural_rules(
            decoded(value), root, json_rule=lambda schema: json_rule(enforceable(schema)), regex_rule=regex_rule
        )
    lark = from_gbnf(value) if _GBNF.search(value) else value
    check_lark(lark)
    return lark if root == "start" else renamed(lark, root)


def from_gbnf(text: str) -> str:
    """A grammar in the EBNF of llama.cpp and xgrammar (``root ::= ...``), as Lark."""
    from llguidance.gbnf_to_lark import gbnf_to_lark  # for text workers only

    try:
        return gbnf_to_lark(_ESCAPE.sub(_character, text)).removeprefix("%llguidance {}")
    except Exception as error:
        raise InvalidRequest(f"The EBNF grammar is not valid: {str(error)[:300]}.") from error


def _character(escape: re.Match[str]) -> str:
    """An escape by number as the library reads it right: ASCII in two digits, other characters themselves."""
    if escape[0].startswith("\\\\"):
        return escape[0]
    code = int(escape[1] or escape[2] or escape[3], 16)
    return f"\\x{code:02x}" if code < 128 else chr(code)


def json_rule(schema: Schema) -> str:
    """What a Lark rule matches for a schema from ``enforceable``."""
    if schema is False:
        raise InvalidRequest("The schema is false, which no value meets.")
    options = {} if schema is True else schema
    return f"%json {json.dumps({**options, 'x-guidance': dict(WHITESPACE)})}"


def regex_rule(pattern: str) -> str:
    """What a Lark rule matches for a regular expression of Rust's syntax, with anchors at its ends only."""
    if problem := regex_problem(pattern):
        raise InvalidRequest(f"The regular expression {pattern[:100]!r} {problem}.")
    if not pattern:
        raise InvalidRequest("The regular expression is empty.")
    escaped = re.sub(r"\\.|/", lambda found: _IN_LARK.get(found[0], found[0]), pattern, flags=re.DOTALL)
    return f"/{escaped}/".replace("\n", r"\n")


def _choice(values: Any, root: str) -> str:
    if not isinstance(values, list) or not values or not all(isinstance(one, str) and one for one in values):
        raise InvalidRequest("A choice is a list of strings that are not empty, with at least one.")
    distinct = list(dict.fromkeys(values))
    if len(distinct) > MAX_CHOICES:
        raise InvalidRequest(f"The choice has {len(distinct)} strings; the limit is {MAX_CHOICES}.")
    listed = " | ".join(json.dumps(one).replace("\x7f", "\\u007f") for one in distinct)
    terminal = f"{root.upper()}_CHOICE"
    return f"{root}: {terminal}\n{terminal}: {listed}\n"


def decoded(text: str) -> Any:
    try:
        return json_value(text)
    except ValueError as error:
        raise InvalidRequest(f"The value is not valid JSON: {error}.") from error
