"""The JSON-Schema-Test-Suite: no invalid instance is accepted, and valid ones are but for the exceptions named here."""

import json

import pytest
from corpus import GRAMMARS, REGEXES, SCHEMAS, compiled_suite
from walker import compiled, small

from truffula.errors import InvalidRequest

# Valid instances that a model is not offered: the grammar allows fewer texts than the schema.
NARROWER = {
    "properties in another order than the schema's": [
        "allOf: allOf/allOf",
        "allOf: allOf with base schema/valid",
        "const: const with object/same object with different",
    ],
    "integers with a fraction of zero": [
        "const: const with 0",
        "const: const with 1",
        "const: const with -2.0",
        "const: float and integers",
        "enum: enum with",
        "type: integer type matches integers/a float",
    ],
    "formats are enforced": ["format: "],
    "vocabularies are not read": ["vocabulary: "],
    "integers beyond 2^53 where a bound is beyond": ["optional-bignum: "],
    "control characters without an escape of one letter": [
        "optional-ecmascript-regex: ECMA 262 \\s matches whitespace/Line tabulation",
        "optional-ecmascript-regex: ECMA 262 \\S matches everything but whitespace/Non-whitespace control",
    ],
    "leap seconds, and fractions of more than nine digits": ["optional-format-date-time: ", "optional-format-time: "],
    "quoted local parts, and addresses as domains": ["optional-format-email: "],
    "two hyphens in a row": [
        "optional-format-hostname: validation of A-label",
        "optional-format-hostname: validation of host names/consecutive",
    ],
    "IPv4 in IPv6": [
        "optional-format-ipv6: validation of IPv6 addresses/mixed",
        "optional-format-ipv6: validation of IPv6 addresses/a long",
    ],
}
EXCEPTIONS = tuple(prefix for prefixes in NARROWER.values() for prefix in prefixes)


def test_no_invalid_instance_is_accepted_and_valid_ones_are():
    accepted = rejected = 0
    for case, source in compiled_suite():
        if isinstance(source, InvalidRequest):
            continue
        for description, data, valid in case.tests:
            text = json.dumps(data, ensure_ascii=False)
            name = f"{case.name}/{description}"
            if small().accepts(source, text):
                assert valid, f"{name}: {text}"
                accepted += 1
            elif valid:
                assert name.startswith(EXCEPTIONS), f"{name}: {text}"
            else:
                rejected += 1
    assert accepted > 400
    assert rejected > 300


def test_every_refusal_names_a_keyword_of_the_schema_or_that_no_value_meets_it():
    refused = [(case, error) for case, error in compiled_suite() if isinstance(error, InvalidRequest)]
    assert refused
    for case, error in refused:
        if "o value meets" in error.message:
            assert not any(valid for _, _, valid in case.tests), case.name
            continue
        words = {key for key in keys_of(case.schema) if key in error.message}
        assert words - {"type", "properties"}, f"{case.name}: {error.message}"
        assert "#" in error.message


def keys_of(value):
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_the_corpus_is_as_large_as_promised():
    accepted = sum(isinstance(source, str) for _, source in compiled_suite())
    assert accepted + len(SCHEMAS) >= 300
    assert len(REGEXES) >= 50
    assert len(GRAMMARS) >= 20


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        # One name cannot be written in two ways, and so be another property's.
        (
            {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}, "type": "object"},
            ['{"a":1}', '{"b":"x"}', '{"a":1,"b":"x"}'],
            ['{"a":"x"}', r'{"\u0061":"x"}', r'{"a":1,"\u0061":"x"}'],
        ),
        ({"type": "integer", "format": "uint8"}, ["0", "255"], ["256", "-1"]),
        ({"type": "integer", "minimum": -(2**63)}, ["-5", "9"], ["1.5"]),
        ({"format": "date"}, ['"2024-02-29"', '"2000-02-29"', "1"], ['"2023-02-29"', '"1900-02-29"', '"0000-01-01"']),
        ({"type": "string", "pattern": "^\\S.$"}, ['"ab"'], ['" b"', '"\ufeffb"', '"a\u2028"', '"a\\r"']),
        ({"type": ["string", "null"], "format": "uuid"}, ["null"], ['"x"']),
        ({"items": [{"type": "integer"}], "additionalItems": {"type": "string"}}, ['[1,"a"]'], ["[1,2]"]),
        ({"allOf": [{"format": "date"}], "format": "date", "type": "string"}, ['"2024-01-01"'], ['"x"']),
        ({"minimum": 1, "exclusiveMinimum": True, "type": "integer"}, ["2"], ["1"]),
        ({"exclusiveMinimum": -(2**60), "minimum": 0, "type": "integer"}, ["0"], ["-1"]),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_llguidance_would_enforce_otherwise(schema, good, bad):
    source = compiled("json_schema", schema)
    assert [text for text in good if not small().accepts(source, text)] == []
    assert [text for text in bad if small().accepts(source, text)] == []
