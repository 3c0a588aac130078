"""LiteLLM: chats, completions and responses, as hosted_vllm and as openai; sync and async."""

from __future__ import annotations

import asyncio
from copy import deepcopy

import litellm
from scenario import ADAPTER, BASE, QUESTION, TALK, URL, differ, raises
from trip import TOOL, Trip

litellm.telemetry = False
SERVER = {"api_base": f"{URL}/v1", "api_key": "none", "num_retries": 0, "max_retries": 0}
SHORT = {"messages": TALK, "max_tokens": 16, "temperature": 0, **SERVER}  # LiteLLM asks for 16 tokens at least
LONG = {**SHORT, "max_tokens": 300}


def plain(prefix: str) -> str:
    whole = differ(lambda name: litellm.completion(model=prefix + name, **SHORT).choices[0].message.content)
    chunks = list(litellm.completion(model=prefix + ADAPTER, stream=True, **SHORT))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == whole
    short = {"prompt": QUESTION, "max_tokens": 8, "temperature": 0, **SERVER}
    text = differ(lambda name: litellm.text_completion(model=prefix + name, **short).choices[0].text)
    chunks = litellm.text_completion(model=prefix + ADAPTER, stream=True, **short)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == text
    return whole


def structured(prefix: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "Trip", "schema": Trip.model_json_schema()}}
    for form in (Trip, schema):
        answer = litellm.completion(model=prefix + ADAPTER, response_format=form, **LONG)
        Trip.model_validate_json(answer.choices[0].message.content)


def tools(prefix: str) -> None:
    tool = deepcopy(TOOL)
    if prefix == "hosted_vllm/":  # which drops additionalProperties
        tool["function"]["parameters"]["maxProperties"] = 3
    given = {**LONG, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    message = litellm.completion(model=prefix + ADAPTER, **given).choices[0].message
    (call,) = message.tool_calls
    Trip.model_validate_json(call.function.arguments)
    chunks = list(litellm.completion(model=prefix + ADAPTER, stream=True, **given))
    (again,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert again.function == call.function
    result = {"role": "tool", "tool_call_id": call.id, "content": "Booked."}
    talk = {**SHORT, "messages": [*TALK, message.model_dump(), result], "tools": [tool], "tool_choice": "none"}
    assert litellm.completion(model=prefix + ADAPTER, **talk).choices[0].message.content


def responses(prefix: str, expected: str) -> None:
    short = {"input": QUESTION, "max_output_tokens": 16, "temperature": 0, **SERVER}
    assert litellm.responses(model=prefix + ADAPTER, **short).output_text == expected
    events = litellm.responses(model=prefix + ADAPTER, stream=True, **short)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected


def errors(prefix: str) -> None:
    for stream in (False, True):
        ask = lambda stream=stream, **more: list(litellm.completion(stream=stream, **{**SHORT, **more}))
        raises(litellm.NotFoundError, lambda ask=ask: ask(model=prefix + "missing"), "missing")
        raises(litellm.BadRequestError, lambda ask=ask: ask(model=prefix + BASE, temperature=-1), "temperature")


async def concurrent(prefix: str, expected: str) -> None:
    answers = await asyncio.gather(*(litellm.acompletion(model=prefix + ADAPTER, **SHORT) for _ in range(4)))
    assert [answer.choices[0].message.content for answer in answers] == [expected] * 4


for prefix in ("hosted_vllm/", "openai/"):
    answer = plain(prefix)
    structured(prefix)
    tools(prefix)
    responses(prefix, answer)
    errors(prefix)
    asyncio.run(concurrent(prefix, answer))
(greedy,) = litellm.completion(model=f"hosted_vllm/{ADAPTER}", top_k=1, **{**SHORT, "temperature": 1}).choices
assert greedy.message.content == answer
