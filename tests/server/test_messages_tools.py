"""Tool calls, thinking and JSON schemas in messages, read by anthropic's client and its helpers."""

import asyncio
import json
from typing import Literal

import anthropic
import pydantic
import pytest
from anthropic import beta_async_tool, beta_tool
from live_server import MODEL, serving
from message_events import check_order, raw_events

from scripted import TEMPLATE, write_scripted_model

SCRIPTS = {
    "@weather": ["<tool_call>\n", '{"name": "wea', 'ther", "arguments": {"city"', ': "Os', 'lo"}}', "\n</tool_call>"],
    "@both": [
        "Let me ", "look.", "<tool_call>", '\n{"name":"weather","arguments":{"city":"Rome', '"}}\n', "</tool_call>\n",
        '<tool_call>{"arguments": {}, "name": "now"}', "</tool_call> ",
    ],
    "@broken": ["<tool_call> ", '{"name": "weather", ', "oh no", " </tool_call>"],
    "@thinks": ["<think>", "\nHm. ", "Hard.\n", "</think>\n\n", "42", "."],
    "Rain, 4 °C": ["It ", "rains."],
}  # fmt: skip
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [WEATHER, {"name": "now", "input_schema": {"type": "object"}}]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    with serving(write_scripted_model(tmp_path_factory.mktemp("scripted"), SCRIPTS), backend="auto") as found:
        yield found


@pytest.fixture(scope="module")
def client(scripted):
    with anthropic.Anthropic(base_url=scripted.url, api_key="-", max_retries=0) as made:
        yield made


def asked(question, **more):
    talk = [{"role": "user", "content": question}]
    return {"model": MODEL, "max_tokens": 40, "messages": talk, "extra_body": {"temperature": 0}, **more}


def answered(client, question, **more):
    """The message, which the stream helper accumulates to the same."""
    body = asked(question, **more)
    whole = client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        final = stream.get_final_message()
    first, second = ({k: v for k, v in m.to_dict().items() if k not in ("id", "usage")} for m in (whole, final))
    for block in (*first["content"], *second["content"]):
        assert block.pop("id", "toolu_").startswith("toolu_")  # each answer has its own
    assert first == second
    return whole


def test_a_call(client):
    message = answered(client, "@weather", tools=TOOLS)
    assert [(block.name, block.input) for block in message.content if block.type == "tool_use"] == [
        ("weather", {"city": "Oslo"})
    ]
    assert message.stop_reason == "tool_use"


def test_text_and_two_calls(client):
    message = answered(client, "@both", tools=TOOLS)
    assert [block.type for block in message.content][:3] == ["text", "tool_use", "tool_use"]
    assert message.content[0].text.strip() == "Let me look."
    assert [block.input for block in message.content[1:3]] == [{"city": "Rome"}, {}]
    assert len({block.id for block in message.content if block.type == "tool_use"}) == 2


def test_a_choice_of_one_call(client):
    body = asked("@both", tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    with client.messages.stream(**body) as stream:  # max_tokens cuts the call, which is text in a whole reply
        message = stream.get_final_message()
    assert [block.type for block in message.content].count("tool_use") == 1


def test_a_call_that_is_none_is_text(client):
    message = answered(client, "@broken", tools=TOOLS)
    assert [block.type for block in message.content] == ["text"]
    assert "oh no" in message.content[0].text
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "tool_choice": {"type": "none"}}], ids=["no tools", "none"])
def test_without_tools_a_call_is_text(client, more):
    message = answered(client, "@weather", **more)
    assert [block.type for block in message.content] == ["text"]
    assert '"Oslo"' in message.content[0].text


def test_thinking(client):
    message = answered(client, "@thinks", thinking={"type": "enabled", "budget_tokens": 20})
    thought, text = message.content
    assert (thought.type, thought.thinking.strip(), text.text.strip()) == ("thinking", "Hm. Hard.", "42.")
    assert thought.signature
    assert 0 < message.usage.output_tokens_details.thinking_tokens < message.usage.output_tokens
    omitted = answered(client, "@thinks", thinking={"type": "adaptive", "display": "omitted"})
    assert (omitted.content[0].thinking, omitted.content[0].signature) == ("", thought.signature)
    # As a client sends it back, all of it.
    talk = [*asked("@thinks")["messages"], message.to_param(), {"role": "user", "content": "@both"}]
    assert client.messages.create(**{**asked(""), "messages": talk}).content


def test_whether_it_thinks_reaches_the_template(client):
    counts = [
        client.messages.count_tokens(
            model=MODEL, messages=[{"role": "user", "content": "@thinks"}], **more
        ).input_tokens
        for more in ({}, {"thinking": {"type": "adaptive"}}, {"thinking": {"type": "disabled"}})
    ]
    assert "thinking={{ enable_thinking }}" in TEMPLATE
    assert counts == [counts[0], counts[0] + len("thinking=True"), counts[0] + len("thinking=False")]


def test_the_tool_runner(client, scripted):
    cities = []

    @beta_tool
    def weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: Its name.
        """
        cities.append(city)
        return "Rain, 4 °C"

    final = client.beta.messages.tool_runner(tools=[weather], **asked("@weather")).until_done()
    assert (cities, final.content[0].text) == (["Oslo"], "It rains.")
    streamed = client.beta.messages.tool_runner(tools=[weather], stream=True, **asked("@weather"))
    messages = [stream.get_final_message() for stream in streamed]
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert cities == ["Oslo", "Oslo"]

    @beta_async_tool
    async def slow_weather(city: str) -> str:
        """The weather of a city."""
        cities.append(city)
        return "Rain, 4 °C"

    async def go():
        slow_weather.name = "weather"
        async with anthropic.AsyncAnthropic(base_url=scripted.url, api_key="-", max_retries=0) as client:
            return await client.beta.messages.tool_runner(tools=[slow_weather], **asked("@weather")).until_done()

    assert asyncio.run(go()).content[0].text == "It rains."


def test_events_of_a_call(scripted):
    body = {key: value for key, value in asked("@both", tools=TOOLS, stream=True).items() if key != "extra_body"}
    events = raw_events(scripted.post("/v1/messages", {**body, "temperature": 0}).content)
    check_order(events)
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in starts][:3] == ["text", "tool_use", "tool_use"]
    assert all(block["input"] == {} for block in starts if block["type"] == "tool_use")
    index = next(event["index"] for event in events if event.get("content_block", {}).get("name") == "weather")
    pieces = [
        event["delta"]["partial_json"]
        for event in events
        if event["type"] == "content_block_delta" and event["index"] == index
    ]
    assert json.loads("".join(pieces)) == {"city": "Rome"}
    assert len(pieces) > 1  # as they are generated


class Answer(pydantic.BaseModel):
    city: Literal["Oslo", "Rome"]
    warm: bool


@pytest.mark.parametrize("model", [MODEL, "pirate"])
def test_a_schema(live, model):
    """Of a model of random weights, which writes nothing of the kind by itself."""
    talk = [{"role": "user", "content": "Hello"}]
    with anthropic.Anthropic(base_url=live.url, api_key="-", max_retries=0) as client:
        for _ in range(3):
            body = {"model": model, "max_tokens": 300, "messages": talk, "output_format": Answer}  # drawn blanks, too
            parsed = client.messages.parse(**body)
            assert parsed.stop_reason == "end_turn"
            assert isinstance(parsed.parsed_output, Answer)
            with client.messages.stream(**body) as stream:
                assert isinstance(stream.get_final_message().parsed_output, Answer)
            # what the package makes of the class, by the older name of the field
            older = {"output_format": {"type": "json_schema", "schema": anthropic.transform_schema(Answer)}}
            message = client.messages.create(model=model, max_tokens=300, messages=talk, extra_body=older)
            assert Answer.model_validate_json(message.content[0].text)


def test_a_schema_that_cannot_be_enforced_is_refused_with_its_keyword(live):
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "no such format"}}, "not": {}}
    for field, body in (
        ("output_config.format", {"output_config": {"format": {"type": "json_schema", "schema": schema}}}),
        ("output_format", {"output_format": {"type": "json_schema", "schema": schema}}),
    ):
        response = live.post("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "a"}], **body})
        assert response.status_code == 400
        assert field in response.json()["error"]["message"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}], ids=lambda c: c["type"])
def test_a_call_that_must_be_made(client, choice):
    """Its arguments satisfy the schema, whatever the model would have written."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    tool = {**WEATHER, "strict": True, "input_schema": {**schema, "additionalProperties": False}}
    body = asked("@thinks", tools=[tool], tool_choice=choice, thinking={"type": "enabled", "budget_tokens": 4})
    message = client.messages.create(**{**body, "max_tokens": 100})
    calls = [block for block in message.content if block.type == "tool_use"]
    assert calls and {block.name for block in calls} == {"weather"}
    assert all(block.input in ({"city": "Oslo"}, {"city": "Rome"}) for block in calls)
    if message.stop_reason != "max_tokens":
        assert message.stop_reason == "tool_use"
