"""OpenAI's messages and tools become items, and what is neither is refused by its place."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from truffula.errors import InvalidRequest
from truffula.items import Message, Reasoning, Refusal, Text, Tool, ToolCall, ToolChoice, ToolResult
from truffula.service.openai_items import messages_from_openai, tool_choice_from_openai, tools_from_openai


def message(**given: Any) -> Message:
    (found,) = messages_from_openai([given])
    return found


def test_each_form_of_a_message() -> None:
    assert message(role="user", content="a") == Message(role="user", items=[Text("a")])
    assert message(role="user", content="a", name="ann").name == "ann"
    assert message(role="user", content=None, name=None, weight=None) == Message(role="user", items=[])
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"text": "c"}]
    assert message(role="developer", content=parts).items == [Text("a"), Text("b"), Text("c")]
    assert message(role="user", content="a", weight=[1, {"b": None}]).extra == {"weight": [1, {"b": None}]}
    assert messages_from_openai([Message(role="user", items=[])]) == [Message(role="user", items=[])]


def test_an_assistants_message_is_reasoning_text_refusal_and_calls_in_this_order() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 3.50}'}}
    given = {"role": "assistant", "content": "b", "reasoning_content": "a", "refusal": "no", "tool_calls": [call]}
    assert message(**given).items == [Reasoning("a"), Text("b"), Refusal("no"), ToolCall("c1", "f", '{"x": 3.50}')]
    assert message(role="assistant", reasoning="a").items == [Reasoning("a")]
    assert message(role="assistant", content=[{"type": "refusal", "refusal": "no"}]).items == [Refusal("no")]
    assert message(role="assistant", content="a", tool_calls=None, function_call=None).items == [Text("a")]
    assert message(role="assistant", content="a", tool_calls=[]).items == [Text("a")]
    older = {"role": "assistant", "function_call": {"name": "f", "arguments": ""}}
    assert message(**older).items == [ToolCall("", "f", "{}")]


def test_arguments_come_as_text_or_as_an_object() -> None:
    def arguments(given: Any) -> str:
        (call,) = message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": given}}]).items
        assert isinstance(call, ToolCall)
        return call.arguments

    assert arguments({"ü": [1, None]}) == '{"ü": [1, null]}'
    assert arguments(None) == arguments(" ") == "{}"
    assert arguments(' {"a":1e3}') == ' {"a":1e3}', "as the client wrote it"


def test_the_result_of_a_tool() -> None:
    result = ToolResult("c1", "x\ny", "f")
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    assert message(role="tool", tool_call_id="c1", name="f", content=parts).items == [result]
    assert message(role="function", name="f", content="z") == Message(role="tool", items=[ToolResult("", "z", "f")])
    assert message(role="tool", content=None, is_error=True).extra == {"is_error": True}


REFUSED: list[tuple[Any, str]] = [
    ([], "messages"),
    ("hello", "messages"),
    (["hello"], "messages[0]"),
    ([{"content": "x"}], "messages[0].role"),
    ([{"role": "user"}, {"role": "robot"}], "messages[1].role"),
    ([{"role": "user", "content": 3}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], "messages[0].content[1]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": "x", "name": 3}], "messages[0].name"),
    ([{"role": "user", "content": "x", "who": object()}], "messages[0]"),
    ([{"role": "assistant", "audio": {"id": "a"}}], "messages[0].audio"),
    ([{"role": "assistant", "reasoning": ["a"]}], "messages[0].reasoning"),
    ([{"role": "assistant", "tool_calls": "f"}], "messages[0].tool_calls"),
    ([{"role": "assistant", "tool_calls": ["f"]}], "messages[0].tool_calls[0]"),
    ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls[0].function.name"),
    ([{"role": "tool", "tool_call_id": 5}], "messages[0].tool_call_id"),
]
WRONG_ARGUMENTS = ["{", "[1]", "null", 5, [], "[" * 70 + "]" * 70, {"a": object()}]


@pytest.mark.parametrize(("messages", "param"), REFUSED, ids=[param + str(i) for i, (_, param) in enumerate(REFUSED)])
def test_what_is_no_conversation_in_text_is_refused_by_its_place(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        messages_from_openai(messages)
    assert caught.value.param == param
    assert caught.value.message.startswith(param.rpartition(".")[0])
    assert "image_url" not in caught.value.message or "text parts only" in caught.value.message


@pytest.mark.parametrize("given", WRONG_ARGUMENTS, ids=lambda value: repr(value)[:20])
def test_arguments_that_are_no_object_are_refused(given: Any) -> None:
    call = {"function": {"name": "f", "arguments": given}}
    with pytest.raises(InvalidRequest) as caught:
        messages_from_openai([{"role": "assistant", "tool_calls": [call]}])
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_tools() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "number"}}}
    function = {"name": "f", "description": "d", "parameters": schema, "strict": True, "return": {"type": "string"}}
    found = tools_from_openai([{"type": "function", "function": function}, {"function": {"name": "g"}}])
    extra = {"return": {"type": "string"}}
    whole = Tool(name="f", description="d", parameters=schema, strict=True, extra=extra)
    assert found == [whole, Tool(name="g")]
    shown = {"name": "f", "description": "d", "parameters": schema, "return": {"type": "string"}}
    assert whole.for_template() == {"type": "function", "function": shown}
    assert tools_from_openai(None) is tools_from_openai([]) is None
    assert tools_from_openai([Tool(name="h")]) == [Tool(name="h")]


REFUSED_TOOLS: list[tuple[Any, str]] = [
    ("f", "tools"),
    (["f"], "tools[0]"),
    ([{"type": "function"}], "tools[0].function"),
    ([{"type": "web_search"}], "tools[0].type"),
    ([{"type": "custom", "custom": {"name": "f"}}], "tools[0].type"),
    ([{"type": "function", "function": []}], "tools[0].function"),
    ([{"type": "function", "function": {"name": ""}}], "tools[0].function.name"),
    ([{"type": "function", "function": {"name": "a\nb"}}], "tools[0].function.name"),
    ([{"type": "function", "function": {"name": "f", "parameters": "{}"}}], "tools[0].function.parameters"),
    ([{"type": "function", "function": {"name": "f", "strict": 1}}], "tools[0].function.strict"),
    ([{"type": "function", "function": {"name": "f"}}] * 2, "tools[1].function.name"),
]


@pytest.mark.parametrize(("tools", "param"), REFUSED_TOOLS, ids=[p + str(i) for i, (_, p) in enumerate(REFUSED_TOOLS)])
def test_what_is_no_tool_is_refused_by_its_place(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tools_from_openai(tools)
    assert caught.value.param == param


F, G = Tool(name="f"), Tool(name="g")
ALLOWED = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice(mode="none")),
        ("required", ToolChoice(mode="required")),
        ("f", ToolChoice(mode="required", names=("f",), parallel=False)),
        ({"type": "function", "function": {"name": "f"}}, ToolChoice(mode="required", names=("f",), parallel=False)),
        ({"function": {"name": "f"}}, ToolChoice(mode="required", names=("f",), parallel=False)),
        ({"type": "function", "name": "f"}, ToolChoice(mode="required", names=("f",), parallel=False)),
        ({"type": "allowed_tools", "allowed_tools": ALLOWED}, ToolChoice(names=("g",))),
        ({"type": "allowed_tools", **ALLOWED, "mode": "required"}, ToolChoice(mode="required", names=("g",))),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}] * 2},
            ToolChoice(names=("g",)),
        ),
    ],
    ids=str,
)
def test_choices_of_chat_and_of_responses(choice: Any, expected: ToolChoice) -> None:
    assert tool_choice_from_openai(choice, [F, G]) == expected
    assert not tool_choice_from_openai(choice, [F, G], parallel=False).parallel


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("required", []),
        ("any", [F]),
        ("", [F]),
        (5, [F]),
        ({}, [F]),
        ({"type": "function"}, [F]),
        ({"type": "function", "function": {"name": "g"}}, [F]),
        ({"type": "custom", "name": "f"}, [F]),
        ({"type": "web_search"}, [F]),
        ({"type": "allowed_tools"}, [F]),
        ({"type": "allowed_tools", "allowed_tools": {**ALLOWED, "mode": "none"}}, [F, G]),
        ({"type": "allowed_tools", "allowed_tools": ALLOWED}, [F]),
    ],
    ids=str,
)
def test_what_is_no_choice_of_these_tools_is_refused(choice: Any, tools: list[Tool]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tool_choice_from_openai(choice, tools)
    assert str(caught.value.param).startswith("tool_choice")


def test_without_tools_the_default_is_none() -> None:
    assert tool_choice_from_openai(None, None) == tool_choice_from_openai("none", []) == ToolChoice(mode="none")


def test_items_cross_processes_as_they_are() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    talk = messages_from_openai(
        [
            {"role": "assistant", "content": "a", "refusal": "r", "reasoning": "t", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": json.dumps({"x": 1})},
        ]
    )
    packed = msgspec.msgpack.encode(talk)
    assert msgspec.msgpack.decode(packed, type=list[Message]) == talk
