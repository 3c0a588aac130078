"""LlamaIndex: OpenAILike, on chats and on completions."""

from __future__ import annotations

import asyncio

import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from scenario import ADAPTER, BASE, QUESTION, URL, differ, raises
from trip import Trip

TALK = [ChatMessage(role="user", content=QUESTION)]


def llm(model: str = ADAPTER, **more: object) -> OpenAILike:
    given = {"max_tokens": 12, "temperature": 0.0, "is_chat_model": True, "max_retries": 0, "context_window": 2048}
    return OpenAILike(model=model, api_base=f"{URL}/v1", api_key="none", **given | more)


def plain() -> None:
    for chat in (True, False):
        whole = differ(lambda name, chat=chat: llm(name, is_chat_model=chat).complete(QUESTION).text)
        asked = llm(is_chat_model=chat)
        assert "".join(part.delta for part in asked.stream_complete(QUESTION)) == whole
        assert list(asked.stream_complete(QUESTION))[-1].text == whole
    whole = differ(lambda name: llm(name).chat(TALK).message.content)
    assert "".join(part.delta for part in llm().stream_chat(TALK)) == whole


def structured() -> None:
    long = {"max_tokens": 300}
    prompt = PromptTemplate("{question}")
    asked = llm(should_use_structured_outputs=True, **long)
    found = asked.structured_predict(Trip, prompt, question=QUESTION)
    assert isinstance(found, Trip)
    assert asked.as_structured_llm(Trip).complete(QUESTION).raw == found
    assert list(asked.stream_structured_predict(Trip, prompt, question=QUESTION))[-1] == found
    with_tools = llm(is_function_calling_model=True, **long)
    assert isinstance(with_tools.structured_predict(Trip, prompt, question=QUESTION), Trip)


def tools() -> None:
    tool = FunctionTool.from_defaults(lambda **given: "Booked.", name="trip", description="", fn_schema=Trip)
    asked = llm(is_function_calling_model=True, strict=True, max_tokens=300)
    given = {"user_msg": QUESTION, "tool_required": True, "allow_parallel_tool_calls": False}
    answer = asked.chat_with_tools([tool], **given)
    (call,) = asked.get_tool_calls_from_response(answer)
    Trip.model_validate(call.tool_kwargs)
    *_, last = asked.stream_chat_with_tools([tool], **given)
    assert [one.tool_kwargs for one in asked.get_tool_calls_from_response(last)] == [call.tool_kwargs]
    result = ChatMessage(role="tool", content="Booked.", additional_kwargs={"tool_call_id": call.tool_id})
    assert llm().chat([*TALK, answer.message, result]).message.content


def errors() -> None:
    for chat in (True, False):
        raises(openai.NotFoundError, lambda chat=chat: llm("missing", is_chat_model=chat).complete("a"), "missing")
        wrong = llm(BASE, additional_kwargs={"top_p": 3}, is_chat_model=chat)
        raises(openai.BadRequestError, lambda wrong=wrong: wrong.complete("a"), "top_p")
        raises(openai.BadRequestError, lambda wrong=wrong: list(wrong.stream_complete("a")), "top_p")


async def concurrent() -> None:
    expected, asked = llm().complete(QUESTION).text, llm()
    answers = await asyncio.gather(*(asked.acomplete(QUESTION) for _ in range(4)))
    assert [answer.text for answer in answers] == [expected] * 4
    assert "".join([part.delta async for part in await asked.astream_complete(QUESTION)]) == expected


plain()
structured()
tools()
errors()
asyncio.run(concurrent())
