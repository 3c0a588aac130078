"""``huggingface_hub.InferenceClient`` by URL, as people use it with a server of their own."""

import pytest
from huggingface_hub import InferenceClient
from live_server import MODEL


@pytest.fixture
def client(live):
    return InferenceClient(live.url, timeout=60)


def test_text_generation(client, live):
    plain = client.text_generation("Hello", max_new_tokens=6)
    assert plain == live.native("Hello", max_new_tokens=6)["generated_text"]
    details = client.text_generation("Hello", max_new_tokens=6, details=True, decoder_input_details=True)
    assert details.generated_text == plain
    assert len(details.details.tokens) == details.details.generated_tokens
    streamed = list(client.text_generation("Hello", max_new_tokens=6, stream=True, details=True))
    assert "".join(e.token.text for e in streamed if not e.token.special) == plain
    assert "".join(client.text_generation("Hello", max_new_tokens=6, stream=True)) == plain


def test_chat(client, live):
    talk = [{"role": "user", "content": "Hello"}]
    answer = client.chat_completion(talk, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == live.chat(max_tokens=5)["choices"][0]["message"]["content"]
    chunks = list(client.chat_completion(talk, max_tokens=5, temperature=0, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.choices[0].message.content


def test_probes(live):
    client = InferenceClient(live.url, provider="hf-inference", timeout=60)
    assert client.health_check()
    assert client.get_endpoint_info()["model_id"] == MODEL
