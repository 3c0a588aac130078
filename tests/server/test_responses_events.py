"""The events of ``ResponseWriter`` for any answer, read by the openai client's own stream state."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from truffula.errors import EngineDied, Overloaded
from truffula.items import Reasoning, Text, ToolCallPart
from truffula.server.responses_events import ResponseWriter
from truffula.server.responses_tools import custom_arguments, read_tools
from truffula.types import ChoiceTotals, TextDelta

EVENT = TypeAdapter(ResponseStreamEvent)
TOOLS = [
    {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False},
    {"type": "custom", "name": "note", "format": {"type": "grammar", "syntax": "regex", "definition": "[a-z]+"}},
    {"type": "namespace", "name": "agents", "description": "", "tools": [{"type": "function", "name": "spawn"}]},
    {"type": "local_shell"},
    {"type": "shell"},
    {"type": "apply_patch"},
]
ARGUMENTS = {
    "weather": '{"city": "Truffula"}',
    "note": custom_arguments("höher\n"),
    "agents__spawn": "{}",
    "local_shell": '{"command": ["ls"], "timeout_ms": 5}',
    "shell": '{"commands": ["ls -la"]}',
    "apply_patch": '{"type": "create_file", "path": "a", "diff": "+b"}',
}
TOP = {
    "id": "resp_00ff", "object": "response", "created_at": 1, "model": "m", "parallel_tool_calls": True,
    "tool_choice": "auto", "tools": [], "instructions": None,
}  # fmt: skip
IDS = ("id", "call_id", "status")
TOTALS = ChoiceTotals(prompt_tokens=7, completion_tokens=5, cached_tokens=3)


@st.composite
def answers(draw):
    """Parts of an answer, each split anywhere."""
    parts, calls = [], 0
    for kind in draw(st.lists(st.sampled_from(["text", "reasoning", "space", *ARGUMENTS]), max_size=6)):
        if kind in ARGUMENTS:
            parts.append(ToolCallPart(calls, id=f"call_{calls}", name=kind))
            text, make = ARGUMENTS[kind], lambda piece, at=calls: ToolCallPart(at, piece)
            calls += 1
        else:
            text = "\n\n" if kind == "space" else f"{kind} ü "
            make = Reasoning if kind == "reasoning" else Text
        while text:
            size = draw(st.integers(1, len(text)))
            parts.append(make(text[:size]))
            text = text[size:]
    return parts


def events_of(frames):
    found = []
    for one in frames.decode().split("\n\n")[:-1]:
        name, data = one.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def written(parts, silent=False, finish="stop"):
    writer = ResponseWriter(TOP, read_tools(TOOLS), logprobs=False, silent=silent)
    out = writer.begin()
    for part in parts:
        out += writer.delta(0, TextDelta(parts=[part]))
    out += writer.delta(0, TextDelta(finish_reason=finish, totals=TOTALS)) + writer.end()
    return writer, out


@settings(max_examples=25, deadline=None)
@given(answers(), st.sampled_from(["stop", "length"]))
def test_the_clients_stream_state_accumulates_the_response(parts, finish):
    writer, out = written(parts, finish=finish)
    events = events_of(out)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    state = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        read = EVENT.validate_python(event)
        assert read.type == event["type"]
        state.handle_event(read)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == ("response.completed" if finish == "stop" else "response.incomplete")
    assert events[-1]["response"] == writer.response()
    Response.model_validate(writer.response())
    assert writer.output == written(parts, silent=True, finish=finish)[0].output
    assert len({item["id"] for item in writer.output}) == len(writer.output) > 0


@given(answers())
def test_nothing_of_the_answer_is_lost_or_repeated(parts):
    writer, out = written(parts)
    text = "".join(part.text for part in parts if isinstance(part, Text))
    shown = "".join(part["text"] for item in writer.output if item["type"] == "message" for part in item["content"])
    assert "".join(shown.split()) == "".join(text.split())  # white space between other items is no message
    thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
    assert thought == "".join(
        part["text"] for item in writer.output if item["type"] == "reasoning" for part in item["content"]
    )
    names = [part.name for part in parts if isinstance(part, ToolCallPart) and part.name]
    calls = [item for item in writer.output if "call_id" in item]
    assert [item["call_id"] for item in calls] == [f"call_{i}" for i in range(len(names))]
    assert calls == [writer._tools.call_item(name, ARGUMENTS[name], {k: item[k] for k in IDS})
                     for name, item in zip(names, calls, strict=True)]  # fmt: skip
    deltas = {}
    for event in events_of(out):
        if event["type"].endswith(".delta"):
            deltas[event["item_id"]] = deltas.get(event["item_id"], "") + event["delta"]
    for item in writer.output:
        whole = item.get("arguments", item.get("input", "".join(part["text"] for part in item.get("content", ()))))
        if item["type"] not in ("local_shell_call", "shell_call", "apply_patch_call"):
            assert deltas.get(item["id"], "") == whole


def test_a_function_s_arguments_are_sent_as_they_come():
    parts = [ToolCallPart(0, id="call_0", name="weather"), ToolCallPart(0, '{"city": '), ToolCallPart(0, '"A"}')]
    writer, out = written(parts)
    kinds = [event["type"] for event in events_of(out)][2:-1]
    assert kinds == [
        "response.output_item.added", *["response.function_call_arguments.delta"] * 2,
        "response.function_call_arguments.done", "response.output_item.done",
    ]  # fmt: skip
    (item,) = writer.output
    assert item["arguments"] == '{"city": "A"}' and item["call_id"] == "call_0" and item["id"].startswith("fc_")


def test_calls_of_the_other_tools_are_items_of_their_own():
    names = ["note", "agents__spawn", "local_shell", "shell", "apply_patch"]
    parts = [ToolCallPart(i, ARGUMENTS[name], id=f"call_{i}", name=name) for i, name in enumerate(names)]
    note, spawn, local, shell, patch = written(parts)[0].output
    assert note["type"] == "custom_tool_call" and note["input"] == "höher\n"
    assert (spawn["type"], spawn["namespace"], spawn["name"]) == ("function_call", "agents", "spawn")
    assert local["action"] == {"type": "exec", "env": {}, "command": ["ls"], "timeout_ms": 5}
    assert shell["action"] == {"commands": ["ls -la"]}
    assert patch["operation"] == {"type": "create_file", "path": "a", "diff": "+b"}


@pytest.mark.parametrize(
    ("error", "code"), [(EngineDied("gone"), "server_error"), (Overloaded("full"), "rate_limit_exceeded")], ids=str
)
def test_an_error_ends_the_response_as_failed(error, code):
    writer = ResponseWriter(TOP, read_tools([]), logprobs=False, silent=False)
    out = writer.begin() + writer.delta(0, TextDelta(parts=[Text("Hello")])) + writer.fail(error)
    events = events_of(out)
    last = EVENT.validate_python(events[-1])
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error.code == code and last.response.error.message
    assert [item.status for item in last.response.output] == ["incomplete"]
    assert writer.error is error
