"""What an answer must match, by the chat template's format, the tools and the request's constraint."""

from __future__ import annotations

from typing import Any

import pytest

from truffula.errors import InvalidRequest
from truffula.items import Constraint, Message, Text, Tool, ToolChoice
from truffula.service.answers import AnswerFormats
from truffula.text.answers import Answer
from truffula.text.chat_template import ChatTemplates
from truffula.types import GenerateRequest

TEMPLATES = {"plain": "{{ messages }}", "calls": "<tool_call>{{ tools }}", "both": "<tool_call> <think></think>"}
FORMATS = AnswerFormats(ChatTemplates(TEMPLATES, {}), None)
REGEX = Constraint(kind="regex", value="a+")
F, STRICT = Tool(name="f"), Tool(name="g", strict=True)


def request(template: str, **more: Any) -> GenerateRequest:
    messages = [Message(role="user", items=[Text("x")])]
    return GenerateRequest(messages=messages, chat_template=template, **{"parse_output": True, **more})


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_nothing_is_enforced_where_nothing_is_promised(template: str) -> None:
    for more in ({}, {"tools": [F]}, {"tools": [STRICT], "tool_choice": ToolChoice(mode="none")}):
        assert FORMATS.wanted(request(template, **more), "") is None


def test_a_constraint_alone_needs_no_form() -> None:
    assert FORMATS.wanted(request("plain", constraint=REGEX, tools=[F]), "") is REGEX
    assert FORMATS.wanted(request("calls", constraint=REGEX), "") is REGEX
    assert FORMATS.wanted(request("both", constraint=REGEX, parse_output=False), "") is REGEX
    assert FORMATS.wanted(GenerateRequest(prompt="x", parse_output=True, constraint=REGEX), "") is REGEX


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [F], "tool_choice": ToolChoice(mode="required")},
        {"tools": [F], "tool_choice": ToolChoice(names=("f",))},
        {"tools": [F], "tool_choice": ToolChoice(parallel=False)},
        {"tools": [F, STRICT]},
        {"tools": [F], "constraint": REGEX},
    ],
    ids=str,
)
def test_what_is_promised_of_calls_is_enforced(more: dict[str, Any]) -> None:
    found = FORMATS.wanted(request("calls", **more), "")
    assert isinstance(found, Answer)
    assert (found.tools, found.constraint, found.thinking_open) == (more["tools"], more.get("constraint"), False)


def test_reasoning_comes_before_what_is_enforced() -> None:
    def thinks(tail: str) -> tuple[bool, bool]:
        found = FORMATS.wanted(request("both", constraint=REGEX), tail)
        assert isinstance(found, Answer)
        return found.form.reasoning is not None, found.thinking_open

    assert thinks("assistant\n") == (True, False)
    assert thinks("assistant\n<think>\n") == (True, True)
    assert thinks("<think>\n\n</think>\n\n") == (False, False), "the prompt has closed it"
    assert isinstance(FORMATS.wanted(request("both", thinking_budget=3), ""), Answer)
    assert FORMATS.wanted(request("calls", thinking_budget=3), "") is None, "it does not reason"
    assert FORMATS.ignored(request("calls", thinking_budget=3)) == ("thinking_budget",)
    assert FORMATS.ignored(request("both", thinking_budget=3)) == FORMATS.ignored(request("calls")) == ()


def test_a_call_cannot_be_demanded_in_an_unknown_form() -> None:
    with pytest.raises(InvalidRequest) as caught:
        FORMATS.wanted(request("plain", tools=[F], tool_choice=ToolChoice(mode="required")), "")
    assert caught.value.param == "tool_choice"
    with pytest.raises(InvalidRequest, match="--tool-format") as caught:
        FORMATS.wanted(request("plain", tools=[F, STRICT]), "")
    assert caught.value.param == "tools"
    chosen = AnswerFormats(ChatTemplates(TEMPLATES, {}), None, tool_format="hermes")
    assert isinstance(chosen.wanted(request("plain", tools=[F], tool_choice=ToolChoice(mode="required")), ""), Answer)


def test_an_answer_is_parsed_where_there_is_something_to_parse() -> None:
    def parsed(template: str, **more: Any) -> bool:
        return FORMATS.parser(request(template, **more), "") is not None

    assert not parsed("plain", tools=[F])
    assert not parsed("calls")
    assert parsed("calls", tools=[F])
    assert not parsed("calls", tools=[F], tool_choice=ToolChoice(mode="none"))
    assert parsed("both")
    assert not parsed("both", tools=[F], parse_output=False)
