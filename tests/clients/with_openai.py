"""openai: chats, completions, parse, the tools helper, responses; sync and async."""

from __future__ import annotations

import asyncio

import openai
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from scenario import ADAPTER, BASE, QUESTION, TALK, URL, differ, raises
from trip import Trip

CLIENT = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
SHORT = {"messages": TALK, "max_tokens": 12, "temperature": 0}


def chat(model: str) -> str:
    return CLIENT.chat.completions.create(model=model, **SHORT).choices[0].message.content


def plain() -> None:
    whole = differ(chat)
    chunks = list(CLIENT.chat.completions.create(model=ADAPTER, stream=True, **SHORT))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    with CLIENT.chat.completions.stream(model=ADAPTER, **SHORT) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
    assert deltas == stream.current_completion_snapshot.choices[0].message.content == whole
    completion = {"prompt": QUESTION, "max_tokens": 8, "temperature": 0}
    text = differ(lambda model: CLIENT.completions.create(model=model, **completion).choices[0].text)
    chunks = CLIENT.completions.create(model=ADAPTER, stream=True, **completion)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def structured() -> None:
    asked = {"model": ADAPTER, "messages": TALK, "max_tokens": 300, "temperature": 0, "response_format": Trip}
    whole = CLIENT.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(whole, Trip)
    with CLIENT.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
    assert stream.get_final_completion().choices[0].message.parsed == whole


def tools() -> None:
    asked = {"model": ADAPTER, "messages": TALK, "max_tokens": 300, "temperature": 0, "tool_choice": "required"}
    asked |= {"tools": [pydantic_function_tool(Trip)], "parallel_tool_calls": False}
    message = CLIENT.chat.completions.parse(**asked).choices[0].message
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Trip)
    with CLIENT.chat.completions.stream(**asked) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [call.function.parsed_arguments]
    result = {"role": "tool", "tool_call_id": call.id, "content": "Booked."}
    following = {**SHORT, "messages": [*TALK, message, result], "tools": asked["tools"], "tool_choice": "none"}
    assert CLIENT.chat.completions.create(model=ADAPTER, **following).choices[0].message.content


def responses() -> None:
    short = {"input": QUESTION, "max_output_tokens": 12, "temperature": 0}
    whole = differ(lambda model: CLIENT.responses.create(model=model, **short).output_text)
    with CLIENT.responses.stream(model=ADAPTER, **short) as stream:
        events = list(stream)
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    first = events[-1].response
    assert deltas == first.output_text == whole
    again = CLIENT.responses.create(model=ADAPTER, previous_response_id=first.id, **short)
    assert again.usage.input_tokens > first.usage.input_tokens
    assert CLIENT.responses.retrieve(first.id).output_text == whole
    long = {"model": ADAPTER, "input": QUESTION, "max_output_tokens": 300}
    assert isinstance(CLIENT.responses.parse(text_format=Trip, **long).output_parsed, Trip)
    tool = openai.pydantic_function_tool(Trip)["function"]
    tool = {"type": "function", **tool}
    called = CLIENT.responses.parse(tools=[tool], tool_choice="required", parallel_tool_calls=False, **long)
    (call,) = [item for item in called.output if item.type == "function_call"]
    Trip.model_validate_json(call.arguments)
    CLIENT.responses.delete(first.id)
    raises(openai.NotFoundError, lambda: CLIENT.responses.retrieve(first.id), first.id)


def errors() -> None:
    for stream in (False, True):
        create = lambda stream=stream, **more: CLIENT.chat.completions.create(stream=stream, **{**SHORT, **more})
        raises(openai.NotFoundError, lambda create=create: create(model="missing"), "missing")
        raises(openai.BadRequestError, lambda create=create: create(model=BASE, temperature=-1), "temperature")
        raises(openai.BadRequestError, lambda create=create: create(model=BASE, max_tokens=10**6), "max_tokens")
    raises(openai.NotFoundError, lambda: CLIENT.responses.create(model="missing", input="a"), "missing")


async def concurrent() -> None:
    expected = {name: chat(name) for name in (BASE, ADAPTER)}
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
        names = [BASE, ADAPTER] * 4
        answers = await asyncio.gather(*(client.chat.completions.create(model=name, **SHORT) for name in names))
    assert [answer.choices[0].message.content for answer in answers] == [expected[name] for name in names]


assert {model.id for model in CLIENT.models.list()} >= {BASE, ADAPTER}
plain()
structured()
tools()
responses()
errors()
asyncio.run(concurrent())
