"""Every way of failing at the edge answers one shape a side, as JSON."""

import json

import httpx
import pytest
from compat_cases import TALK
from live_server import MODEL, assert_canonical_error, ok

PATHS = ["/generate", "/", "/tokenize"]
PATHS += ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"]
BOTH = pytest.mark.parametrize("path", PATHS)
HEADERS = {"content-type": "application/json"}


@BOTH
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"inputs": NaN}',
        b'{"inputs": "a", "prompt": "a", "temperature": 1e400}',
        b'{"inputs": "\\ud800", "prompt": "\\ud800"}',
        b'{"inputs": "\xff\xfe"}',
        b"[" * 50_000,
        b'{"a":' * 50_000,
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_bodies_that_are_not_json(live, path, raw):
    assert_canonical_error(live.client.post(path, content=raw, headers=HEADERS), 400)


@BOTH
def test_another_content_type(live, path):
    response = live.client.post(
        path, content=b"inputs=hello", headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert_canonical_error(response, 415, "application/json")


def test_json_by_other_names(live):
    for media in ("application/json; charset=utf-8", "application/vnd.api+json", ""):
        raw = json.dumps({"inputs": "Hello", "parameters": {"max_new_tokens": 1}})
        ok(live.client.post("/generate", content=raw, headers={"content-type": media}))


@BOTH
def test_a_body_too_large(live, path):
    limit = 2 * 2**20
    raw = json.dumps({"inputs": "x" * limit, "prompt": "y" * limit})
    assert_canonical_error(live.client.post(path, content=raw, headers=HEADERS), 413)


def test_fifty_megabytes_without_a_length(live):
    def chunks():
        for _ in range(50):
            yield b"x" * 2**20

    assert_canonical_error(live.client.post("/v1/completions", content=chunks(), headers=HEADERS), 413)
    assert live.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/generate"), ("PUT", "/v1/completions"), ("GET", "/v1/messages"), ("DELETE", "/"), ("POST", "/health")],
)
def test_a_wrong_method(live, method, path):
    response = live.client.request(method, path)
    assert_canonical_error(response, 405)
    assert response.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1/nowhere", "/v1/", "/generate/", "/v1/conversations", "/%00", "/v1/load_lora_adapter"]
)
def test_an_unknown_path(live, path):
    assert_canonical_error(live.client.post(path, json={}), 404)


def test_request_ids(live):
    assert live.client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = live.client.get("/health").headers["x-request-id"]
    assert made != live.client.get("/health").headers["x-request-id"]
    for bad in ("a b", "x" * 300, "ä"):
        echoed = live.client.get("/health", headers={"x-request-id": bad.encode()}).headers["x-request-id"]
        assert echoed != bad


def test_an_error_keeps_the_request_id(live):
    response = live.client.post("/generate", json={}, headers={"x-request-id": "mine-2"})
    assert_canonical_error(response, 422)
    assert response.headers["x-request-id"] == "mine-2"


def test_preflights(live):
    headers = {
        "origin": "http://localhost:5173",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-stainless-lang",
    }
    response = live.client.options("/v1/chat/completions", headers=headers)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "http://localhost:5173"
    assert "authorization" in response.headers["access-control-allow-headers"]
    plain = live.client.get("/v1/models", headers={"origin": "http://localhost:5173"})
    assert plain.headers["access-control-allow-origin"] == "http://localhost:5173"


def test_models(live):
    listed = ok(live.client.get("/v1/models"))
    assert listed["object"] == "list"
    base, *adapters = listed["data"]
    assert base["id"] == MODEL
    assert base["parent"] is None
    assert [a["id"] for a in adapters] == sorted(["in-dir", "org--poet", "org/poet", "pirate"])
    assert {a["parent"] for a in adapters} == {MODEL}
    for entry in listed["data"]:
        assert entry["object"] == "model"
        assert entry["created"] > 0
        assert ok(live.client.get(f"/v1/models/{entry['id']}")) == entry
    assert_canonical_error(live.client.get("/v1/models/nobody"), 404)
    assert_canonical_error(live.client.get("/v1/models/org/nobody"), 404)


def test_the_openapi_document_lists_the_routes(live):
    document = ok(live.client.get("/api-doc/openapi.json"))
    assert {"/", "/generate", "/v1/completions", "/v1/models/{model_id}"} <= set(document["paths"])
    assert "ChatBody" in document["components"]["schemas"]
    assert ok(live.client.get("/openapi.json")) == document


def test_the_head_of_a_probe_has_no_body(live):
    for path in ("/", "/health", "/v1/models"):
        response = live.client.head(path)
        assert response.status_code == 200
        assert response.content == b""


def test_half_a_request_and_gone(live):
    with httpx.Client(base_url=live.url) as client, pytest.raises(httpx.HTTPError):

        def broken():
            yield b'{"inputs":'
            raise httpx.WriteError("gone")

        client.post("/generate", content=broken(), headers=HEADERS)
    assert live.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": TALK, "max_tokens": 10**6}, "max_tokens"),
        ("/v1/chat/completions", {"messages": TALK, "max_completion_tokens": 10**6}, "max_completion_tokens"),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 10**6}, "max_output_tokens"),
        ("/v1/responses", {"input": "Hello " * 9000}, "input"),
        ("/v1/responses", {"input": "Hello " * 30000}, "input"),  # read by a text worker
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello " * 30000}]}, "messages"),
    ],
)
def test_an_error_has_the_name_that_the_client_sent(live, path, body, param):
    response = live.post(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    others = {"max_tokens", "max_completion_tokens", "max_output_tokens"} - {param}
    assert not any(name in error["message"].replace(param, "") for name in others)
