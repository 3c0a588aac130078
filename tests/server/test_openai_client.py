"""The real openai client, sync and async, against a live server."""

import asyncio

import openai
import pytest
from live_server import MODEL

TALK = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


def test_models(client):
    listed = client.models.list().data
    assert listed[0].id == MODEL
    assert client.models.retrieve("org/poet").id == "org/poet"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat_and_its_stream(client):
    body = {"model": "pirate", "messages": TALK, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**body)
    assert whole.choices[0].message.role == "assistant"
    text, usage = "", None
    for chunk in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_the_accumulating_stream_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=TALK, max_tokens=6, temperature=0) as stream:
        for _ in stream:
            pass
        final = stream.current_completion_snapshot
    assert final.choices[0].message.role == "assistant"
    plain = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=6, temperature=0)
    assert final.choices[0].message.content == plain.choices[0].message.content


def test_completions_and_their_stream(client):
    body = {"model": MODEL, "prompt": ["Hello", "The Lorax"], "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**body)
    texts = ["", ""]
    for chunk in client.completions.create(**body, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


@pytest.mark.parametrize(
    ("error", "body"),
    [
        (openai.NotFoundError, {"model": "nobody"}),
        (openai.BadRequestError, {"max_tokens": -1}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "x " * 4000}]}),
        (
            openai.BadRequestError,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own_classes(client, error, body, stream):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": TALK, "stream": stream, **body})
    assert caught.value.code
    assert caught.value.request_id


def test_async_many_at_once(live):
    async def go():
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="-", max_retries=0) as client:

            async def one(model):
                stream = await client.chat.completions.create(
                    model=model, messages=TALK, max_tokens=8, temperature=0, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            models = [MODEL, "pirate", "org/poet", "in-dir"] * 3
            return models, await asyncio.gather(*(one(m) for m in models))

    models, texts = asyncio.run(go())
    by_model = {}
    for model, text in zip(models, texts, strict=True):
        assert by_model.setdefault(model, text) == text
    assert len(set(by_model.values())) == 4
