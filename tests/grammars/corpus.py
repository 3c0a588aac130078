"""Schemas, regular expressions and grammars that the tests of this folder use.

``suite/`` holds the JSON-Schema-Test-Suite's cases of draft 2020-12, with their licence.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from walker import compiled

from truffula.errors import InvalidRequest

SUITE = Path(__file__).parent / "suite"


class Case(NamedTuple):
    """A schema of the suite and its instances: description, data, valid."""

    name: str
    schema: Any
    tests: list[tuple[str, Any, bool]]


def suite() -> list[Case]:
    return [
        Case(
            f"{path.stem}: {group['description']}",
            group["schema"],
            [(test["description"], test["data"], test["valid"]) for test in group["tests"]],
        )
        for path in sorted(SUITE.glob("*.json"))
        for group in json.loads(path.read_text(encoding="utf-8"))
    ]


@functools.cache
def compiled_suite() -> list[tuple[Case, str | InvalidRequest]]:
    """Each case, with its grammar or with why there is none."""
    found: list[tuple[Case, str | InvalidRequest]] = []
    for case in suite():
        try:
            found.append((case, compiled("json_schema", case.schema)))
        except InvalidRequest as error:
            found.append((case, error))
    return found


def record(**properties: Any) -> dict[str, Any]:
    """An object as OpenAI's strict mode describes it."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


STR, INT, NUM, BOOL = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
SHORT = {"type": "string", "maxLength": 8}
_BOUNDS: list[dict[str, Any]] = [
    {"minimum": 0}, {"maximum": 0}, {"minimum": -5, "maximum": 5}, {"minimum": 17, "maximum": 1234},
    {"exclusiveMinimum": 0, "exclusiveMaximum": 2}, {"minimum": 1, "maximum": 1}, {"multipleOf": 7},
    {"multipleOf": 5, "minimum": 0, "maximum": 100}, {"minimum": -1000, "maximum": -999}, {"exclusiveMaximum": -10},
    {"minimum": 2**40, "maximum": 2**41}, {"minimum": -(2**63), "maximum": 2**63 - 1},
]  # fmt: skip
_NUMBERS = [{"type": kind, **bounds} for kind in ("integer", "number") for bounds in _BOUNDS]
_NUMBERS += [
    {"type": "number", "minimum": 0.5, "maximum": 0.75},
    {"type": "number", "exclusiveMinimum": -0.1, "maximum": 0.1},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 10},
    {"type": "number", "multipleOf": 0.01},
    *({"type": "integer", "format": name} for name in ("int8", "uint8", "int32", "uint32", "int64", "uint64")),
    {"type": "number", "format": "double"},
    {"minimum": 1, "exclusiveMinimum": True, "maximum": 3, "type": "number"},
]
_STRINGS: list[dict[str, Any]] = [
    {"type": "string", "minLength": low, "maxLength": high} for low, high in ((0, 0), (1, 1), (2, 5), (10, 12))
]
_STRINGS += [
    {"type": "string", "pattern": pattern}
    for pattern in (
        "^[a-z]{2,4}$", "^\\d{3}-\\d{4}$", "^(red|green|blue)$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$", "^$|^x+$",
        "^#[0-9a-fA-F]{6}$",
        "^[^\"\\\\]{1,3}$", "^\\S{1,4}$", "^[\\w.]{1,5}@[\\w]{1,4}\\.com$", "^a.c$", "^(?:ab)+$", "^é{1,2}$",
    )
]  # fmt: skip
_STRINGS += [
    {"type": "string", "format": name}
    for name in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
]
_STRINGS += [
    {"type": "string", "pattern": "^[ab]*$", "maxLength": 6},
    {"type": "string", "format": "date", "pattern": "^20"},
    {"type": ["string", "null"], "maxLength": 4},
    {"enum": ["a", "b\n", 'c"', "é", "\\", "tab\t"]},
    {"enum": [1, 2.5, None, True, "x", [], {}, [1, {"a": "b"}]]},
    {"const": {"a": [1, 2], "b": None}},
    {"const": "constant"},
]
_ARRAYS: list[dict[str, Any]] = [
    {"type": "array", "items": item, **bounds}
    for item in (INT, SHORT, {"type": "array", "items": BOOL, "maxItems": 2})
    for bounds in ({"maxItems": 0}, {"minItems": 1, "maxItems": 1}, {"minItems": 2, "maxItems": 4}, {"maxItems": 3})
]
_ARRAYS += [
    {"type": "array", "prefixItems": [INT, BOOL], "items": False},
    {"type": "array", "prefixItems": [INT, BOOL], "items": SHORT, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": [INT, BOOL], "additionalItems": False},
    {"type": "array", "items": [INT], "additionalItems": {"type": "null"}, "maxItems": 3},
]
_OBJECTS: list[dict[str, Any]] = [
    record(),
    record(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    record(first=BOOL, second=record(third=BOOL, fourth={"type": "null"})),
    record(items={"type": "array", "items": record(id=INT, tag={"enum": ["x", "y"]}), "maxItems": 3}),
    {"type": "object", "properties": {"a": BOOL, "b": BOOL, "c": BOOL}, "additionalProperties": False},
    {"type": "object", "properties": {"a": BOOL, "b": BOOL}, "required": ["b"], "additionalProperties": False},
    {"type": "object", "properties": {"a": BOOL, "b": BOOL}, "minProperties": 1, "additionalProperties": False},
    {"type": "object", "properties": {"a": BOOL, "b": BOOL}, "maxProperties": 1, "additionalProperties": False},
    {"type": "object", "additionalProperties": BOOL, "maxProperties": 2},
    {"type": "object", "additionalProperties": BOOL, "minProperties": 1, "maxProperties": 3},
    {"type": "object", "properties": {"a": INT}, "required": ["a"], "minProperties": 2, "additionalProperties": BOOL},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": SHORT},
    {"type": "object", "patternProperties": {"^x-": BOOL}, "additionalProperties": False, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^n": INT, "^s": SHORT}, "additionalProperties": False},
    {"type": "object", "required": ["a b", 'c"d', "é/~"], "additionalProperties": BOOL, "maxProperties": 3},
    {"type": "object", "properties": {"never": False, "some": BOOL}, "additionalProperties": False},
    {"properties": {"a": BOOL}, "required": ["a"], "type": ["object", "null"], "additionalProperties": False},
    {
        "title": "T",
        "description": "D",
        "examples": [1],
        "default": {},
        "x-order": 3,
        "deprecated": True,
        **record(a=BOOL),
    },
    {
        "type": "object",
        "nullable": False,
        "uniqueItems": False,
        "properties": {"a": BOOL},
        "additionalProperties": False,
    },
]
_COMBINED: list[dict[str, Any]] = [
    {"anyOf": [INT, BOOL, {"type": "null"}]},
    {"anyOf": [record(kind={"const": "a"}, x=INT), record(kind={"const": "b"}, y=SHORT)]},
    {"oneOf": [record(kind={"const": "a"}, x=INT), record(kind={"const": "b"}, y=SHORT)]},
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "boolean"}]},
    {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {
            "cat": record(kind={"const": "cat"}, lives={"type": "integer", "maximum": 9}),
            "dog": record(kind={"$ref": "#/$defs/name"}, barks={"type": "boolean"}),
            "name": {"enum": ["dog", "hound"]},
        },
    },
    {"oneOf": [{"const": "a"}, {"const": "b"}, {"const": "c"}]},
    {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
    {"allOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"},
    {"allOf": [record(a=BOOL), {"properties": {"a": {"const": True}}}]},
    {"$ref": "#/$defs/color", "$defs": {"color": {"enum": ["red", "blue"]}}},
    {"$ref": "#/definitions/p", "definitions": {"p": record(x=INT, y=INT)}},
    {"$ref": "#named", "$defs": {"any name": {"$anchor": "named", "type": "boolean"}}},
    {"$id": "https://example.com/s", "$ref": "https://example.com/s#/$defs/a", "$defs": {"a": BOOL}},
    {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": BOOL}},
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    {
        "$ref": "#/$defs/list",
        "$defs": {"list": {"anyOf": [{"type": "null"}, record(head=BOOL, tail={"$ref": "#/$defs/list"})]}},
    },
    record(a={"$ref": "#/properties/b"}, b={"type": "integer", "minimum": 1, "maximum": 2}),
    {"type": ["integer", "boolean"], "maximum": 10, "minimum": 0},
    {"type": "string", "allOf": [{"pattern": "a"}, {"pattern": "b"}], "maxLength": 4},
]  # fmt: skip
SCHEMAS: list[dict[str, Any]] = [*_NUMBERS, *_STRINGS, *_ARRAYS, *_OBJECTS, *_COMBINED]
"""Schemas that are accepted."""

REGEXES: list[str] = [
    "a\nb",
    *r"""
a
abc
a|b
(a|b)c
[abc]
[^abc]
[a-f0-9]{4}
a{3}
a{2,4}
a{2,}
a*b
a+b
ab?c
(ab)+
(?:ab|cd){1,2}
\d{3}-\d{4}
\w{1,5}
\s?x
\S{2}
\D\W
[A-Z][a-z]{1,5}
yes|no|maybe
^anchored$
^a|b$
\Aab\z
a/b
a\/b
\.\*\+\?\(\)\[\]\{\}\|\^\$\\
[\]\-\\^]+
[-+]?\d+(\.\d+)?
#[0-9a-fA-F]{6}
\(\d{3}\) \d{3}-\d{4}
(?i)hello
(?s).{1,3}
.{1,4}
é+
[à-ü]{1,3}
日本{1,2}
\u00e9
\x41{2}
\t\n\r
"[^"]*"
(a(b(c)?)?)?d
(0|[1-9]\d{0,3})
(\d{1,3}\.){3}\d{1,3}
(Mon|Tue|Wed), \d{1,2} (Jan|Feb)
v\d+\.\d+\.\d+(-[a-z]+)?
[^\n]{0,5}\n
x{0,1}y{1,1}z{0,3}
(?:a|ab)(?:c|bcd)
[ab]*a[ab]{3}
\p{Lu}\p{Ll}+
<(b|i)>[a-z ]*</(b|i)>
""".strip().split("\n"),
]

GRAMMARS: list[tuple[str, list[str], list[str]]] = [
    ('start: "a"', ["a"], ["", "b", "aa"]),
    ('start: "a" | "b"', ["a", "b"], ["ab"]),
    ('start: "a" "b"', ["ab"], ["a", "a b"]),
    ('start: "a"+', ["a", "aaa"], ["", "b"]),
    ('start: "a"* "b"', ["b", "aab"], ["a"]),
    ('start: "a"? "b"', ["b", "ab"], ["aab"]),
    ('start: ["a"] "b"', ["b", "ab"], ["aab"]),
    ('start: "a"{2,3}', ["aa", "aaa"], ["a", "aaaa"]),
    ('start: ("a" | "b") "c"', ["ac", "bc"], ["abc"]),
    ("start: /[a-c]+/", ["abc"], ["d", ""]),
    ("start: NAME\nNAME: /[a-z]+/", ["abc"], ["1"]),
    ('start: item ("," item)*\nitem: /[0-9]+/', ["1", "1,22"], ["1,", ",1"]),
    ('start: "(" start ")" | "x"', ["x", "((x))"], ["(x", "()"]),
    ('?start: sum\nsum: product | sum "+" product\nproduct: /[0-9]/ | product "*" /[0-9]/', ["1+2*3"], ["1+", "12"]),
    ('start: "a" "b"\n%ignore " "', ["ab", "a b"], ["a"]),
    ('start: A B\nA: "x"i\nB: "y"', ["xy", "Xy"], ["xY"]),
    ('start: pair+\npair: KEY "=" VALUE ";"\nKEY: /[a-z]+/\nVALUE: /[0-9]+/', ["a=1;b=2;"], ["a=;", "a=1"]),
    ('// a comment\nstart: a // another\n  | b\na: "1"\nb: "2"', ["1", "2"], ["3"]),
    ('start: "<" NAME ">" start* "</>" | /[a-z]/\nNAME: /[a-z]+/', ["<a>b</>", "<a></>"], ["<a>", "<>a</>"]),
    ('start: %json {"type": "boolean"} "!"', ["true!"], ["true", "1!"]),
    ('root ::= "a" [0-9]+ (" " item)*\nitem ::= "x" | "y"', ["a1", "a12 x y"], ["a", "a1 z"]),
    ('root ::= "\\u00e9" [\\u0061-\\u0063]', ["éa"], ["ea", "éd"]),
]
"""A grammar, texts that it matches, and texts that it does not."""
