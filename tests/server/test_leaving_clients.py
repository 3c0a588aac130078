"""A client that goes takes its work with it, and faults after the first byte are events."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import MODEL, Live, events, ok, serving, until

LONG = {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "temperature": 0, "model": MODEL}


@pytest.fixture(scope="module")
def live(long_model_folder: Path, adapter_folders: dict[str, Path]) -> Iterator[Live]:
    with serving(long_model_folder, adapters={"pirate": str(adapter_folders["pirate"])}) as found:
        yield found


def wait_idle(live):
    """Until nothing runs and no block or lease is held; the test's own timeout bounds it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        stats = live.service.stats()
        if not live.service.active and not stats.running and not stats.waiting and not stats.used_blocks:
            return stats
        time.sleep(0.01)
    raise AssertionError(f"still busy: {live.service.active} active, {live.service.stats()}")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**LONG, "stream": True}),
        ("/v1/completions", {**LONG, "stream": True, "prompt": ["Hello", "The Lorax"], "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "stream": True}),
        ("/generate_stream", {"inputs": "Hello", "parameters": {"ignore_eos_token": True, "adapter_id": "pirate"}}),
    ],
    ids=["completion", "many", "chat", "native"],
)
def test_leaving_a_stream_aborts_it(live, path, body):
    before = wait_idle(live).generated_tokens
    with live.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        next(response.iter_bytes())
    after = wait_idle(live).generated_tokens
    most = 4000 * 4 if isinstance(body.get("prompt"), list) else 4000
    assert after - before < most / 2


def test_leaving_before_an_answer_aborts_it(live):
    before = wait_idle(live).generated_tokens
    raw = httpx.Request("POST", f"{live.url}/v1/completions", json=LONG)
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(raw.content)}", "", ""])
    with socket.create_connection(("127.0.0.1", raw.url.port)) as connection:
        connection.sendall(head.encode() + raw.content)
        until(lambda: live.service.active)
    after = wait_idle(live).generated_tokens
    assert after - before < 2000


def test_the_next_one_is_served(live):
    with live.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        next(response.iter_bytes())
    assert ok(live.post("/v1/completions", {**LONG, "max_tokens": 4}))["usage"]["completion_tokens"] == 4
    wait_idle(live)


def test_a_deadline_after_the_first_token_is_an_event(model_folder):
    with serving(model_folder, request_timeout=0.05, max_model_len=160) as short:
        body = {**LONG, "max_tokens": 150, "n": 8, "temperature": 1, "stream": True}
        response = short.post("/v1/completions", body)
        if response.status_code == 504:
            return  # the deadline struck before the first token: then it is a status
        *_chunks, last, done = events(response)
        assert done == "[DONE]"
        assert last["error"]["code"] == "deadline_exceeded"
        native = short.post("/generate_stream", {"inputs": "Hello", "parameters": {"ignore_eos_token": True}})
        if native.status_code == 200:
            assert set(events(native)[-1]) == {"error", "error_type"}
