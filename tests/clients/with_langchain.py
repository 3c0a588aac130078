"""LangChain: ChatOpenAI, on chat completions and on responses."""

from __future__ import annotations

import asyncio

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from scenario import ADAPTER, BASE, QUESTION, URL, differ, raises
from trip import Trip

SHORT = {"base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0, "temperature": 0, "max_tokens": 12}
LONG = {**SHORT, "max_tokens": 300}


def plain(**more: object) -> str:
    whole = differ(lambda model: ChatOpenAI(model=model, **SHORT, **more).invoke(QUESTION).text)
    model = ChatOpenAI(model=ADAPTER, stream_usage=True, **SHORT, **more)
    chunks = list(model.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == whole
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata["output_tokens"] == model.invoke(QUESTION).usage_metadata["output_tokens"] > 0
    return whole


def structured(**more: object) -> None:
    model = ChatOpenAI(model=ADAPTER, **LONG, **more)
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(Trip, method=method, include_raw=True).invoke(QUESTION)
        assert isinstance(found["parsed"], Trip) and found["parsing_error"] is None
    assert isinstance(list(model.with_structured_output(Trip).stream(QUESTION))[-1], Trip)


def tools(**more: object) -> None:
    model = ChatOpenAI(model=ADAPTER, **LONG, **more).bind_tools(
        [Trip], tool_choice="required", parallel_tool_calls=False, strict=True
    )
    message = model.invoke(QUESTION)
    (call,) = message.tool_calls
    assert not message.invalid_tool_calls
    Trip.model_validate(call["args"])
    first, *others = model.stream(QUESTION)
    for chunk in others:
        first += chunk
    assert [one["args"] for one in first.tool_calls] == [call["args"]]
    talk = [HumanMessage(QUESTION), message, ToolMessage("Booked.", tool_call_id=call["id"])]
    assert ChatOpenAI(model=ADAPTER, **SHORT, **more).invoke(talk).text


def errors(**more: object) -> None:
    unknown = ChatOpenAI(model="missing", **SHORT, **more)
    wrong = ChatOpenAI(model=BASE, **{**SHORT, "temperature": -1}, **more)
    raises(openai.NotFoundError, lambda: unknown.invoke("a"), "missing")
    raises(openai.NotFoundError, lambda: list(unknown.stream("a")), "missing")
    raises(openai.BadRequestError, lambda: wrong.invoke("a"), "temperature")
    raises(openai.BadRequestError, lambda: list(wrong.stream("a")), "temperature")


async def concurrent(expected: str) -> None:
    model = ChatOpenAI(model=ADAPTER, **SHORT)
    assert [one.text for one in await model.abatch([QUESTION] * 4)] == [expected] * 4
    assert "".join([chunk.text async for chunk in model.astream(QUESTION)]) == expected


answer = plain()
assert plain(use_responses_api=True) == answer
asyncio.run(concurrent(answer))
structured()
structured(use_responses_api=True)
tools()
tools(use_responses_api=True)
errors()
errors(use_responses_api=True)
completion = OpenAI(model=ADAPTER, **SHORT)
assert "".join(completion.stream(QUESTION)) == completion.invoke(QUESTION)
