"""Clients that send slowly, or hold a place without using it."""

import contextlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from live_server import assert_canonical_error, events, ok, serving, until

BODY = {"prompt": "Hello", "max_tokens": 1}


@contextlib.contextmanager
def half_a_body(live, path):
    """A connection whose request says more bytes than it sends."""
    head = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", "content-length: 500", "", ""]
    with socket.create_connection(("127.0.0.1", urlsplit(live.url).port), timeout=30) as connection:
        connection.sendall("\r\n".join(head).encode() + b'{"prompt":')
        yield connection


def test_a_body_that_never_ends_is_408(impatient):
    told = {"/v1/completions": ("code", "body_timeout"), "/generate": ("error_type", "validation")}
    with contextlib.ExitStack() as held:
        waiting = {path: held.enter_context(half_a_body(impatient, path)) for path in told}
        for path, (key, value) in told.items():
            raw = b""
            while part := waiting[path].recv(65536):  # until the server closes
                raw += part
            head, _, body = raw.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            found = json.loads(body)
            found = found["error"] if path.startswith("/v1") else found
            assert found[key] == value
            assert "1 s" in str(found)
    ok(impatient.post("/v1/completions", BODY))


def test_open_requests_are_bounded_and_probes_are_not(model_folder):
    with serving(model_folder, max_open_requests=1) as live:
        with contextlib.ExitStack() as held:

            def refused():
                held.enter_context(half_a_body(live, "/v1/completions"))  # may itself find the place taken by the next
                return live.post("/v1/completions", BODY).status_code == 429

            until(refused)
            assert_canonical_error(live.post("/v1/completions", BODY), 429, "1 requests are open")
            assert_canonical_error(live.post("/generate", {"inputs": "Hello"}), 429)
            assert live.client.get("/health").status_code == 200
        until(lambda: live.post("/v1/completions", BODY).status_code == 200)


def test_a_client_that_reads_nothing_costs_others_nothing_and_is_closed(long_model_folder):
    """Its frames are 2 KB each, so that no buffer of the system holds all of them."""
    endless = {"max_new_tokens": 4000, "ignore_eos_token": True, "return_k_alternatives": 20, "top_n_tokens": 20}
    prompts = [f"The Lorax {number}" for number in range(16)]
    with serving(long_model_folder, backend="auto", send_timeout=0.5) as live, socket.socket() as silent:
        alone = [live.native(prompt, max_new_tokens=32, details=True) for prompt in prompts]
        payload = json.dumps({"inputs": "Hello", "parameters": endless}).encode()
        lines = ["POST /generate_stream HTTP/1.1", "host: localhost", f"content-length: {len(payload)}", "", ""]
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", urlsplit(live.url).port))
        silent.sendall("\r\n".join(lines).encode() + payload)
        until(lambda: live.service.active)

        def streamed(prompt):
            body = {"inputs": prompt, "parameters": {"max_new_tokens": 32, "details": True}}
            return events(live.post("/generate_stream", body))

        with ThreadPoolExecutor(len(prompts)) as threads:
            beside = list(threads.map(streamed, prompts))
        for found, whole in zip(beside, alone, strict=True):
            assert [event["token"]["id"] for event in found] == [one["id"] for one in whole["details"]["tokens"]]
        until(lambda: not live.service.active)  # the server has closed the connection, and aborted what ran for it
        until(lambda: not (stats := live.service.known_stats()).running and not stats.used_blocks)
        received = bytearray()
        with contextlib.suppress(ConnectionError):
            while part := silent.recv(65536):
                received += part
        assert b'"details":{' not in received, "the last event was sent"
