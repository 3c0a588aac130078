"""Constraints that cannot be enforced are refused with the keyword and its place."""

import json

import pytest
from walker import compiled

from truffula.errors import InvalidRequest

SCHEMAS = [
    ({"not": {"type": "string"}}, "not at #/not"),
    ({"properties": {"a": {"if": {}, "then": {}}}}, "if at #/properties/a/if"),
    ({"items": {"dependentSchemas": {"a": {}}}}, "dependentSchemas at #/items/dependentSchemas"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties at #"),
    ({"$dynamicRef": "#x"}, "$dynamicRef at #"),
    ({"uniqueItems": True}, "uniqueItems at #/uniqueItems"),
    ({"contains": {}}, "contains at #"),
    ({"propertyNames": {"maxLength": 3}}, "propertyNames at #"),
    ({"format": "iri"}, "format at #/format: 'iri'"),
    ({"type": "string", "format": "int32"}, "format at #/format"),
    ({"nullable": True, "type": "string"}, 'nullable at #/nullable: use "type": [..., "null"]'),
    ({"$ref": "https://example.com/schema"}, "$ref at #/$ref: 'https://example.com/schema' is another document"),
    ({"$ref": "file:///etc/passwd"}, "$ref at #/$ref"),
    ({"$ref": "#/$defs/none"}, "$ref at #/$ref: '#/$defs/none' names no schema"),
    ({"$ref": 5}, "#/$ref"),
    ({"$defs": {"a": {"$id": "b"}}, "$ref": "#/$defs/a"}, "$id at #/$defs/a"),
    (
        {"propertees": {}},
        "'propertees' at #/propertees is not a keyword of JSON Schema that this server knows",
    ),
    ({"type": "text"}, "#/type is 'text'"),
    ({"type": "object", "properties": []}, "#/properties"),
    ({"required": "a"}, "#/required"),
    ({"maxLength": -1}, "#/maxLength is -1"),
    ({"minItems": 1.5}, "#/minItems is 1.5"),
    ({"minimum": "0"}, "#/minimum"),
    ({"multipleOf": 0}, "#/multipleOf is 0"),
    ({"pattern": 5}, "#/pattern"),
    ({"pattern": "\\"}, "pattern at #/pattern: '\\\\' ends with a backslash"),
    ({"pattern": "(?=a)"}, "pattern: regex parse error"),
    ({"pattern": "a{1,1000000}"}, "pattern at #/pattern"),
    ({"properties": {"a": {"pattern": "("}}}, "at #/properties/a: pattern"),
    ({"patternProperties": {"a": {}, "b": {}}}, "patternProperties"),
    ({"properties": {"a": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}}, "at #/properties/a: oneOf"),
    ({"minProperties": 2}, "minProperties at #"),
    ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, "minProperties, maxProperties"),
    ({"const": 2**53 + 1}, "#/const"),
    ({"enum": [0.1234567890123456]}, "#/enum"),
    ({"const": "\0"}, "#/const has the control character U+0000"),
    ({"minimum": 1e300}, "#/minimum"),
    ({"items": 5}, "#/items is a JSON number"),
    ("text", "# is a JSON string"),
    ({"allOf": []}, "#/allOf must be a list of schemas"),
    ({"enum": []}, "#/enum must be a list"),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {}]}}},
        "$ref at #/$defs/a: it refers to itself",
    ),
    ({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"oneOf": [{}, {}]}}}, "at #/$defs/a: oneOf"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "not at #/not"),
]
NODE = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}
IMPOSSIBLE = [
    False,
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/$defs/n", "$defs": {"n": NODE}},
    {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
    {"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": NODE}},
    {"anyOf": [False, False]},
    {"type": "string", "enum": [1, 2]},
    {"type": "string", "minLength": 3, "maxLength": 2},
    {"type": "integer", "minimum": 3, "maximum": 2},
    {"type": "integer", "minimum": 1.2, "maximum": 1.8},
    {"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 4},
    {"type": "array", "minItems": 3, "maxItems": 2, "items": {}},
    {"type": "object", "required": ["a"], "additionalProperties": False},
    {"type": "object", "required": ["a"], "properties": {"a": False}},
    {"type": "object", "minProperties": 1, "maxProperties": 0},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "string", "pattern": "^a$", "minLength": 2},
    {"type": "string", "pattern": "[^\\s\\S]"},
    {"allOf": [{"const": 1}, {"const": 2}]},
]  # fmt: skip
OTHERS = [
    ("regex", "(", "regular expression"),
    ("regex", "\\", "backslash"),
    ("regex", "", "empty"),
    ("regex", "()", "only the empty text"),
    ("regex", "[^\\s\\S]", "matches no text"),
    ("regex", "a(?=b)", "look-around"),
    ("regex", "(a)\\1", "backreferences"),
    ("regex", "a\\b", "WordUnicode"),
    ("regex", "a^b", "Start in regex"),
    ("regex", "a{1,1000000}", "65536"),
    ("choice", [], "at least one"),
    ("choice", [""], "not empty"),
    ("choice", ["a", 5], "strings"),
    ("choice", {}, "list of strings"),
    ("lark", "", "start"),
    ("lark", "start: (", "Expected"),
    ("lark", "start: b", "unknown name"),
    ("lark", 'start: "a" start', "'start'"),
    ("lark", 'start: "x" | b\nb: "y" b', "'b'"),
    ("lark", 'start: a\na: b "x"\nb: a "y" | b', "No text matches rule"),
    ("lark", "start: x\nx[max_tokens=3]: /.*/", "max_tokens"),
    ("lark", 'start: %json {"not": {}, "x-guidance": {"lenient": true}}', "not"),
    ("lark", 'start: %json {"oneOf": [{}, {}]}', "oneOf"),
    ("lark", "start: <|nope|>", "special token"),
    ("lark", "start: @other", "other"),
    ("lark", "start: ``", "line 1"),
    ("lark", 'root ::= "a" nope', "nope"),
    ("lark", 'root ::= "\\q"', "EBNF"),
    ("structural_tag", [], "object"),
    ("structural_tag", {"type": "structural_tag"}, "structures"),
    ("structural_tag", {"structures": [{"begin": "<a>", "schema": {}, "end": "x"}], "triggers": ["<b"]}, "triggers"),
    ("structural_tag", {"structures": [{"begin": "<a", "schema": {"not": {}}, "end": "x"}], "triggers": ["<a"]}, "not"),
    ("structural_tag", {"format": {"type": "qwen_xml_parameter"}}, "qwen_xml_parameter"),
    ("structural_tag", {"format": {"type": "const_string", "value": "a", "other": 1}}, "other"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "words"), SCHEMAS, ids=lambda value: json.dumps(value)[:60])
def test_a_schema_that_cannot_be_enforced_is_refused_by_name(schema, words):
    with pytest.raises(InvalidRequest) as caught:
        compiled("json_schema", schema)
    assert words in caught.value.message
    assert len(caught.value.message) < 700


@pytest.mark.parametrize("schema", IMPOSSIBLE, ids=lambda schema: json.dumps(schema)[:60])
def test_a_schema_that_no_value_meets_is_refused(schema):
    with pytest.raises(InvalidRequest, match=r"[Nn]o value meets|no string meets|minProperties"):
        compiled("json_schema", schema)


@pytest.mark.parametrize(("kind", "value", "words"), OTHERS, ids=lambda value: str(value)[:50])
def test_other_constraints_are_refused_with_the_reason(kind, value, words):
    with pytest.raises(InvalidRequest) as caught:
        compiled(kind, value)
    assert words in caught.value.message


def test_a_deep_schema_is_refused_and_a_fairly_deep_one_is_not():
    def nested(levels):
        schema = {"type": "string"}
        for _ in range(levels):
            schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        return schema

    compiled("json_schema", nested(55))
    with pytest.raises(InvalidRequest, match="60 levels"):
        compiled("json_schema", nested(70))
