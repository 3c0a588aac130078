"""Random schemas: refused by name, or every answer is valid and every walk can go on."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import is_valid
from walker import compiled, small

from truffula.errors import InvalidRequest

NAMES = st.sampled_from(["a", "b", "c", "é", "a b", 'q"', ""])
NUMBERS = st.integers(-20, 20) | st.sampled_from([0.5, -2.25, 0.1, 1e-5, 100, 2**53])
SIZES = st.integers(0, 3)
VALUES = st.none() | st.booleans() | NUMBERS | st.text('ab"\\\né', max_size=3)
LITERALS = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2), max_leaves=4
)
TYPES = st.sampled_from(["object", "string", ["null", "array"]])


def some(**fields):
    return st.fixed_dictionaries({}, optional=fields)


LEAVES = st.one_of(
    st.booleans(),
    st.fixed_dictionaries({"type": st.sampled_from(["null", "boolean"])}),
    st.builds(
        dict.__or__,
        st.fixed_dictionaries({"type": st.sampled_from(["integer", "number"])}),
        some(
            minimum=NUMBERS,
            maximum=NUMBERS,
            exclusiveMinimum=NUMBERS,
            exclusiveMaximum=NUMBERS,
            multipleOf=st.sampled_from([1, 2, 3, 0.5, 0.1, 7]),
        ),
    ),
    st.builds(
        dict.__or__,
        st.just({"type": "string"}),
        some(
            minLength=SIZES,
            maxLength=SIZES,
            pattern=st.sampled_from(["^a", "b$", "^[ab]*$", "^$", "a|b", "^(?:ab){1,2}$"]),
            format=st.sampled_from(["date", "ipv4", "uuid"]),
        ),
    ),
    st.fixed_dictionaries({"enum": st.lists(LITERALS, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"const": LITERALS}),
    st.sampled_from([{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}, {"$ref": "#"}, {}]),
)


def larger(inner):
    objects = st.builds(
        dict.__or__,
        st.just({"type": "object"}),
        some(
            properties=st.dictionaries(NAMES, inner, max_size=3),
            required=st.lists(NAMES, max_size=2),
            additionalProperties=inner,
            patternProperties=st.dictionaries(st.sampled_from(["^a", "^b", "c$"]), inner, max_size=2),
            minProperties=SIZES,
            maxProperties=SIZES,
        ),
    )
    arrays = st.builds(
        dict.__or__,
        st.just({"type": "array"}),
        some(items=inner, prefixItems=st.lists(inner, min_size=1, max_size=2), minItems=SIZES, maxItems=SIZES),
    )
    several = st.lists(inner, min_size=1, max_size=2)
    combined = some(
        anyOf=several, allOf=several, oneOf=several, type=st.sampled_from(["object", "string", ["null", "array"]])
    )
    return objects | arrays | combined


SCHEMAS = st.recursive(LEAVES, larger, max_leaves=8)
DOCUMENTS = st.builds(
    lambda schema, x, y: {**schema, "$defs": {"x": x, "y": y}} if isinstance(schema, dict) else schema,
    SCHEMAS,
    SCHEMAS,
    SCHEMAS,
)


def check(schema):
    try:
        source = compiled("json_schema", schema)
    except InvalidRequest as error:
        assert error.message
        return
    for seed in range(3):
        text = small().walk(source, seed, steps=120)
        assert text is None or is_valid(schema, text), f"{json.dumps(schema)}: {text}"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(DOCUMENTS)
def test_a_random_schema_is_refused_or_enforced(schema):
    check(schema)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(DOCUMENTS)
def test_many_random_schemas_are_refused_or_enforced(schema):
    check(schema)
