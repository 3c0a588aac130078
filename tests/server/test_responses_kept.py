"""Who sees a stored response, where it is kept, and what a server without a store does."""

import json

import pytest
from live_server import assert_canonical_error, ok, serving

BODY = {"input": "Hello", "max_output_tokens": 3, "temperature": 0}
PATHS = [("GET", ""), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")]


def test_a_response_is_its_keys_alone(model_folder):
    with serving(model_folder, api_key=["one", "two"]) as live:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        found = ok(live.post("/v1/responses", BODY, headers=one))["id"]
        running = ok(live.post("/v1/responses", {**BODY, "background": True}, headers=one))["id"]
        for response_id in (found, running):
            for method, path in PATHS:
                answer = live.client.request(method, f"/v1/responses/{response_id}{path}", headers=two)
                assert_canonical_error(answer, 404, response_id)
            answer = live.post("/v1/responses", {**BODY, "previous_response_id": response_id}, headers=two)
            assert assert_canonical_error(answer, 400)["code"] == "previous_response_not_found"
        assert ok(live.client.get(f"/v1/responses/{found}", headers=one))["id"] == found


def test_a_file_outlives_its_server(model_folder, tmp_path):
    options = {"response_store": "file", "response_store_file": tmp_path / "kept.db"}
    with serving(model_folder, **options) as live:
        first = ok(live.post("/v1/responses", BODY))
        streamed = live.post("/v1/responses", {**BODY, "background": True, "stream": True})
    with serving(model_folder, **options) as live:
        assert ok(live.client.get(f"/v1/responses/{first['id']}")) == first
        second = ok(live.post("/v1/responses", {**BODY, "previous_response_id": first["id"]}))
        assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
        response_id = json.loads(streamed.text.split("data: ")[1].split("\n")[0])["response"]["id"]
        again = live.client.get(f"/v1/responses/{response_id}", params={"stream": "true"})
        assert again.text == streamed.text


def test_a_background_response_that_a_server_did_not_finish_is_failed(model_folder, tmp_path):
    options = {"response_store": "file", "response_store_file": tmp_path / "kept.db", "drain_timeout": 0.0}
    with serving(model_folder, **options) as live:
        body = {"input": "Hello", "background": True, "ignore_eos": True}
        response_id = ok(live.post("/v1/responses", body))["id"]
    with serving(model_folder, **options) as live:
        found = ok(live.client.get(f"/v1/responses/{response_id}"))
        assert found["status"] in ("failed", "cancelled") and found["completed_at"] is None


def test_a_server_without_a_store(model_folder):
    with serving(model_folder, response_store="off") as live:
        found = live.post("/v1/responses", {**BODY, "store": True})
        assert ok(found)["store"] is False
        assert found.headers["x-truffula-ignored"] == "store"
        assert "x-truffula-ignored" not in live.post("/v1/responses", BODY).headers
        for field in ({"previous_response_id": "resp_x"}, {"background": True}):
            error = assert_canonical_error(live.post("/v1/responses", {**BODY, **field}), 400, "--response-store off")
            assert [error["param"]] == list(field)
        for method, path in PATHS:
            answer = live.client.request(method, f"/v1/responses/{ok(found)['id']}{path}")
            assert_canonical_error(answer, 404, "not found")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_store_fails_is_answered_and_says_so(model_folder, tmp_path, stream, caplog):
    (tmp_path / "file").write_text("")
    bad = tmp_path / "file" / "kept.db"
    with serving(model_folder, response_store="file", response_store_file=bad) as live:
        answer = live.post("/v1/responses", {**BODY, "stream": stream})
        assert answer.status_code == 200
        last = json.loads(answer.text.split("data: ")[-1])["response"] if stream else answer.json()
        assert last["store"] is False and last["output"]
        assert "kept.db" in caplog.text
        assert_canonical_error(live.client.get(f"/v1/responses/{last['id']}"), 500, "kept.db")


def test_a_large_body_continues_a_stored_response_as_a_small_one_does(live):
    first = ok(live.post("/v1/responses", BODY))
    body = {**BODY, "input": "Go on.", "previous_response_id": first["id"]}
    small = ok(live.post("/v1/responses", body))
    large = ok(live.client.post("/v1/responses", content=json.dumps(body) + " " * 70_000))
    assert large["output"][0]["content"] == small["output"][0]["content"]
    assert large["usage"]["input_tokens"] == small["usage"]["input_tokens"]
    items = ok(live.client.get(f"/v1/responses/{large['id']}/input_items"))["data"]
    assert [item["content"] for item in items] == [[{"type": "input_text", "text": "Go on."}]]
    answer = live.client.post(
        "/v1/responses", content=json.dumps({**body, "previous_response_id": "resp_x"}) + " " * 70_000
    )
    assert assert_canonical_error(answer, 400)["code"] == "previous_response_not_found"


def test_a_large_body_s_tools_are_those_of_its_answer(live):
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]
    body = {**BODY, "tools": tools, "metadata": {"a": "b"}}
    small = ok(live.post("/v1/responses", body))
    large = ok(live.client.post("/v1/responses", content=json.dumps(body) + " " * 70_000))
    for answer in (small, large):
        assert answer["tools"] == tools and answer["metadata"] == {"a": "b"}
