"""A client that goes takes its work with it, and faults after the first byte are events."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live_server import MODEL, Live, events, ok, serving, until

LONG = {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "temperature": 0, "model": MODEL}
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def live(long_model_folder: Path, adapter_folders: dict[str, Path]) -> Iterator[Live]:
    with serving(long_model_folder, adapters={"pirate": str(adapter_folders["pirate"])}) as found:
        yield found


def wait_idle(live):
    """Until nothing runs and no block or lease is held; the test's own timeout bounds it."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        stats = live.service.known_stats()
        if not live.service.active and not stats.running and not stats.waiting and not stats.used_blocks:
            return stats
        time.sleep(0.01)
    raise AssertionError(f"still busy: {live.service.active} active, {live.service.known_stats()}")


class Held:
    """An engine that stands between two steps until ``left``, with what it has generated."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._stands, self._go_on = threading.Event(), threading.Event()
        self.generated = 0

    def stand(self) -> None:
        """In the thread that drives the engine."""
        self.generated = self._live.service._client._engine.stats().generated_tokens
        self._stands.set()
        assert self._go_on.wait(60)

    def __enter__(self) -> "Held":
        assert self._live.service._client._post(self.stand) is None
        assert self._stands.wait(60)
        return self

    def __exit__(self, *exc: object) -> None:
        self._go_on.set()

    def left(self) -> None:
        """Until the server has noticed that nobody is there any more, and told the engine."""
        until(lambda: not self._live.service.active)
        ok(self._live.client.get("/v1/models"))  # the loop has come back from the turn in which it noticed


@pytest.mark.parametrize(
    ("path", "body", "sequences"),
    [
        ("/v1/completions", {**LONG, "stream": True}, 1),
        ("/v1/completions", {**LONG, "stream": True, "prompt": ["Hello", "The Lorax"], "n": 2}, 4),
        ("/v1/chat/completions", {"messages": CHAT, "ignore_eos": True, "stream": True}, 1),
        ("/generate_stream", {"inputs": "Hello", "parameters": {"ignore_eos_token": True, "adapter_id": "pirate"}}, 1),
    ],
    ids=["completion", "many", "chat", "native"],
)
def test_leaving_a_stream_ends_it_within_a_step(live, path, body, sequences):
    """The engine stands while the client goes: what the server needs to notice is nobody's token."""
    wait_idle(live)
    with live.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        next(response.iter_bytes())
        with Held(live) as held:
            response.close()
            held.left()
    assert wait_idle(live).generated_tokens - held.generated <= sequences  # those of the step it stood before


@pytest.mark.parametrize("padding", [0, pytest.param(66_000, marks=pytest.mark.slow)])  # 2 s: it needs a text worker
def test_leaving_before_an_answer_ends_it_within_a_step(live, padding):
    """Of a large body too, whose connection the server has stopped to read meanwhile."""
    wait_idle(live)
    raw = httpx.Request("POST", f"{live.url}/v1/completions", json={**LONG, "user": "x" * padding})
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(raw.content)}", "", ""])
    with socket.create_connection(("127.0.0.1", raw.url.port)) as connection:
        connection.sendall(head.encode() + raw.content)
        until(lambda: live.service.active)
        with Held(live) as held:
            connection.close()
            held.left()
    assert wait_idle(live).generated_tokens - held.generated <= 1


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
