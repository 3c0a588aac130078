"""The real openai client's Responses calls against a live server."""

import json
import time

import openai
import pytest
from live_server import MODEL
from openai.types.responses import Response

TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.incomplete",
]


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


def ask(client, given="Hello", **more):
    return client.responses.create(**{"model": MODEL, "input": given, "temperature": 0, "max_output_tokens": 6, **more})


def test_a_response_is_of_the_clients_types(client):
    found = ask(client, instructions="Be kind.", metadata={"a": "b"})
    Response.model_validate(found.model_dump(by_alias=True), strict=False)
    assert found.id.startswith("resp_") and found.object == "response" and found.model == MODEL
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    (message,) = found.output
    assert message.type == "message" and message.role == "assistant" and message.id.startswith("msg_")
    assert found.output_text == message.content[0].text
    assert found.usage.output_tokens == 6
    assert found.usage.total_tokens == found.usage.input_tokens + 6
    assert found.usage.input_tokens_details.cached_tokens >= 0
    assert found.usage.output_tokens_details.reasoning_tokens == 0
    assert found.instructions == "Be kind." and found.metadata == {"a": "b"} and found.error is None


def test_the_events_come_in_openais_order(client):
    events = list(ask(client, stream=True))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == TEXT_EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == ask(client).output_text
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    assert events[0].response.id == events[-1].response.id
    assert events[-1].response.usage.output_tokens == 6


def test_the_stream_helper_accumulates_what_is_retrieved(client):
    with client.responses.stream(model=MODEL, input="Hello", temperature=0, max_output_tokens=6) as stream:
        for event in stream:
            last = event
    whole = last.response
    assert client.responses.retrieve(whole.id).output_text == whole.output_text
    assert client.responses.retrieve(whole.id).model_dump() == whole.model_dump()


def test_every_event_is_named(live):
    body = {"input": "Hello", "max_output_tokens": 2, "stream": True}
    with live.client.stream("POST", "/v1/responses", json=body) as response:
        text = response.read().decode()
    assert "[DONE]" not in text
    for one in text.split("\n\n")[:-1]:
        name, data = one.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


def test_items_that_are_fed_back_continue_as_the_stored_response(client):
    first = ask(client)
    talk = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "And then?"}]
    by_items = ask(client, talk)
    by_id = ask(client, "And then?", previous_response_id=first.id)
    assert by_id.output_text == by_items.output_text
    assert by_id.usage.input_tokens == by_items.usage.input_tokens > first.usage.input_tokens
    assert by_id.previous_response_id == first.id
    third = ask(client, "Go on.", previous_response_id=by_id.id)
    assert third.usage.input_tokens > by_id.usage.input_tokens


def test_instructions_are_not_carried_over(client):
    plain = ask(client)
    told = ask(client, instructions="Be kind to all of the trees.")
    after = ask(client, "Go on.", previous_response_id=told.id)
    assert told.usage.input_tokens > plain.usage.input_tokens
    assert after.usage.input_tokens < told.usage.input_tokens + told.usage.output_tokens + 20


def test_input_items_are_paged(client):
    given = [{"role": "user", "content": f"Line {i}."} for i in range(3)]
    found = ask(client, [*given, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}])
    newest = [item.content[0].text for item in client.responses.input_items.list(found.id, limit=3)]
    assert newest == ["x", "Line 2.", "Line 1.", "Line 0."]
    page = client.responses.input_items.list(found.id, limit=2, order="asc")
    assert [item.content[0].text for item in page.data] == ["Line 0.", "Line 1."] and page.has_more
    rest = client.responses.input_items.list(found.id, order="asc", after=page.data[-1].id)
    assert [item.content[0].text for item in rest.data] == ["Line 2.", "x"] and not rest.has_more
    for bad in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_none"}):
        with pytest.raises(openai.BadRequestError):
            client.responses.input_items.list(found.id, **bad)


def test_a_deleted_response_is_gone(client):
    found = ask(client)
    client.responses.delete(found.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as caught:
            call(found.id)
        assert caught.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "And then?", previous_response_id=found.id)
    assert caught.value.code == "previous_response_not_found" and caught.value.param == "previous_response_id"


def test_a_chain_with_a_missing_link_is_refused(client):
    first = ask(client)
    second = ask(client, "And then?", previous_response_id=first.id)
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match=first.id):
        ask(client, "Go on.", previous_response_id=second.id)


def test_what_is_not_to_be_stored_is_not(client):
    found = ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)


def poll(client, response_id):
    deadline = time.monotonic() + 60
    while (found := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_background_response_is_polled(client):
    found = ask(client, background=True)
    assert found.status == "queued" and found.background and found.output == []
    done = poll(client, found.id)
    assert done.status == "incomplete" and done.output_text == ask(client).output_text
    assert client.responses.cancel(found.id).status == "incomplete"
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(ask(client).id)
    with pytest.raises(openai.BadRequestError, match="stream"):
        list(client.responses.retrieve(found.id, stream=True))


def test_a_background_stream_is_resumed_where_it_was_left(client):
    events = []
    with ask(client, background=True, stream=True) as stream:
        for event in stream:
            events.append(event)
            if event.type == "response.output_text.delta":
                break
    response_id = events[0].response.id
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=events[-1].sequence_number))
    numbers = [event.sequence_number for event in [*events, *rest]]
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type == "response.incomplete"
    poll(client, response_id)
    again = list(client.responses.retrieve(response_id, stream=True))
    assert [event.model_dump() for event in again] == [event.model_dump() for event in [*events, *rest]]


def test_a_background_response_is_cancelled(client):
    found = ask(client, background=True, max_output_tokens=120, extra_body={"ignore_eos": True})
    assert client.responses.cancel(found.id).status == "cancelled"
    assert client.responses.retrieve(found.id).status == "cancelled"
    assert client.responses.cancel(found.id).status == "cancelled"


def test_an_error_of_a_background_response_is_in_it(client):
    found = poll(client, ask(client, "x " * 4000, background=True).id)
    assert found.status == "failed" and found.error.message


def test_logprobs(client):
    found = ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    part = found.output[0].content[0]
    assert "".join(row.token for row in part.logprobs) == part.text
    assert all(len(row.top_logprobs) == 2 for row in part.logprobs)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "body"),
    [
        (openai.NotFoundError, {"model": "nobody"}),
        (openai.BadRequestError, {"max_output_tokens": 0}),
        (openai.BadRequestError, {"input": []}),
        (openai.BadRequestError, {"input": "x " * 4000}),
        (openai.BadRequestError, {"truncation": "auto"}),
        (openai.BadRequestError, {"previous_response_id": "resp_unknown"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_errors_are_the_clients_own_classes(client, error, body, stream):
    with pytest.raises(error) as caught:
        client.responses.create(**{"model": MODEL, "input": "Hello", "stream": stream, **body})
    assert caught.value.code and caught.value.request_id


def test_a_reference_stands_for_a_stored_item(live, client):
    first = ask(client)
    by_item = ask(client, [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "Go on."}])
    (message,) = first.output
    (given,) = client.responses.input_items.list(first.id)
    for kind in ({"type": "item_reference"}, {}):
        talk = [{**kind, "id": given.id}, {**kind, "id": message.id}, {"role": "user", "content": "Go on."}]
        assert ask(client, talk).output_text == by_item.output_text
    body = {"model": MODEL, "input": talk, "temperature": 0, "max_output_tokens": 6}
    large = live.client.post("/v1/responses", content=json.dumps(body) + " " * 70_000).json()
    assert large["output"][0]["content"][0]["text"] == by_item.output_text
    for unknown in ("msg_1", f"{message.id}9", message.id.replace("0", "1")):
        with pytest.raises(openai.BadRequestError, match="not found"):
            ask(client, [{"type": "item_reference", "id": unknown}])


def test_input_tokens_are_those_of_the_response(client):
    counted = client.responses.input_tokens.count(model=MODEL, input="Hello", instructions="Be kind.")
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == ask(client, instructions="Be kind.").usage.input_tokens


def test_parameters_of_a_retrieval_without_effect_are_listed(client):
    found = ask(client)
    raw = client.responses.with_raw_response.retrieve(found.id, include=["message.output_text.logprobs"])
    assert raw.headers["x-truffula-ignored"] == "include"
