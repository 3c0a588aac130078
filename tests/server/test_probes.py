"""Health, info, metrics, tokens."""

import logging

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
