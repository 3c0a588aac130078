"""Heads that are no valid HTTP/1.1, or ask for another protocol: JSON errors, or an answer as if they had not asked."""

import json
import socket
from http.client import HTTPResponse
from urllib.parse import urlsplit

import pytest

CHAT = json.dumps({"model": "tiny/llama", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40})


def answers(live, said):
    """The status, headers and body of each answer, until the server closes the connection."""
    found = []
    with socket.create_connection(("127.0.0.1", urlsplit(live.url).port), timeout=30) as connection:
        for part in said:
            connection.sendall(part)
        stream = connection.makefile("rb")
        while stream.peek(1):
            response = HTTPResponse(Buffered(stream))
            response.begin()
            found.append((response.status, dict(response.headers.items()), response.read()))
    return found


class Buffered:
    """What ``HTTPResponse`` needs of a socket, whose buffer outlives one response."""

    def __init__(self, stream):
        self.stream = stream

    def makefile(self, mode):
        return self

    def readline(self, *size):
        return self.stream.readline(*size)

    def read(self, *size):
        return self.stream.read(*size)

    def readinto(self, into):
        return self.stream.readinto(into)

    def flush(self):
        pass

    def close(self):
        pass


@pytest.mark.parametrize(
    ("head", "status", "fields"),
    [
        ("POST /v1/completions HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked", 400, {"error"}),
        ("POST /generate HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked", 400, {"error", "error_type"}),
        ("GET /v1/models HTTP/9.9", 505, {"error"}),
        ("GET /health HTTP/2.0", 505, {"error", "error_type"}),
        ("POST /v1/messages?beta=true HTTP/9.9", 505, {"type", "error", "request_id"}),
        ("PRI * HTTP/2.0", 505, {"error", "error_type"}),  # HTTP/2 by prior knowledge
        ("\x16\x03\x01\x02", 400, {"error", "error_type"}),  # TLS
        ("NONSENSE / HTTP/1.1", 400, {"error", "error_type"}),
        ("GET /v1/models HTTP/1.1\r\nname : value", 400, {"error"}),
        ("GET /v1/models HTTP/1.1\r\ncontent-length: x", 400, {"error"}),
        ("CONNECT localhost:80 HTTP/1.1", 400, {"error", "error_type"}),
    ],
)
def test_a_head_that_is_no_valid_request_is_refused_in_json_and_ends_its_connection(live, head, status, fields):
    ((found, headers, body),) = answers(live, [f"{head}\r\nhost: localhost\r\n\r\n0\r\n\r\n".encode()])
    assert found == status
    assert headers["connection"] == "close" and headers["content-type"] == "application/json"
    assert headers["x-request-id"] and set(json.loads(body)) == fields


def request(path, body, *headers):
    head = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *headers]
    return ("\r\n".join(head) + f"\r\n\r\n{body}").encode()


H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA")
LAST = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize("upgrade", [H2C, ("connection: upgrade", "upgrade: websocket")])
@pytest.mark.parametrize("cut", [None, 30, -40, -10])
def test_a_request_that_asks_for_another_protocol_is_served(live, upgrade, cut):
    """As Java's client sends its first request; its body may come with the head or later."""
    said = request("/v1/chat/completions", CHAT, *upgrade)
    head = said.index(b"\r\n\r\n") + 4
    parts = [said + LAST] if cut is None else [said[:cut], said[cut:head], said[max(cut % len(said), head) :] + LAST]
    chat, health = answers(live, parts)
    assert chat[0] == 200 and json.loads(chat[2])["usage"]["completion_tokens"] > 0
    assert health[0] == 200


def test_what_follows_a_whole_request_does_not_harm_its_answer(live):
    """A client whose body is longer than it says gets its answer, whole, and then the connection ends."""
    ((status, _, body),) = answers(live, [request("/v1/chat/completions", CHAT) + b"\x00 nonsense\r\n\r\n"])
    assert status == 200 and json.loads(body)["choices"]


def test_a_chunk_that_is_no_chunk_is_refused(live):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    ((status, headers, body),) = answers(live, [head + b"3\r\nabc\r\nzz\r\n"])
    assert status == 400 and headers["connection"] == "close" and set(json.loads(body)) == {"error"}
