"""Clients that send slowly, or hold a place without using it."""

import contextlib
import json
import socket
from urllib.parse import urlsplit

from live_server import assert_canonical_error, ok, serving, until

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
