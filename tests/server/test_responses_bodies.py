"""What a body of ``/v1/responses`` becomes, and what is refused by name."""

import re

import pytest
from live_server import assert_canonical_error
from openai.types.responses import response_input_item_param, tool_param

from truffula.errors import InvalidRequest
from truffula.items import Message, Reasoning, Refusal, Text, ToolCall, ToolChoice, ToolResult
from truffula.server.responses_bodies import ResponsesBody
from truffula.server.responses_items import ITEM_TYPES, messages_of
from truffula.server.responses_tools import CLIENT_TOOLS, SEARCHES, custom_input, read_choice, read_tools

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True, "description": "d"}
CUSTOM = {"type": "custom", "name": "c"}
SPACE = {"type": "namespace", "name": "s", "description": "", "tools": [{"type": "function", "name": "g"}]}
USER = {"role": "user", "content": "Hello"}
CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}


def literals(union):
    """The ``type`` of each member of a union of TypedDicts of the SDK."""
    found = set()
    for member in union.__args__:
        hint = member.__annotations__.get("type")
        text = getattr(hint, "__forward_arg__", str(hint))
        found |= set(re.findall(r"'([a-z0-9_]+)'|\"([a-z0-9_]+)\"", text))
    return {one or two for one, two in found}


def test_an_agents_turn_is_one_message_of_the_assistant():
    given = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "message", "role": "developer", "content": "two"},
        USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "Let me look.", "annotations": []}, {"type": "refusal", "refusal": "no"}]},
        CALL,
        {"type": "function_call", "call_id": "call_2", "name": "g", "namespace": "s", "arguments": ""},
        {"type": "custom_tool_call", "call_id": "call_3", "name": "c", "input": "ü"},
        {"type": "local_shell_call", "id": "l", "call_id": "call_4", "status": "completed",
         "action": {"type": "exec", "command": ["ls"], "env": {}, "user": None}},
        {"type": "function_call_output", "call_id": "call_1", "output": "5"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "a"}] * 2},
        {"type": "custom_tool_call_output", "call_id": "call_3", "output": "done"},
        {"type": "local_shell_call_output", "id": "call_4", "output": "file"},
        {"role": "assistant", "content": "It is 5."},
    ]  # fmt: skip
    assert messages_of("Be kind.", [], given) == [
        Message(role="system", items=[Text("Be kind.")]),
        Message(role="developer", items=[Text("one"), Text("two")]),
        Message(role="user", items=[Text("Hello")]),
        Message(
            role="assistant",
            items=[
                Reasoning("hm"),
                Text("Let me look."),
                Refusal("no"),
                ToolCall("call_1", "f", "{}"),
                ToolCall("call_2", "s__g", "{}"),
                ToolCall("call_3", "c", '{"input": "ü"}'),
                ToolCall("call_4", "local_shell", '{"command": ["ls"]}'),
            ],
        ),
        Message(role="tool", items=[ToolResult("call_1", "5")]),
        Message(role="tool", items=[ToolResult("call_2", "a\na")]),
        Message(role="tool", items=[ToolResult("call_3", "done")]),
        Message(role="tool", items=[ToolResult("call_4", "file")]),
        Message(role="assistant", items=[Text("It is 5.")]),
    ]


@pytest.mark.parametrize("kind", sorted(literals(response_input_item_param.ResponseInputItemParam)))
def test_every_item_of_the_sdk_is_read_or_refused_by_its_type(kind):
    if kind in ITEM_TYPES:
        return
    with pytest.raises(InvalidRequest) as caught:
        messages_of(None, [], [{"type": kind}])
    assert caught.value.param == "input[0].type" and kind in caught.value.message


@pytest.mark.parametrize("kind", sorted(literals(tool_param.ToolParam)))
def test_every_tool_of_the_sdk_is_offered_listed_or_refused_by_its_type(kind):
    if kind in (*CLIENT_TOOLS, "function", "custom", "namespace"):
        return
    if kind in SEARCHES:
        assert read_tools([{"type": kind}]).ignored == [f"tools[0](type={kind})"]
        return
    with pytest.raises(InvalidRequest) as caught:
        read_tools([{"type": kind}])
    assert caught.value.param == "tools[0].type" and kind in caught.value.message


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}], "input[0].content[0].type"),
        ([{"role": "user", "content": 5}], "input[0].content"),
        ([{"role": "robot", "content": "x"}], "input[0].role"),
        ([USER, {"type": "function_call_output", "call_id": "call_9", "output": "5"}], "input[1].call_id"),
        ([{**CALL, "arguments": '{"cut": '}], "input[0].arguments"),
        ([{**CALL, "arguments": "[]"}], "input[0].arguments"),
        ([{**CALL, "arguments": 5}], "input[0].arguments"),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}], "input[0].encrypted_content"),
        ([{"type": 5}], "input[0].type"),
    ],
    ids=str,
)
def test_items_are_refused_by_their_place(given, param):
    with pytest.raises(InvalidRequest) as caught:
        messages_of(None, [], given)
    assert caught.value.param == param


@pytest.mark.parametrize("arguments", ["[" * 100_000, '{"input": ' + "9" * 5000 + "}", "{", ""], ids=len)
def test_arguments_that_are_no_json_are_a_custom_tools_input_whole(arguments):
    assert custom_input(arguments) == arguments


@pytest.mark.parametrize("arguments", ["[" * 50_000, '{"a": ' + "9" * 5000 + "}", "nonsense"], ids=len)
def test_arguments_that_are_no_json_are_refused(live, arguments):
    given = [
        USER,
        {**CALL, "arguments": arguments},
        {"type": "function_call_output", "call_id": "call_1", "output": "x"},
    ]
    error = assert_canonical_error(live.post("/v1/responses", {"input": given}), 400, "JSON")
    assert "sys." not in error["message"] and "recursion" not in error["message"]


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        (None, ToolChoice()),
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        ({"type": "function", "name": "f"}, ToolChoice(mode="required", names=("f",), parallel=False)),
        ({"type": "custom", "name": "c"}, ToolChoice(mode="required", names=("c",), parallel=False)),
        (
            {"type": "function", "name": "g", "namespace": "s"},
            ToolChoice(mode="required", names=("s__g",), parallel=False),
        ),
        ({"type": "shell"}, ToolChoice(mode="required", names=("shell",), parallel=False)),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}, {"type": "shell"}]},
            ToolChoice(names=("f", "shell")),
        ),
    ],
    ids=str,
)
def test_tool_choice_in_all_its_forms(given, choice):
    tools = read_tools([FUNCTION, CUSTOM, SPACE, {"type": "shell"}])
    assert read_choice(given, tools, parallel=True) == choice
    assert not read_choice(given, tools, parallel=False).parallel


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("any", "tool_choice"),
        ({"type": "function", "name": "unknown"}, "tool_choice"),
        ({"type": "custom", "name": "f"}, "tool_choice"),
        ({"type": "web_search_preview"}, "tool_choice"),
        ({"type": "mcp", "server_label": "x"}, "tool_choice"),
        ({"type": "allowed_tools", "mode": "none", "tools": []}, "tool_choice.mode"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "shell"}]}, "tool_choice.tools[0]"),
    ],
    ids=str,
)
def test_a_choice_of_what_is_not_offered_is_refused(given, param):
    with pytest.raises(InvalidRequest) as caught:
        read_choice(given, read_tools([FUNCTION]), parallel=True)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([FUNCTION, FUNCTION], "tools[1].name"),
        ([{"type": "function"}], "tools[0].name"),
        ([{"type": "function", "function": {"name": "f"}}], "tools[0].function"),
        ([{**FUNCTION, "parameters": "x"}], "tools[0].parameters"),
        ([{**CUSTOM, "format": {"type": "grammar", "syntax": "lark", "definition": "x"}}], "tools[0].format.syntax"),
        ([{**CUSTOM, "format": {"type": "picture"}}], "tools[0].format.type"),
        ([{**SPACE, "tools": [{"type": "mcp"}]}], "tools[0].tools[0].type"),
    ],
    ids=str,
)
def test_tools_are_refused_by_their_place(tools, param):
    with pytest.raises(InvalidRequest) as caught:
        read_tools(tools)
    assert caught.value.param == param


def test_a_regex_of_a_custom_tool_is_a_pattern_that_binds():
    (tool,) = read_tools([{**CUSTOM, "format": {"type": "grammar", "syntax": "regex", "definition": "a|b"}}]).tools
    assert tool.strict and tool.parameters["properties"]["input"]["pattern"] == "^(?:a|b)$"


@pytest.mark.parametrize(
    ("form", "constraint"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ("json_object", "")),
        ({"type": "json_schema", "name": "n", "schema": {"type": "object"}}, ("json_schema", '{"type":"object"}')),
    ],
    ids=str,
)
def test_text_format_is_a_constraint(form, constraint):
    found = ResponsesBody.model_validate({"input": "x", "text": {"format": form}}).constraint
    assert (None if found is None else (found.kind, found.value)) == constraint
