"""Who answers, said in other words or in the wrong place: honoured or refused; the base never answers for it."""

import pytest
from live_server import MODEL, assert_canonical_error, ok

TALK = [{"role": "user", "content": "Hello"}]
SHAPES = [("/v1/completions", {"prompt": "Hello"}), ("/v1/chat/completions", {"messages": TALK})]
WORDS = ["lora_path", "adapter_id", "lora_name", "lora_adapter"]


def text(live, path, body):
    (choice,) = ok(live.post(path, {"max_tokens": 8, "temperature": 0, **body}))["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("path", "body"), SHAPES, ids=["completions", "chat"])
def test_every_word_for_an_adapter_is_honoured_beside_the_bases_name(live, path, body, word):
    adapted = text(live, path, {**body, "model": "pirate"})
    assert adapted != text(live, path, body)
    for model in ({}, {"model": MODEL}, {"model": "pirate"}):
        assert text(live, path, {**body, **model, word: "pirate"}) == adapted
    for nothing in ("", None, MODEL):
        assert text(live, path, {**body, word: nothing}) == text(live, path, body)
    error = assert_canonical_error(live.post(path, {**body, word: "nobody"}), 404, "nobody")
    assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"model": "org/poet", "adapter_id": "pirate"}, "adapter_id"),
        ({"model": "pirate", "lora_name": MODEL}, "lora_name"),
        ({"lora_path": "pirate", "adapter_id": "org/poet"}, "adapter_id"),
        ({"lora_request": {"lora_name": "pirate"}}, "lora_request"),
        ({"parameters": {"adapter_id": "pirate"}}, "parameters.adapter_id"),
        ({"extra_body": {"lora_path": "pirate"}}, "extra_body.lora_path"),
        ({"adapter_id": 5}, "adapter_id"),
    ],
    ids=str,
)
def test_openai_bodies_that_contradict_or_misplace_it(live, extra, param):
    error = assert_canonical_error(live.post("/v1/completions", {"prompt": "Hello", **extra}), 400)
    assert error["param"] == param


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream", "/invocations"])
@pytest.mark.parametrize(
    "extra",
    [
        *({word: "pirate"} for word in WORDS),
        {"model": "pirate"},
        {"model": "x"},
        {"adapter_source": "hub"},
        {"lora_request": {"lora_name": "pirate"}},
        {"parameters": {"model": "pirate"}},
        *({"parameters": {word: "pirate"}} for word in WORDS if word != "adapter_id"),
    ],
    ids=str,
)
def test_natively_it_stands_in_one_place(live, path, extra):
    (word,) = extra.get("parameters", extra)
    error = assert_canonical_error(live.post(path, {"inputs": "Hello", **extra}), 422, word)
    assert "adapter" in error["error"] or word == "lora_request"


@pytest.mark.parametrize("name", [MODEL, "", "tgi", "dummy", None])
def test_the_bases_own_names_pass_beside_inputs(live, name):
    response = live.post("/generate", {"inputs": "Hello", "model": name, "parameters": {"max_new_tokens": 1}})
    ok(response)
    assert "x-truffula-ignored" not in response.headers
