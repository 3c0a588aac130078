"""Requests that name an adapter with a tokenizer and a chat template of its own, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from live_server import Live, serving, tokenizer, write_adapters, write_model
from tokenizers import Tokenizer

ADDED = "<SKU-7>"
TALK = [{"role": "user", "content": f"buy {ADDED}"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("texts")
    vocab = tokenizer().get_vocab_size()
    model = write_model(root / "model", vocab_size=vocab + 8)
    names = json.loads((model / "tokenizer_config.json").read_text())
    del names["chat_template"]  # a base model that was not trained for chats
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    folders = write_adapters(root / "adapters", model)
    own = Tokenizer.from_str(tokenizer().to_str())
    own.add_tokens([ADDED])
    own.save(str(folders["pirate"] / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}!"
    (folders["pirate"] / "chat_template.jinja").write_text(template)
    foreign = {"model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}
    (folders["org/poet"] / "tokenizer.json").write_text(json.dumps(foreign))
    named = {name: str(folders[name]) for name in ("pirate", "org/poet")}
    with serving(model, adapters=named, max_model_len=160) as found:
        yield found


def ids(text: str, *, own: bool = True) -> list[int]:
    made = Tokenizer.from_str(tokenizer().to_str())
    if own:
        made.add_tokens([ADDED])
    return list(made.encode(text).ids)


@pytest.mark.parametrize("padding", [{}, {"wish": "x" * 100_000}], ids=["small", "large"])
def test_the_texts_of_a_request_are_its_adapters(live: Live, padding: dict[str, str]) -> None:
    """A large body is read in a worker before its adapter is known."""
    text = f"buy {ADDED}"
    for model, own in (("pirate", True), (None, False)):
        named = {"model": model} if model else {}
        found = live.post("/tokenize", {"prompt": text, **named, **padding}).json()
        assert found["tokens"] == ids(text, own=own)
        asked = {"prompt": text, "max_tokens": 1, "temperature": 0, **named, **padding}
        assert live.post("/v1/completions", asked).json()["usage"]["prompt_tokens"] == len(ids(text, own=own))
    rendered = live.post("/v1/chat/completions/render", {"messages": TALK, "model": "pirate", **padding}).json()
    assert rendered["token_ids"] == ids(f"{TALK[0]['content'].upper()}!")[1:]
    assert live.post("/v1/chat/completions/render", {"messages": TALK, **padding}).status_code == 400
    for route in ("/tokenize", "/chat_tokenize"):
        answered = live.post(route, {"messages": TALK, "model": "pirate", **padding})
        assert answered.status_code == 200, answered.text
        assert live.post(route, {"messages": TALK, **padding}).status_code >= 400
    sku = ids(ADDED)[-1]
    spoken = {"messages": TALK, "model": "pirate", "max_tokens": 2, "logit_bias": {sku: 100}, **padding}
    assert live.post("/v1/chat/completions", spoken).json()["choices"][0]["message"]["content"] == ADDED * 2


def test_a_tokenizer_that_contradicts_the_base_is_an_error_of_its_requests(live: Live) -> None:
    for body in ({"inputs": "a", "adapter_id": "org/poet"}, {"inputs": "a", "parameters": {"adapter_id": "org/poet"}}):
        answer = live.post("/generate", body)
        assert answer.status_code >= 400 and "contradicts the base's" in answer.text
    assert live.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status_code == 200
