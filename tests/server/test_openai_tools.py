"""Tool calls and reasoning in chats, read by the openai client's own types, in replies and in streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from live_server import MODEL, Live, assert_canonical_error, events, ok, serving
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from scripted import write_scripted_model

SCRIPTS = {
    "@weather": ["<tool_call>\n", '{"name": "wea', 'ther", "arguments": {"city"', ': "Os', 'lo"}}', "\n</tool_call>"],
    "@both": [
        "Let me ", "look.", "<tool_call>", '\n{"name":"weather","arguments":{"city":"Rome', '"}}\n', "</tool_call>\n",
        '<tool_call>{"arguments": {}, "name": "now"}', "</tool_call> ",
    ],
    "@broken": ["<tool_call> ", '{"name": "weather", ', "oh no", " </tool_call>"],
    "@thinks": ["<think>", "\nHm. ", "Hard.\n", "</think>\n\n", "42", "."],
    "@opened<think>": ["So it ", "is. ", "</think>", "Yes", "!"],
    "<|fim_prefix|>": ["not a question"],
    "<|fim_suffix|>": ["not one either"],
    "<|fim_middle|>": ["and", " the "],
    "@plain": ["Hel", "lo", " you", ","],
}  # fmt: skip
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
THOUGHTS = ("reasoning_content", "reasoning")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = write_scripted_model(tmp_path_factory.mktemp("scripted"), SCRIPTS)
    with serving(folder, backend="auto") as live:
        yield live


@pytest.fixture(scope="module")
def client(scripted: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="-", max_retries=0) as made:
        yield made


def asked(question: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0, **more}


def calls_of(answer: Any) -> list[tuple[str, Any]]:
    message = answer.choices[0].message
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def test_a_call_instead_of_a_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**asked("@weather", tools=TOOLS))
    (choice,) = answer.choices
    assert calls_of(answer) == [("weather", {"city": "Oslo"})]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].id.startswith("call_")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(SCRIPTS["@weather"]) + 1


def test_a_text_and_two_calls(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**asked("@both", tools=TOOLS, tool_choice="auto"))
    assert calls_of(answer) == [("weather", {"city": "Rome"}), ("now", {})]
    assert answer.choices[0].message.content == "Let me look."
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize("question", list(SCRIPTS))
def test_a_stream_says_what_the_reply_says(client: openai.OpenAI, question: str) -> None:
    """The client's own accumulator joins the deltas."""
    given = asked(question, tools=TOOLS)
    whole = client.chat.completions.create(**given)
    with client.chat.completions.stream(**given, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
    streamed = stream.get_final_completion()
    assert calls_of(streamed) == calls_of(whole)
    one, two = streamed.choices[0], whole.choices[0]
    assert (one.message.content or None) == (two.message.content or None)
    assert one.finish_reason == two.finish_reason
    assert streamed.usage is not None
    assert whole.usage is not None
    assert streamed.usage.completion_tokens_details == whole.usage.completion_tokens_details
    extra = [{name: (m.model_extra or {}).get(name) for name in THOUGHTS} for m in (one.message, two.message)]
    assert extra[0] == extra[1]


def test_deltas_of_a_call_have_its_id_and_name_once(scripted: Live) -> None:
    *chunks, done = events(scripted.post("/v1/chat/completions", asked("@both", tools=TOOLS, stream=True)))
    assert done == "[DONE]"
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    entries = [e for c in chunks for e in c["choices"][0]["delta"].get("tool_calls", ())]
    for index, name in enumerate(("weather", "now")):
        first, *others = [entry for entry in entries if entry["index"] == index]
        assert set(first) == {"index", "id", "type", "function"}
        assert first["function"]["name"] == name
        for other in others:
            assert set(other) == {"index", "function"}
            assert set(other["function"]) == {"arguments"}
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
    assert roles == ["assistant", *[None] * (len(chunks) - 1)]
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "tool_calls"


def test_a_call_that_is_no_call_is_text(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(**asked("@broken", tools=TOOLS)).choices[0].message
    assert message.tool_calls is None
    assert message.content is not None
    assert "oh no" in message.content


def test_without_tools_nothing_is_a_call(scripted: Live) -> None:
    for more in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
        reply = ok(scripted.post("/v1/chat/completions", asked("@weather", **more)))
        (choice,) = reply["choices"]
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"].startswith("<tool_call>")
        assert choice["finish_reason"] == "stop"


def test_a_model_that_may_not_call_is_not_told_of_tools(scripted: Live) -> None:
    def prompt(**more: Any) -> int:
        return ok(scripted.post("/v1/chat/completions", asked("@plain", **more)))["usage"]["prompt_tokens"]

    assert prompt(tools=TOOLS, tool_choice="none") == prompt() < prompt(tools=TOOLS)


@pytest.mark.parametrize("question", ["@thinks", "@opened<think>"])
def test_reasoning_is_apart_from_the_answer(scripted: Live, question: str) -> None:
    reply = ok(scripted.post("/v1/chat/completions", asked(question)))
    ChatCompletion.model_validate(reply)
    message = reply["choices"][0]["message"]
    thought, text = {"@thinks": ("Hm. Hard.", "42."), "@opened<think>": ("So it is.", "Yes!")}[question]
    assert message["content"] == text
    assert [message[name] for name in THOUGHTS] == [thought, thought]
    tokens = reply["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < tokens < reply["usage"]["completion_tokens"]
    hidden = ok(scripted.post("/v1/chat/completions", asked(question, include_reasoning=False)))
    assert hidden["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
    raw = ok(scripted.post("/v1/chat/completions", asked(question, separate_reasoning=False)))
    assert raw["choices"][0]["message"]["content"] == "".join(SCRIPTS[question])


def test_reasoning_is_streamed_before_the_answer(scripted: Live) -> None:
    *chunks, _ = events(scripted.post("/v1/chat/completions", asked("@thinks", stream=True)))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    kinds = [next((k for k in ("reasoning", "content") if d.get(k)), "") for d in deltas]
    assert "".join(d.get("reasoning", "") for d in deltas) == "Hm. Hard."
    assert all(d["reasoning"] == d["reasoning_content"] for d in deltas if "reasoning" in d)
    assert [kind for kind in kinds if kind] == sorted((kind for kind in kinds if kind), reverse=True)


def test_an_effort_switches_reasoning_on_and_off(scripted: Live) -> None:
    def ignored(**more: Any) -> tuple[str | None, str]:
        response = scripted.post("/v1/chat/completions", asked("@plain", max_tokens=1, return_token_ids=True, **more))
        ids = ok(response)["prompt_token_ids"]
        text = ok(scripted.post("/detokenize", {"tokens": ids}))["prompt"]
        return response.headers.get("x-truffula-ignored"), text

    assert "thinking=False" in ignored(reasoning_effort="none")[1]
    listed, text = ignored(reasoning_effort="high")
    assert listed is None
    assert "thinking=True" in text
    given = {"enable_thinking": False}
    assert "thinking=False" in ignored(reasoning_effort="high", chat_template_kwargs=given)[1], (
        "the client's own counts"
    )


def test_the_history_of_calls_is_in_the_prompt(scripted: Live) -> None:
    answer = ok(scripted.post("/v1/chat/completions", asked("@weather", tools=TOOLS)))["choices"][0]["message"]
    call = answer["tool_calls"][0]
    messages = [
        {"role": "user", "content": "@weather"},
        answer,
        {"role": "tool", "tool_call_id": call["id"], "content": "@plain"},
    ]
    reply = ok(
        scripted.post("/v1/chat/completions", asked("", tools=TOOLS, return_token_ids=True) | {"messages": messages})
    )
    assert reply["choices"][0]["message"]["content"] == "Hello you,"
    prompt = ok(scripted.post("/detokenize", {"tokens": reply["prompt_token_ids"]}))["prompt"]
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in prompt


def test_stop_strings_apply_before_calls_are_parsed(scripted: Live) -> None:
    reply = ok(scripted.post("/v1/chat/completions", asked("@both", tools=TOOLS, stop=["<tool_call>"])))
    assert reply["choices"][0]["message"]["content"] == "Let me look."
    assert (reply["choices"][0]["finish_reason"], reply["choices"][0]["stop_reason"]) == ("stop", "<tool_call>")


def test_a_suffix_is_part_of_the_prompt(scripted: Live) -> None:
    body = {"model": MODEL, "prompt": "speaks", "suffix": "trees", "temperature": 0, "return_token_ids": True}
    (choice,) = ok(scripted.post("/v1/completions", body))["choices"]
    assert choice["text"] == "and the "
    prompt = ok(scripted.post("/detokenize", {"tokens": choice["prompt_token_ids"]}))["prompt"]
    assert prompt == "<|fim_prefix|>speaks<|fim_suffix|>trees<|fim_middle|>"
    for more in ({"echo": True}, {"prompt": [5, 6]}, {"prompt": [[5], [6]]}):
        error = assert_canonical_error(scripted.post("/v1/completions", body | more), 400)
        assert error["param"] == "suffix"


def test_as_many_logprobs_as_token_ids(scripted: Live) -> None:
    body = {"model": MODEL, "prompt": "@plain", "temperature": 0, "logprobs": 0, "return_token_ids": True}
    (choice,) = ok(scripted.post("/v1/completions", body))["choices"]
    assert choice["finish_reason"] == "stop"
    assert {len(values) for values in choice["logprobs"].values()} == {len(choice["token_ids"])} == {5}
    assert "".join(choice["logprobs"]["tokens"][:-1]) == choice["text"] == "Hello you,"
    assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])
    (other,) = ok(scripted.post("/v1/completions", body | {"return_token_ids": None}))["choices"]
    assert "".join(other["logprobs"]["tokens"]) == other["text"]
    chat = ok(scripted.post("/v1/chat/completions", asked("@plain", logprobs=True, return_token_ids=True)))["choices"][
        0
    ]
    assert len(chat["logprobs"]["content"]) == len(chat["token_ids"]) == 5


def test_text_generations_dialect_of_a_streamed_call(scripted: Live) -> None:
    """One call a chunk, as an object with all of its keys."""
    *chunks, _ = events(
        scripted.post("/v1/chat/completions", asked("@both", tools=TOOLS, stream=True) | {"model": "tgi"})
    )
    arguments = {0: "", 1: ""}
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        assert delta["role"] == "assistant"
        if (call := delta["tool_calls"]) is not None:
            assert isinstance(call["id"], str)
            assert call["type"] == "function"
            assert "name" in call["function"]
            arguments[call["index"]] += call["function"]["arguments"]
    assert [json.loads(text) for text in arguments.values()] == [{"city": "Rome"}, {}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": ["weather"]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": TOOLS * 2}, "tools[2].function.name"),
        ({"tools": TOOLS, "tool_choice": "other"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "now"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 3}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "functions": [{"name": "f"}]}, "functions"),
        ({"tools": TOOLS, "function_call": {"name": "f"}}, "function_call"),
        ({"tools": TOOLS, "separate_reasoning": False}, "separate_reasoning"),
        ({"thinking_token_budget": -2}, "thinking_token_budget"),
        ({"tools": [TOOLS[1]] * 2000}, "tools"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else value,
)  # fmt: skip
def test_what_is_no_tool_or_choice_is_refused(scripted: Live, fields: dict[str, Any], param: str) -> None:
    error = assert_canonical_error(scripted.post("/v1/chat/completions", asked("@plain", **fields)), 400)
    assert error["param"] == param


NAMES = ("weather", "now")


def forced(live: Live, **more: Any) -> Any:
    """The answer of a model that would say something else."""
    body = asked("@plain", tools=TOOLS, max_tokens=300) | {"temperature": 1, "seed": 5, **more}
    choice = ok(live.post("/v1/chat/completions", body))["choices"][0]
    assert choice["finish_reason"] in ("tool_calls", "stop"), choice
    return choice


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", NAMES),
        ("now", ("now",)),
        ({"type": "function", "function": {"name": "weather"}}, ("weather",)),
        ({"function": {"name": "now"}}, ("now",)),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "now"}}],
                },
            },
            ("now",),
        ),
    ],
    ids=["required", "bare name", "named", "TGI's", "allowed"],
)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_demanded_call_is_made(scripted: Live, choice: Any, names: tuple[str, ...], parallel: bool) -> None:
    found = forced(scripted, tool_choice=choice, parallel_tool_calls=parallel)
    calls = found["message"]["tool_calls"]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    assert len(calls) == 1 or (parallel and (choice == "required" or choice.get("type") == "allowed_tools"))
    for call in calls:
        assert call["function"]["name"] in names
        arguments = json.loads(call["function"]["arguments"])
        assert isinstance(arguments["city"], str) if call["function"]["name"] == "weather" else arguments == {}


def test_only_allowed_tools_are_called(scripted: Live) -> None:
    """The model's script calls another one."""
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    body = asked(
        "@weather", tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}, max_tokens=60
    )
    message = ok(scripted.post("/v1/chat/completions", body))["choices"][0]["message"]
    assert {call["function"]["name"] for call in message.get("tool_calls", ())} <= {"now"}


def test_at_most_one_call(scripted: Live) -> None:
    one = ok(scripted.post("/v1/chat/completions", asked("@both", tools=TOOLS, parallel_tool_calls=False)))
    assert len(one["choices"][0]["message"]["tool_calls"]) == 1


class Forecast(BaseModel, extra="forbid"):
    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2, 3]
    metric: bool


def test_the_clients_tool_helpers(client: openai.OpenAI) -> None:
    """``pydantic_function_tool`` makes strict tools; ``parse`` and ``stream`` read the arguments into the model."""
    given: Any = asked("@plain") | {"temperature": 1, "seed": 2, "max_tokens": 300}
    given |= {"tools": [openai.pydantic_function_tool(Forecast)], "tool_choice": "required"}
    given["parallel_tool_calls"] = False
    parsed = client.chat.completions.parse(**given)
    calls = parsed.choices[0].message.tool_calls
    assert calls is not None
    assert isinstance(calls[0].function.parsed_arguments, Forecast)
    with client.chat.completions.stream(**given) as stream:
        kinds = [event.type for event in stream]
    assert "tool_calls.function.arguments.done" in kinds
    again = stream.get_final_completion().choices[0].message.tool_calls
    assert again is not None
    assert again[0].function.parsed_arguments == calls[0].function.parsed_arguments


def test_the_clients_response_formats(client: openai.OpenAI) -> None:
    given: Any = asked("@plain") | {"temperature": 1, "seed": 2, "max_tokens": 300, "response_format": Forecast}
    message = client.chat.completions.parse(**given).choices[0].message
    assert isinstance(message.parsed, Forecast)
    with client.chat.completions.stream(**given) as stream:
        for _ in stream:
            pass
    assert stream.get_final_completion().choices[0].message.parsed == message.parsed
    with_tools = client.chat.completions.parse(**given, tools=[openai.pydantic_function_tool(Forecast, name="ask")])
    message = with_tools.choices[0].message
    assert isinstance(message.parsed, Forecast) or message.tool_calls


@pytest.mark.parametrize("question", ["@thinks", "@opened<think>"])
def test_a_constraint_begins_after_the_reasoning(scripted: Live, question: str) -> None:
    schema = Forecast.model_json_schema()
    given = {"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": schema, "strict": True}}}
    body = asked(question, max_tokens=300, **given) | {"temperature": 1, "seed": 3}
    message = ok(scripted.post("/v1/chat/completions", body))["choices"][0]["message"]
    assert message["reasoning"] == {"@thinks": "Hm. Hard.", "@opened<think>": "So it is."}[question]
    Forecast.model_validate_json(message["content"])


def test_a_budget_ends_the_reasoning(scripted: Live) -> None:
    tokens = []
    for budget in (0, 1, 50, -1):
        body = asked("@opened<think>", max_tokens=60, thinking_token_budget=budget)
        reply = ok(scripted.post("/v1/chat/completions", body))
        tokens.append(reply["usage"]["completion_tokens_details"]["reasoning_tokens"])
        thought = reply["choices"][0]["message"].get("reasoning", "")
        assert "So it is.".startswith(thought)
    assert tokens == sorted(tokens)
    assert tokens[0] <= 1 < tokens[-1]


def test_a_call_cannot_be_demanded_of_a_model_without_a_form_of_calls(live: Live) -> None:
    body = asked("Hello", tools=TOOLS, tool_choice="required")
    error = assert_canonical_error(live.post("/v1/chat/completions", body), 400)
    assert error["param"] == "tool_choice"
    response = live.post("/v1/chat/completions", asked("Hello", tools=TOOLS, max_tokens=1))
    assert response.headers["x-truffula-ignored"] == "tools", "this template does not write them"
