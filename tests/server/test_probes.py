"""Health, info, metrics, tokens."""

import json
import logging

import pytest
from live_server import BEGIN, MODEL, assert_canonical_error, ok, serving, tokenizer, write_model
from prometheus_client.parser import text_string_to_metric_families


def test_health(live):
    for path in ("/health", "/ping", "/"):
        response = live.client.get(path)
        assert (response.status_code, response.content) == (200, b"")


def test_startup_waits_for_an_answer(live):
    live.native()
    assert live.client.get("/startup").status_code == 200


def test_info(live):
    found = ok(live.client.get("/info"))
    assert found["model_id"] == MODEL
    assert found["max_input_length"] == found["max_input_tokens"] == found["max_total_tokens"] - 1
    for name in [
        "model_sha",
        "model_dtype",
        "model_device_type",
        "max_concurrent_requests",
        "max_best_of",
        "max_stop_sequences",
        "version",
    ]:
        assert name in found
    assert "api" not in str(found).lower()


def test_metrics(live):
    live.native(adapter_id="pirate", max_new_tokens=3, ignore_eos_token=True)
    live.post("/generate", {})
    response = live.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(response.text)}
    assert {"truffula_requests", "truffula_inter_token_seconds", "truffula_kv_blocks", "lorax_request_count"} <= set(
        families
    )
    tokens = {
        s.labels["adapter"]: s.value
        for s in families["truffula_completion_tokens"].samples
        if s.name.endswith("_total")
    }
    assert tokens["pirate"] >= 3
    outcomes = {s.labels["outcome"] for s in families["truffula_requests"].samples if s.name.endswith("_total")}
    assert "invalid_request" in outcomes
    routes = {s.labels["route"] for s in families["truffula_http_responses"].samples if "route" in s.labels}
    assert "/generate" in routes


def test_metrics_as_json(live):
    for found in (
        ok(live.client.get("/metrics", params={"format": "json"})),
        ok(live.client.get("/metrics", headers={"accept": "application/json"})),
    ):
        assert "truffula_sequences_running" in {family["name"] for family in found}


def test_tokenize_as_lorax_and_tgi(live):
    text = "The 東京 Lorax"
    rows = ok(live.post("/tokenize", {"inputs": text}))
    assert [r["id"] for r in rows] == tokenizer().encode(text).ids
    assert (rows[0]["text"], rows[0]["start"], rows[0]["stop"]) == ("", 0, 0)
    for row in rows[1:]:
        assert row["text"] == text[row["start"] : row["stop"]]
    bare = ok(live.post("/tokenize", {"inputs": text, "add_special_tokens": False}))
    assert [r["id"] for r in bare] == [r["id"] for r in rows[1:]]
    assert ok(live.post("/tokenize", {"inputs": text, "parameters": {"max_new_tokens": 5}})) == rows


def test_tokenize_as_vllm(live):
    ids = tokenizer().encode("Hello").ids
    found = ok(live.post("/tokenize", {"model": MODEL, "prompt": "Hello", "return_token_strs": True}))
    assert found["tokens"] == ids
    assert found["count"] == len(ids)
    assert found["max_model_len"] == live.service.info.max_model_len
    assert found["token_strs"][0] == BEGIN
    talk = [{"role": "user", "content": "Hello"}]
    found = ok(live.post("/tokenize", {"messages": talk}))
    assert found["token_strs"] is None
    text = "<|role|>user\nHello<|end|><|role|>assistant\n"
    assert found["tokens"] == tokenizer().encode(text, add_special_tokens=False).ids
    assert_canonical_error(live.post("/tokenize", {"prompt": "a", "inputs": "b"}), 422)
    assert_canonical_error(live.post("/tokenize", {}), 422)


def test_detokenize_and_chat_tokenize(live):
    ids = tokenizer().encode("The Lorax").ids
    assert ok(live.post("/detokenize", {"tokens": ids[1:]})) == {"prompt": "The Lorax"}
    assert_canonical_error(live.post("/detokenize", {"tokens": [10**6]}), 422)
    assert_canonical_error(live.post("/detokenize", {"tokens": [True]}), 422)
    found = ok(live.post("/chat_tokenize", {"messages": [{"role": "user", "content": "Hello"}]}))
    assert found["templated_text"].startswith("<|role|>user\nHello<|end|>")
    assert len(found["tokenize_response"]) > 3
    assert_canonical_error(live.post("/chat_tokenize", {}), 422, "messages")
    assert_canonical_error(live.post("/chat_tokenize", {"inputs": "Hello"}), 422, "messages")


def test_tokens_of_a_chat_are_those_of_its_completion(with_tools):
    """Clients send whole requests to count their tokens: what changes the prompt is read, the rest listed."""
    tool = {"type": "function", "function": {"name": "fetch", "parameters": {"type": "object", "properties": {}}}}
    body = {
        "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well"}],
        "tools": [tool],
        "documents": [{"text": "About trees"}],
        "chat_template_kwargs": {"mood": "glad"},
        "reasoning_effort": "low",
        "continue_final_message": True,
    }
    counted = with_tools.post("/chat_tokenize", {**body, "max_tokens": 5})
    text = ok(counted)["templated_text"]
    assert text == "fetch;About trees;glad;user:Hello;assistant:Well"
    assert counted.headers["x-truffula-ignored"] == "max_tokens, reasoning_effort"
    ids = [token["id"] for token in counted.json()["tokenize_response"]]
    tokenized = with_tools.post("/tokenize", body)
    assert ok(tokenized)["tokens"] == ids == tokenizer().encode(text, add_special_tokens=False).ids
    assert tokenized.headers["x-truffula-ignored"] == "reasoning_effort"
    special = with_tools.post("/chat_tokenize", {**body, "add_special_tokens": True}).json()["tokenize_response"]
    assert [token["id"] for token in special] == tokenizer().encode(text).ids
    both = {**body, "add_generation_prompt": True}
    for path in ("/tokenize", "/chat_tokenize"):
        assert_canonical_error(with_tools.post(path, both), 422, "continue_final_message")
        assert_canonical_error(with_tools.post(path, {**body, "tools": [{"type": "magic"}]}), 422, "tools[0]")


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("tools") / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for tool in tools %}{{ tool.function.name }};{% endfor %}"
        "{% for document in documents %}{{ document.text }};{% endfor %}{{ mood }};"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if not loop.last %};{% endif %}{% endfor %}"
        "{% if add_generation_prompt %};assistant:{% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with serving(model) as found:
        yield found


def test_a_model_without_tokenizer_serves_token_ids_and_says_why(tmp_path, caplog):
    model = write_model(tmp_path / "bare", with_tokenizer=False)
    (model / "tokenizer.model").write_bytes(b"")
    with caplog.at_level(logging.WARNING), serving(model, backend="auto") as bare:
        assert "tokenizer.model is not read" in caplog.text
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
        answer = ok(bare.post("/v1/completions", body))
        assert len(answer["choices"][0]["token_ids"]) == 4
        error = assert_canonical_error(bare.post("/v1/completions", {"prompt": "text"}), 404)
        assert error["code"] == "no_tokenizer"
        assert "tokenizer.model is not read" in error["message"] and "AutoTokenizer" in error["message"]
        assert (
            assert_canonical_error(bare.post("/tokenize", {"inputs": "text"}), 404)["error_type"] == "no fast tokenizer"
        )
        assert_canonical_error(bare.post("/generate", {"inputs": "text"}), 404)
