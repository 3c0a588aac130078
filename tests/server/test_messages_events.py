"""The events of /v1/messages and its JSON reply, read by anthropic's client: the same message."""

import json

import anthropic
import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_events import check_order, raw_events
from starlette.requests import Request

from truffula.errors import EngineDied
from truffula.items import Reasoning, Text, ToolCallPart
from truffula.metrics import RequestRecord
from truffula.server.messages import MessagesWriter, message_reply
from truffula.server.messages_bodies import MessagesBody
from truffula.service.choices import collect
from truffula.types import ChoiceTotals, TextDelta

TOP = {"id": "msg_1", "type": "message", "role": "assistant", "model": "pirate"}
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "model": "pirate"}
TEXTS = st.text('ab é東👍\n"\\\\{}\u2028', min_size=1, max_size=8)
VALUES = st.dictionaries(
    TEXTS, st.one_of(TEXTS, st.integers(-9, 9), st.none(), st.lists(TEXTS, max_size=2)), max_size=3
)


@st.composite
def tool_call(draw, index):
    """The parts of one call, its arguments split anywhere."""
    arguments = json.dumps(draw(VALUES), ensure_ascii=draw(st.booleans()))
    cuts = sorted(draw(st.lists(st.integers(0, len(arguments)), max_size=3)))
    pieces = [arguments[a:b] for a, b in zip([0, *cuts], [*cuts, len(arguments)], strict=True)]
    first = ToolCallPart(index, pieces[0], f"call_{index:024x}", draw(TEXTS))
    return [first, *(ToolCallPart(index, piece) for piece in pieces[1:])]


@st.composite
def drawn_parts(draw):
    """The parts of an answer: reasoning, text and calls in any order."""
    parts, calls = [], 0
    for kind in draw(st.lists(st.sampled_from(["text", "reasoning", "call"]), max_size=5)):
        if kind == "call":
            parts += draw(tool_call(calls))
            calls += 1
        else:
            make = Text if kind == "text" else Reasoning
            parts += [make(text) for text in draw(st.lists(TEXTS, min_size=1, max_size=3))]
    return parts


ENDS = st.sampled_from(
    [
        {"finish_reason": "stop", "eos": True},
        {"finish_reason": "stop", "stop_reason": "END"},
        {"finish_reason": "stop", "stop_reason": 7},
        {"finish_reason": "length"},
    ]
)


def deltas_of(parts, sizes, end, tokens):
    """``parts`` in deltas of any number of parts, the last with the end."""
    cut, deltas = 0, []
    for size in sizes:
        deltas.append(TextDelta(parts=parts[cut : cut + size]))
        cut += size
    totals = ChoiceTotals(prompt_tokens=20, completion_tokens=tokens, cached_tokens=16)
    return [*deltas, TextDelta(parts=parts[cut:], totals=totals, **end)]


def request():
    record = RequestRecord(request_id="abc", method="POST", path="/v1/messages", prompt_tokens=20)
    return Request({"type": "http", "headers": [], "path": "/v1/messages", "state": {"record": record}})


def stream_of(body, deltas):
    writer = MessagesWriter(request(), body, TOP)
    return writer.begin() + b"".join(writer.delta(0, delta) for delta in deltas) + writer.end()


class Answers:
    """anthropic's client, to which every request is answered with the content that the test sets."""

    def __init__(self):
        self.answer = httpx2.Response(200)
        http = anthropic.DefaultHttpxClient(transport=httpx2.MockTransport(lambda _: self.answer))
        self.client = anthropic.Anthropic(api_key="-", base_url="http://truffula", http_client=http, max_retries=0)

    def streamed(self, content):
        self.answer = httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)
        with self.client.messages.stream(**BODY) as stream:
            return stream.get_final_message()

    def replied(self, reply):
        self.answer = httpx2.Response(200, headers=dict(reply.headers), content=b"".join(reply.parts))
        return self.client.messages.create(**BODY)


@pytest.fixture(scope="module")
def answers():
    return Answers()


@settings(max_examples=60, deadline=None)
@given(parts=drawn_parts(), sizes=st.lists(st.integers(0, 3), max_size=6), end=ENDS, omitted=st.booleans())
def test_the_streamed_message_is_the_replied_one(answers, parts, sizes, end, omitted):
    thinking = {"type": "adaptive", "display": "omitted" if omitted else "summarized"}
    body = MessagesBody.model_validate({**BODY, "thinking": thinking})
    deltas = deltas_of(parts, sizes, end, tokens=9)
    content = stream_of(body, deltas)
    check_order(raw_events(content))
    whole = answers.replied(message_reply(body, TOP, collect(deltas)))
    assert answers.streamed(content).to_dict() == whole.to_dict()
    assert "".join(b.text for b in whole.content if b.type == "text") == "".join(
        part.text for part in parts if isinstance(part, Text)
    )
    thoughts = "".join(part.text for part in parts if isinstance(part, Reasoning))
    assert "".join(b.thinking for b in whole.content if b.type == "thinking") == ("" if omitted else thoughts)
    names = [part.name for part in parts if isinstance(part, ToolCallPart) and part.id]
    assert [b.name for b in whole.content if b.type == "tool_use"] == names
    assert all(b.id.startswith("toolu_") for b in whole.content if b.type == "tool_use")
    if end.get("eos"):
        assert whole.stop_reason == ("tool_use" if names else "end_turn")
    if "END" in end.values():
        assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", "END")
    assert whole.usage.input_tokens + whole.usage.cache_read_input_tokens == 20


@pytest.mark.parametrize("cut", range(1, 23))
def test_a_call_that_max_tokens_cut_has_the_same_input_in_both_forms(answers, cut):
    arguments = '{"a": "b\\n", "c": [1, 2]}'[:cut]
    deltas = deltas_of([ToolCallPart(0, arguments, "call_1", "f")], [], {"finish_reason": "length"}, tokens=9)
    body = MessagesBody.model_validate(BODY)
    whole = answers.replied(message_reply(body, TOP, collect(deltas)))
    assert answers.streamed(stream_of(body, deltas)).content[0].input == whole.content[0].input
    assert whole.stop_reason == "max_tokens"


def test_the_end_of_the_context_window_is_another_reason_than_max_tokens(answers):
    body = MessagesBody.model_validate(BODY)
    deltas = deltas_of([Text("a")], [], {"finish_reason": "length"}, tokens=3)
    assert answers.streamed(stream_of(body, deltas)).stop_reason == "model_context_window_exceeded"


def test_an_error_in_a_stream_is_the_clients_exception(answers):
    writer = MessagesWriter(request(), MessagesBody.model_validate(BODY), TOP)
    content = writer.begin() + writer.delta(0, TextDelta(parts=[Text("a")])) + writer.fail(EngineDied("It ended."))
    with pytest.raises(anthropic.APIStatusError, match="It ended") as caught:
        answers.streamed(content)
    assert caught.value.type == "api_error"
    assert caught.value.body["request_id"] == "abc"
