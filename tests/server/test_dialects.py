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
from live_server import MODEL, Live, serving

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
            results = [{"type": "tool_result", "tool_use_id": call, "content": f"of {name}"} for call, name, _ in asked]
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


SCRIPTS = {
    "@call": ["<tool_call>\n", '{"name": "wea', 'ther", "arguments": {"city"', ': "Os', 'lo"}}', "\n</tool_call>"],
    "@calls": ["Let me ", "look.", "<tool_call>", '\n{"name":"weather","arguments":{"city":"Rome', '"}}\n',
               "</tool_call>\n ", '<tool_call>{"arguments": {}, "name": "now"}', "</tool_call> "],
    "@thinks": ["<think>\n", "Hm. ", "Hard.\n", "</think>\n\n", "42", "."],
    "@thinks and calls": ["<think> ", "I must. ", "</think>\n", "<tool_call>  ", '{"name":"now","arguments":{}}',
                          "</tool_call>\n\n"],
    "@opened<think>": ["So it ", "is. ", "\n</think>", "Yes", "!!"],
    "@stop": ["abc", "defSTO", "P more", '<tool_call>{"name":"now","arguments":{} }</tool_call>'],
    "@space": [" ", "\n "],
    "@nothing": [],
    "@no call": ["<tool_call> ", '{"name": "weather", ', "oh no", " </tool_call>"],
    "@broken": ["Well ", '<tool_call>{"name": "weather", "arguments": {"ci', 'ty": oops}', "} </tool_call>", " done"],
    "@closed": ["Mm ", "mm. ", " </think>", "Right", "!"],
}  # fmt: skip
LATE = ("@broken", "@closed")  # what only the whole answer shows not to be a call, or to be reasoning
Answer = tuple[str, str, list[tuple[str, Any]], tuple[int, int, int]]
"""Text, reasoning, calls; tokens of the prompt, of the answer and of its reasoning."""


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(write_scripted_model(tmp_path_factory.mktemp("scripted"), SCRIPTS), backend="auto") as live:
        yield live


@cache
def clients(url: str) -> tuple[openai.OpenAI, anthropic.Anthropic]:
    more: Any = {"api_key": "-", "max_retries": 0}
    return openai.OpenAI(base_url=f"{url}/v1", **more), anthropic.Anthropic(base_url=url, **more)


def of_chat(live: Live, question: str, stream: bool, tools: Any, length: int) -> Answer:
    body: Any = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0, "stop": "STOP",
                 "max_tokens": length, **tools}  # fmt: skip
    client = clients(live.url)[0]
    if stream:
        state = openai.lib.streaming.chat.ChatCompletionStreamState()
        for chunk in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
            state.handle_chunk(chunk)
        found: Any = state.current_completion_snapshot
    else:
        found = client.chat.completions.create(**body)
    message, usage = found.choices[0].message, found.usage
    made = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    thought = getattr(message, "reasoning_content", "")
    counts = usage.prompt_tokens, usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens
    return message.content or "", thought, made, counts


def of_responses(live: Live, question: str, stream: bool, tools: Any, length: int) -> Answer:
    body: Any = {"model": MODEL, "input": question, "temperature": 0, "max_output_tokens": length,
                 "extra_body": {"stop": "STOP"}, **tools}  # fmt: skip
    client = clients(live.url)[0]
    if stream:
        *_, last = client.responses.create(**body, stream=True)
        found: Any = last.response
    else:
        found = client.responses.create(**body)
    text = "".join(part.text for item in found.output if item.type == "message" for part in item.content)
    thought = "".join(part.text for item in found.output if item.type == "reasoning" for part in item.content)
    made = [(item.name, item.arguments) for item in found.output if item.type == "function_call"]
    usage = found.usage
    return text, thought, made, (usage.input_tokens, usage.output_tokens, usage.output_tokens_details.reasoning_tokens)


def of_messages(live: Live, question: str, stream: bool, tools: Any, length: int) -> Answer:
    body: Any = {"model": MODEL, "messages": [{"role": "user", "content": question}], **tools}
    more = {"max_tokens": length, "stop_sequences": ["STOP"], "extra_body": {"temperature": 0}}
    client = clients(live.url)[1]
    if stream:
        with client.messages.stream(**body, **more) as events:
            found: Any = events.get_final_message()
    else:
        found = client.messages.create(**body, **more)
    counted = client.messages.count_tokens(**body).input_tokens
    text = "".join(block.text for block in found.content if block.type == "text")
    thought = "".join(block.thinking for block in found.content if block.type == "thinking")
    made = [(block.name, block.input) for block in found.content if block.type == "tool_use"]
    usage = found.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted
    return text, thought, made, (counted, usage.output_tokens, usage.output_tokens_details.thinking_tokens)


@pytest.mark.parametrize("question", SCRIPTS)
@pytest.mark.parametrize(("with_tools", "length"), [(True, 64), (True, 3), (False, 64)])
def test_an_answer_is_one_in_every_dialect(scripted: Live, question: str, length: int, with_tools: bool) -> None:
    bodies = (as_chat("", []), as_responses("", []), as_messages("", []))
    chat, responses, messages = ({"tools": body["tools"]} if with_tools else {} for body in bodies)
    for stream in (False, True):
        expected = of_chat(scripted, question, stream, chat, length)
        assert of_responses(scripted, question, stream, responses, length) == expected
        text, thought, made, counts = of_messages(scripted, question, stream, messages, length)
        assert (text, thought, counts) == (*expected[:2], expected[3])
        assert [name for name, _ in made] == [name for name, _ in expected[2]]
        if stream and question in LATE:
            continue
        if length == 64:
            assert [given for _, given in made] == [json.loads(given) for _, given in expected[2]]
        if stream and not (expected[2] and length == 3):
            assert expected == of_chat(scripted, question, False, chat, length), "a stream says the same"


def test_a_reply_that_is_not_streamed_has_a_broken_call_as_text(scripted: Live) -> None:
    for streamed in (False, True):
        text, _, made, _ = of_chat(scripted, "@broken", streamed, {"tools": as_chat("", [])["tools"]}, 64)
        assert [name for name, _ in made] == (["weather"] if streamed else [])
        assert streamed or text == "".join(SCRIPTS["@broken"])


def test_a_reply_that_is_not_streamed_has_reasoning_that_nothing_opened(scripted: Live) -> None:
    text, thought, _, (_, tokens, reasoning) = of_chat(scripted, "@closed", False, {}, 64)
    assert (text, thought) == ("Right!", "Mm mm.")
    assert (tokens, reasoning) == (6, 2)


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "low"},
         "reasoning_effort"),
        ("responses", {"input": "Hi", "reasoning": {"effort": "low"}}, "reasoning.effort"),
        ("responses/input_tokens", {"input": "Hi", "reasoning": {"effort": "low"}}, "reasoning.effort"),
        ("messages", {"messages": [{"role": "user", "content": "Hi"}], "thinking": {"type": "adaptive"}}, "thinking"),
        ("messages", {"messages": [{"role": "user", "content": "Hi"}], "output_config": {"effort": "low"}},
         "output_config.effort"),
        ("messages/count_tokens", {"messages": [{"role": "user", "content": "Hi"}],
                                   "output_config": {"effort": "low"}, "thinking": {"type": "disabled"}}, "thinking"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_has_the_clients_name(
    live: Live, path: str, body: dict[str, Any], fields: str
) -> None:
    more = {"max_tokens": 2} if path == "messages" else {}
    response = live.post(f"/v1/{path}", {**body, **more})
    assert response.status_code == 200, response.text
    assert response.headers["x-truffula-ignored"] == fields
