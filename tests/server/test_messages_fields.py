"""Every field of anthropic's types has a verdict: it works, is refused by name, or is listed as without effect."""

import typing

import pytest
from anthropic.types import MessageCountTokensToolParam, ToolParam, ToolUnionParam
from anthropic.types.beta import BetaContentBlockParam, BetaToolUnionParam
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_params
from anthropic.types.content_block_param import ContentBlockParam
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from live_server import MODEL, ok
from typing_extensions import get_type_hints, is_typeddict

from truffula.server.foreign_fields import INERT, UNSUPPORTED
from truffula.server.messages_bodies import CountTokensBody, MessagesBody

TALK = [{"role": "user", "content": "Hello"}]
BODY = {"model": MODEL, "max_tokens": 1, "messages": TALK}
# The client sends these as headers; any value is accepted.
HEADERS = {"betas", "user_profile_id", "workspace_id"}
# A value with a meaning for each field that no route reads.
VALUES = {
    "container": "container_1",
    "mcp_servers": [{"type": "url", "name": "a", "url": "https://mcp.example"}],
    "compaction": {"type": "enabled"},
    "inference_geo": "us",
    "speed": "fast",
    "diagnostics": {"previous_message_id": "msg_1"},
    "fallbacks": [{"model": "other"}],
    "fallback_credit_token": "token",
    "billing_policy": {"type": "standard"},
    "metadata": {"user_id": "user_1"},
    "service_tier": "priority",
}


def fields_of(*types):
    return sorted({name for one in types for base in one.__mro__ for name in getattr(base, "__annotations__", ())})


CREATE = fields_of(
    MessageCreateParamsNonStreaming,
    MessageCreateParamsStreaming,
    beta_params.MessageCreateParamsNonStreaming,
    beta_params.MessageCreateParamsStreaming,
)
COUNT = fields_of(MessageCountTokensParams, beta_count_params.MessageCountTokensParams)


def test_the_types_have_fields():
    assert len(CREATE) > 25 and len(COUNT) > 15


@pytest.mark.parametrize(
    ("body", "name"),
    [*((MessagesBody, name) for name in CREATE), *((CountTokensBody, name) for name in COUNT)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_field_is_judged(body, name):
    outside = [name in UNSUPPORTED, name in INERT, name in HEADERS]
    assert name in body.model_fields or sum(outside) == 1, f"nobody has judged {name} of anthropic's {body.__name__}"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("name", sorted(set(VALUES) | (set(CREATE) - set(MessagesBody.model_fields) - HEADERS)))
def test_the_verdict_is_the_servers(live, path, name):
    body = {**BODY, name: VALUES[name]}
    if path != "/v1/messages":
        del body["max_tokens"]
    response = live.post(path, body)
    if name in UNSUPPORTED:
        assert response.status_code == 400
        assert f"{name} is not supported" in response.json()["error"]["message"]
    else:
        ok(response)
        assert response.headers["x-truffula-ignored"] == name


def types_of(kind):
    """The ``type`` of each member of a union of TypedDicts and models."""
    if typing.get_origin(kind) is not None:
        return {name for member in typing.get_args(kind) for name in types_of(member)}
    if hasattr(kind, "model_fields"):
        annotation = kind.model_fields["type"].annotation
    elif is_typeddict(kind):
        annotation = get_type_hints(kind).get("type")
    else:
        return set()  # what Annotated says of a union
    return strings_of(annotation)


def strings_of(annotation):
    """The strings of a Literal, wherever it stands in ``annotation``."""
    if isinstance(annotation, str):
        return {annotation}
    return {value for inner in typing.get_args(annotation) for value in strings_of(inner)}


BLOCKS = sorted(types_of(ContentBlockParam) | types_of(BetaContentBlockParam))
READ = {
    "user": {"text": {"text": "Hello"}},
    "assistant": {
        "text": {"text": "Hello"},
        "thinking": {"thinking": "Hm.", "signature": "c2ln"},
        "redacted_thinking": {"data": "b3BhcXVl"},
        "tool_use": {"id": "toolu_1", "name": "f", "input": {}},
    },
}


def test_the_unions_have_members():
    assert {"text", "image", "document", "tool_use", "server_tool_use", "mcp_tool_use"} <= set(BLOCKS)
    assert {"bash_20250124", "web_search_20250305", "custom"} <= set(TOOLS)


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_is_read_or_refused_by_name(live, kind, role):
    if kind == "tool_result" and role == "user":
        return  # it needs a call: test_messages.py
    given = READ[role].get(kind)
    turn = {"role": role, "content": [{"type": kind, **(given or {}), "cache_control": {"type": "ephemeral"}}]}
    talk = [*TALK, turn] if kind != "tool_use" or role == "user" else [*TALK, turn, result("toolu_1"), *TALK]
    response = live.post("/v1/messages", {**BODY, "messages": talk})
    if given is None:
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert message.startswith(f'messages[1].content[0] is a block of type "{kind}"; this server takes text only')
    elif kind in ("tool_use", "thinking"):
        assert response.status_code in (200, 400), response.text  # as the chat template takes them
    else:
        ok(response)


def result(call_id):
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call_id, "content": "ok"}]}


TOOLS = sorted(types_of(ToolUnionParam) | types_of(BetaToolUnionParam) | types_of(MessageCountTokensToolParam))


@pytest.mark.parametrize("kind", [kind for kind in TOOLS if kind != "custom"])
def test_every_tool_of_anthropics_own_is_refused_by_name(live, kind):
    response = live.post("/v1/messages", {**BODY, "tools": [{"type": kind, "name": "x"}]})
    assert response.status_code == 400
    assert f'tools[0] has the type "{kind}". Send a tool of your own' in response.text.replace('\\"', '"')


TOOL = {"name": "f", "input_schema": {"type": "object"}}
TOOL_FIELDS = {
    "type": ("custom", None),
    "description": ("What it does.", None),
    "strict": (False, None),
    "cache_control": ({"type": "ephemeral"}, None),
    "eager_input_streaming": (True, None),
    "allowed_callers": (["code_execution_20260120"], "the model calls tools directly only"),
    "defer_loading": (True, "this server has no tool search"),
    "input_examples": ([{"a": 1}], "listed"),
}


@pytest.mark.parametrize("name", sorted(set(fields_of(ToolParam)) - set(TOOL)))
def test_every_field_of_a_tool_is_judged(live, name):
    value, words = TOOL_FIELDS[name]
    response = live.post("/v1/messages/count_tokens", {"messages": TALK, "tools": [{**TOOL, name: value}]})
    if words in (None, "listed"):
        ok(response)
        listed = response.headers.get("x-truffula-ignored", "").split(", ")
        assert (f"tools.{name}" in listed) == (words == "listed")
    else:
        assert response.status_code == 400
        assert f"tools[0].{name} is" in response.text and words in response.text
