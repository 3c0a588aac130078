"""``LLM.chat`` with tools and reasoning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from scripted import write_scripted_model
from truffula import LLM, SamplingParams
from truffula.errors import InvalidRequest
from truffula.items import Message, Reasoning, Text, Tool, ToolCallPart, ToolResult

SCRIPTS = {
    "@weather": [
        "I look.",
        "<tool_call>",
        '{"name": "weather", "argu',
        'ments": {"city": "Oslo"}}',
        "</tool_call>",
    ],
    "@thinks": ["<think>", "Hm.", "</think>", "42"],
    "@result": ["It is ", "cold."],
}
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    Tool(name="now"),
]
PARAMS = SamplingParams(temperature=0, max_tokens=60)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = write_scripted_model(tmp_path_factory.mktemp("scripted"), SCRIPTS)
    with LLM(folder, dtype="float32", backend="reference", memory_bytes=2**28, max_model_len=1024) as made:
        yield made


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_call_and_its_result(llm: LLM) -> None:
    (out,) = llm.chat([user("@weather")], PARAMS, tools=TOOLS)
    (call,) = out.tool_calls
    assert (out.text, call.name, json.loads(call.arguments)) == ("I look.", "weather", {"city": "Oslo"})
    talk = [user("@weather"), Message(role="assistant", items=[Text(out.text), call])]
    (end,) = llm.chat([*talk, Message(role="tool", items=[ToolResult(call.id, "@result")])], PARAMS, tools=TOOLS)
    assert (end.text, end.tool_calls) == ("It is cold.", [])
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in end.prompt


def test_reasoning(llm: LLM) -> None:
    (out,) = llm.chat([user("@thinks")], PARAMS)
    assert (out.reasoning, out.text) == ("Hm.", "42")
    (short,) = llm.chat([user("@thinks")], PARAMS, thinking_budget=0)
    assert short.reasoning == ""


@pytest.mark.parametrize("choice", ["required", "weather", {"function": {"name": "weather"}}])
def test_a_demanded_call(llm: LLM, choice: Any) -> None:
    params = SamplingParams(seed=1, max_tokens=300)
    for out in llm.chat([[user("@thinks")], [user("@result")]], params, tools=TOOLS[:1], tool_choice=choice):
        assert out.tool_calls
        assert all(json.loads(call.arguments)["city"] in ("Oslo", "Rome") for call in out.tool_calls)


def test_without_a_choice_there_is_no_call(llm: LLM) -> None:
    (out,) = llm.chat([user("@weather")], PARAMS, tools=TOOLS, tool_choice="none")
    assert out.tool_calls == []
    assert out.text == "".join(SCRIPTS["@weather"])
    with pytest.raises(InvalidRequest) as refused:
        llm.chat([user("@weather")], tool_choice="required")
    assert refused.value.param == "tool_choice"


def test_parts_of_a_stream(llm: LLM) -> None:
    raw = "".join(delta.text for delta in llm.stream([user("@thinks")], PARAMS))
    assert raw == "<think>Hm.</think>42"
    kinds = [
        type(part)
        for question in ("@thinks", "@weather")
        for delta in llm.stream([user(question)], PARAMS, tools=TOOLS, parse_output=True)
        for part in delta.parts
    ]
    assert list(dict.fromkeys(kinds)) == [Reasoning, Text, ToolCallPart]


@pytest.mark.parametrize(("field", "value"), [("thinking_budget", -3), ("constraint", "[0-9]+")])
def test_a_wrong_argument_is_named(llm: LLM, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field):
        llm.chat([user("@thinks")], PARAMS, **{field: value})
