"""Every field that today's openai SDK can send: works, is refused by name, or is ignored and listed."""

from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from live_server import MODEL, assert_canonical_error
from typing_extensions import is_typeddict
from verdicts import members, openai_rows

ROWS = openai_rows()


def judged(verdict):
    rows = [row for row in ROWS if row.verdict == verdict]
    return pytest.mark.parametrize("row", rows, ids=lambda row: f"{row.route} {row.field}")


BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 1},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 1},
    "/v1/decisions": {"input": "Blue.", "questions": [{"type": "predicate", "instructions": "A colour."}]},
}
# Listed where the chat template, or the request without tools, has no use for them
BY_TEMPLATE = ("reasoning_effort", "reasoning.effort", "tools", "parallel_tool_calls")
# Where the first value of the SDK's type is one that asks for nothing.
SAMPLES = {
    "modalities": ["text", "audio"],
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "parallel_tool_calls": False,
    "service_tier": "priority",
    "context_management": [{"type": "compaction"}],
    "background_options": {"completion_window": "2h"},
}


def sample(hint):
    """A value of an SDK's type."""
    first = next(one for one in members(hint) if one is not type(None))
    origin = get_origin(first)
    if origin is Literal:
        return get_args(first)[0]
    if is_typeddict(first):
        hints = get_type_hints(first)
        return {name: sample(hints[name]) for name in first.__required_keys__ or list(hints)[:1]}
    if origin in (dict,) or first is dict:
        return {"a": "b"}
    if origin is not None and origin is not type:
        return [sample(get_args(first)[0])]
    return {str: "x", int: 2, float: 0.5, bool: True}.get(first, "x")


def body_with(row, value):
    body = {"model": MODEL, **BODIES[row.route]}
    outer, _, inner = row.field.partition(".")
    if outer == "stream_options":
        body["stream"] = True
    return {**body, outer: {inner: value} if inner else value}


def test_a_field_that_nobody_has_judged_fails():
    missing = [(row.route, row.field) for row in ROWS if row.verdict is None]
    assert not missing, "give each a field of the route's body, or a row in server/field_names.toml"
    assert {row.route for row in ROWS} == set(BODIES)


@judged("refused")
def test_what_is_refused_is_named(live, row):
    value = SAMPLES.get(row.field, sample(row.hint))
    error = assert_canonical_error(live.post(row.route, body_with(row, value)), 400)
    assert error["param"] == row.field and row.field in error["message"]


@judged("ignored")
def test_what_is_ignored_is_listed(live, row):
    value = SAMPLES.get(row.field, sample(row.hint))
    response = live.post(row.route, body_with(row, value))
    assert response.status_code == 200, response.text
    assert row.field in response.headers["x-truffula-ignored"].split(", ")


@judged("works")
def test_what_works_is_never_listed(live, row):
    """It is honoured, or its sample value is refused: a field that works has tests of its own."""
    if row.field in (*BODIES[row.route], *BY_TEMPLATE, "model"):
        return
    response = live.post(row.route, body_with(row, SAMPLES.get(row.field, sample(row.hint))))
    if response.status_code == 200:
        assert row.field not in response.headers.get("x-truffula-ignored", "").split(", ")
    else:
        error = assert_canonical_error(response, 400)
        assert row.field.split(".")[0] in f"{error['param']} {error['message']}"
