"""Hostile bodies in each dialect: refused by name in the dialect's shape, and the server is as before."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import hostile
import httpx
import pytest
from live_server import Live, serving

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def attacked(model_folder, adapter_folders) -> Iterator[Live]:
    pirate = {"pirate": str(adapter_folders["pirate"])}
    with serving(model_folder, adapters=pirate, adapter_admin=True, max_model_len=64, backend="auto") as found:
        yield found
        assert found.completion(prompt="a", max_tokens=2)["choices"]
        assert found.client.get("/health").status_code == 200


def encoded(body: Any) -> bytes:
    """JSON of a body that may be nested deeply."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(200_000)
    try:
        return json.dumps(body).encode()
    finally:
        sys.setrecursionlimit(before)


def check(response: httpx.Response, param: str | None) -> None:
    """It is answered, or refused with the field; nothing of the request is in the answer's head."""
    assert response.status_code < 500, response.text
    assert "injected" not in str(response.cookies) and "set-cookie" not in response.headers
    assert all(value.isprintable() and len(value) < 2000 for value in response.headers.values())
    if response.status_code == 200:
        return
    assert len(response.content) < 2000
    body, path = response.json(), response.request.url.path
    if path.startswith("/v1/messages"):
        assert (body["type"], set(body["error"])) == ("error", {"type", "message"}) and body["request_id"]
        message = body["error"]["message"]
    elif path.startswith("/v1/"):
        message = body["error"]["message"] + str(body["error"]["param"])
        assert body["error"]["code"]
    else:
        message = body["error"]
        assert body["error_type"]
    assert param is None or param in message


def posted(rows: Any) -> pytest.MarkDecorator:
    rows = list(rows)
    return pytest.mark.parametrize(
        ("path", "body", "param"), [row[1:] for row in rows], ids=[f"{r[1]} {r[0]}" for r in rows]
    )


@posted(hostile.bombs())
def test_a_constraint_that_would_take_long_is_refused_or_harmless(attacked, path, body, param):
    check(attacked.client.post(path, content=encoded(body), headers=JSON), param)


@posted(hostile.large())
def test_what_is_too_much_is_refused_by_name(attacked, path, body, param):
    response = attacked.client.post(path, content=encoded(body), headers=JSON)
    assert response.status_code >= 400
    check(response, param)


@posted(hostile.words())
def test_no_characters_of_a_client_get_anywhere_else(attacked, path, body, param):
    response = attacked.client.post(path, content=body, headers=JSON)
    assert response.status_code >= 400
    check(response, param)


@pytest.mark.parametrize("name", ["x-request-id", "x-api-key", "authorization"])
def test_a_long_header_is_not_repeated(attacked, name):
    body = {"prompt": "a", "max_tokens": 1}
    check(attacked.post("/v1/completions", body, headers={name: "a" * 5000}), None)


def test_a_grammar_that_grows_too_complex_is_the_requests_own_error(attacked):
    """The pattern passes its trial, and reaches a limit of the parser only in an answer of many a's."""
    (letter,) = attacked.post("/tokenize", {"prompt": "a", "add_special_tokens": False}).json()["tokens"]
    body = {"prompt": "H", "max_tokens": 60, "temperature": 0, "logit_bias": {str(letter): 50}}
    schema = hostile.SCHEMAS["patterns in patterns"]
    response = attacked.post("/v1/completions", {**body, "guided_json": schema})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("grammar_failed", "guided_json")
    assert "cannot continue its grammar" in error["message"]
