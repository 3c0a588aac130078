"""One conversation in three dialects: the same prompt, and the same answer and counts, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import anthropic
import openai
import pytest
from answers import template
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import MODEL, Live, ok, serving

from examples import examples
from scripted import write_scripted_model
from truffula.server.limits import RequestLimits
from truffula.server.messages_bodies import MessagesBody
from truffula.server.openai_bodies import ChatBody
from truffula.server.responses_bodies import ResponsesBody
from truffula.text.chat_template import ChatTemplates

TEMPLATES = ("qwen3", "gemma_4", "kimi_k2", "mistral_small_3_2", "deepseek_v3_1", "glm_4_6", "gpt_oss", "granite_4")
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
TOOLS = [("weather", "The weather of a city.", WEATHER), ("now", "The time.", NOTHING)]

texts = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=6)
calls = st.lists(
    st.tuples(st.sampled_from(["weather", "now"]), st.dictionaries(st.just("city"), texts)), min_size=1, max_size=3
)
# A step of the assistant is what it thought, what it wrote and its calls, each with the result.
steps = st.tuples(st.just("") | texts, st.just("") | texts, calls)
turns = st.tuples(texts, st.lists(steps, max_size=2), texts)


def ids(prefix: str) -> Iterator[str]:
    return (f"{prefix}{number:024x}" for number in range(1000))


def as_chat(system: str, talk: list[Any]) -> dict[str, Any]:
    numbers = ids("call_")
    found: list[Any] = [{"role": "system", "content": system}]
    for question, done, answer in talk:
        found.append({"role": "user", "content": question})
        for thought, text, made in done:
            asked = [(next(numbers), *call) for call in made]
            functions = [
                {"id": call, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
                for call, name, arguments in asked
            ]
            more = {"reasoning_content": thought} if thought else {}
            found.append({"role": "assistant", "content": text or None, "tool_calls": functions, **more})
            found += [{"role": "tool", "tool_call_id": call, "content": f"of {name}"} for call, name, _ in asked]
        found.append({"role": "assistant", "content": answer})
    found.append({"role": "user", "content": "And?"})
    tools = [
        {"type": "function", "function": {"name": name, "description": text, "parameters": schema}}
        for name, text, schema in TOOLS
    ]
    return {"messages": found, "tools": tools}


def as_responses(system: str, talk: list[Any]) -> dict[str, Any]:
    numbers = ids("call_")
    found: list[Any] = []
    for question, done, answer in talk:
        found.append({"role": "user", "content": question})
        for thought, text, made in done:
            if thought:
                content = [{"type": "reasoning_text", "text": thought}]
                found.append({"type": "reasoning", "id": "rs_1", "summary": [], "content": content})
            if text:
                content = [{"type": "output_text", "text": text, "annotations": []}]
                found.append({"type": "message", "role": "assistant", "content": content})
            asked = [(next(numbers), *call) for call in made]
            found += [
                {"type": "function_call", "call_id": call, "name": name, "arguments": json.dumps(arguments)}
                for call, name, arguments in asked
            ]
            found += [
                {"type": "function_call_output", "call_id": call, "output": f"of {name}"} for call, name, _ in asked
            ]
        found.append({"role": "assistant", "content": answer})
    found.append({"role": "user", "content": "And?"})
    tools = [
        {"type": "function", "name": name, "description": text, "parameters": schema} for name, text, schema in TOOLS
    ]
    return {"instructions": system, "input": found, "tools": tools}


def as_messages(system: str, talk: list[Any]) -> dict[str, Any]:
    numbers = ids("toolu_")
    found: list[Any] = []
    for question, done, answer in talk:
        found.append({"role": "user", "content": question})
        for thought, text, made in done:
            asked = [(next(numbers), *call) for call in made]
            blocks: list[Any] = [{"type": "thinking", "thinking": thought, "signature": "x"}] if thought else []
            blocks += [{"type": "text", "text": text}] if text else []
            blocks += [
                {"type": "tool_use", "id": call, "name": name, "input": arguments} for call, name, arguments in asked
            ]
            results = [
                {"type": "tool_result", "tool_use_id": call, "content": f"of {name}"} for call, name, _ in asked
            ]
            found += [{"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
        found.append({"role": "assistant", "content": answer})
    found.append({"role": "user", "content": "And?"})
    tools = [{"name": name, "description": text, "input_schema": schema} for name, text, schema in TOOLS]
    return {"system": system, "messages": found, "tools": tools, "max_tokens": 100}


LIMITS = RequestLimits(
    max_n=1, max_best_of=1, max_prompts=1, max_stop_sequences=1, max_logprobs=1, max_model_len=1000, vocab_size=1000,
    queue_timeout_s=None, request_timeout_s=None, defaults={}, base_words=(),
)  # fmt: skip


@cache
def templates(name: str) -> ChatTemplates:
    return ChatTemplates({"default": template(name)[0]}, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=examples(15, 200), deadline=None)
@given(system=texts, talk=st.lists(turns, max_size=2))
def test_a_conversation_has_one_prompt_in_every_dialect(name: str, system: str, talk: list[Any]) -> None:
    bodies = [
        ChatBody.model_validate(as_chat(system, talk)),
        ResponsesBody.model_validate(as_responses(system, talk)),
        MessagesBody.model_validate(as_messages(system, talk)),
    ]
    requests = [body.requests(LIMITS, streams=False)[0] for body in bodies]
    chat, responses, messages = (templates(name).render(one) for one in requests)
    assert responses == chat
    assert messages == chat
    assert [templates(name).left_out(one).fields for one in requests] == [(), (), ()]
