"""anthropic's own client, sync and async, against a live server."""

import asyncio
import socket
from urllib.parse import urlsplit

import anthropic
import pytest
from live_server import MODEL, serving, until

TALK = [{"role": "user", "content": "Hello"}]
BODY = {"max_tokens": 8, "messages": TALK, "extra_body": {"temperature": 0}}


@pytest.fixture
def client(live):
    with anthropic.Anthropic(base_url=live.url, api_key="-", max_retries=0) as made:
        yield made


def without_usage(message):
    return {key: value for key, value in message.to_dict().items() if key not in ("id", "usage")}


@pytest.mark.parametrize("model", [MODEL, "pirate", "org/poet"])
def test_the_stream_helper_accumulates_the_same_message(client, model):
    whole = client.messages.create(model=model, **BODY)
    assert whole._request_id
    with client.messages.stream(model=model, **BODY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text
    assert without_usage(final) == without_usage(whole)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == 19


def test_raw_events_and_the_beta_client(client):
    kinds = [event.type for event in client.beta.messages.create(model=MODEL, stream=True, betas=["a-2026"], **BODY)]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    with client.beta.messages.stream(model=MODEL, **BODY) as stream:
        assert stream.get_final_text()


def test_counting_tokens(client):
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    counted = client.messages.count_tokens(model=MODEL, messages=TALK, system=system).input_tokens
    assert counted == client.beta.messages.count_tokens(model=MODEL, messages=TALK, system=system).input_tokens
    usage = client.messages.create(model=MODEL, system=system, **BODY).usage
    assert usage.input_tokens + usage.cache_read_input_tokens == counted > 19


def test_models(client):
    names = [model.id for model in client.models.list(limit=2)]  # page by page
    assert names[0] == MODEL and {"pirate", "org/poet", "in-dir"} <= set(names)
    found = client.models.retrieve("org/poet")
    assert (found.id, found.max_input_tokens) == ("org/poet", 160)
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("robin")
    assert caught.value.type == "not_found_error"


@pytest.mark.parametrize(
    ("error", "body"),
    [
        (anthropic.NotFoundError, {"model": "robin"}),
        (anthropic.BadRequestError, {"max_tokens": -1}),
        (anthropic.BadRequestError, {"messages": []}),
        (anthropic.BadRequestError, {"messages": [{"role": "user", "content": "x " * 4000}]}),
        (anthropic.BadRequestError, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own_classes(client, error, body, stream):
    with pytest.raises(error) as caught:
        client.messages.create(**{"model": MODEL, **BODY, "stream": stream, **body})
    assert caught.value.type
    assert caught.value.request_id == caught.value.body["request_id"]


def test_a_body_too_large_and_keys(model_folder):
    with serving(model_folder, backend="auto", api_keys=("k",), max_body=4096) as guarded:
        for secret in ({"api_key": "k"}, {"auth_token": "k"}):
            client = anthropic.Anthropic(base_url=guarded.url, max_retries=0, **secret)
            assert client.messages.create(model=MODEL, **BODY).content
        with pytest.raises(anthropic.ContentTooLargeError):
            client.messages.create(model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "x" * 5000}])
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=guarded.url, api_key="wrong", max_retries=0).messages.create(
                model=MODEL, **BODY
            )


def test_a_full_server_is_overloaded(model_folder):
    with serving(model_folder, backend="auto", max_open_requests=1) as full:
        client = anthropic.Anthropic(base_url=full.url, api_key="-", max_retries=0)
        address = urlsplit(full.url)
        with socket.create_connection((address.hostname, address.port)) as held:
            held.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")

            def rejected():
                try:
                    client.messages.create(model=MODEL, **BODY)
                except anthropic.OverloadedError as error:
                    return error
                return None

            until(rejected)  # the server may read the held request a little later
            error = rejected()
    assert error.type == "overloaded_error"
    assert int(error.response.headers["retry-after"]) >= 1


def test_async_many(live):
    async def go():
        async with anthropic.AsyncAnthropic(base_url=live.url, api_key="-", max_retries=0) as client:

            async def one(model):
                async with client.messages.stream(model=model, **BODY) as stream:
                    return await stream.get_final_text()

            models = [MODEL, "pirate", "org/poet", "in-dir"] * 3
            return models, await asyncio.gather(*(one(model) for model in models))

    models, texts = asyncio.run(go())
    by_model = {}
    for model, text in zip(models, texts, strict=True):
        assert by_model.setdefault(model, text) == text
    assert len(set(by_model.values())) == 4
