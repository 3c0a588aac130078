"""Connections that say nothing, or half a request head: they end in time and keep nobody out."""

import asyncio
import contextlib
import gc
import http.client
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import httpx
import pytest
from live_server import MODEL, ok, serving, until

from truffula.config import ServerConfig
from truffula.server.connections import AcceptErrors, most_connections


def connect(url, said=b""):
    connection = socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=30)
    connection.sendall(said)
    return connection


def test_a_head_that_does_not_come_ends_the_connection(impatient):
    said = {"nothing": b"", "half": b"GET /hea", "most": b"GET /health HTTP/1.1\r\nhost: localhost\r\n"}
    with contextlib.ExitStack() as held:
        connections = {name: held.enter_context(connect(impatient.url, head)) for name, head in said.items()}
        assert {name: connection.recv(100) for name, connection in connections.items()} == dict.fromkeys(said, b"")
    until(lambda: len(impatient.server.connections) <= 1)  # the test's own client


def test_a_head_in_drops_gains_no_time(impatient):
    with connect(impatient.url, b"GET / HTTP/1.1\r\nx: ") as connection:
        connection.settimeout(0.1)
        ended = time.monotonic() + 60
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < ended:
                connection.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(100) == b""
                    break
        assert time.monotonic() < ended


def test_a_head_that_is_too_long_ends_the_connection(live):
    with connect(live.url, b"GET / HTTP/1.1\r\n") as connection, contextlib.suppress(ConnectionError):
        for number in range(2000):  # 2 MB: more than the buffers between hold while nobody reads them
            connection.sendall(b"x-%d: %s\r\n" % (number, b"y" * 1000))
        pytest.fail("the server has read all of it")
    ok(live.client.get("/v1/models"))


def test_half_a_head_after_an_answer(impatient):
    whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with connect(impatient.url, whole) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(whole[:12])
        assert connection.recv(100) == b""


def test_a_long_answer_is_not_cut_by_the_heads_limit(long_model_folder):
    with serving(long_model_folder, body_timeout=0.5) as live:
        body = {"prompt": "Hello", "max_tokens": 800, "ignore_eos": True, "temperature": 0}
        assert ok(live.post("/v1/completions", body))["usage"]["completion_tokens"] == 800


def test_half_a_head_during_a_pipelined_answer_does_not_cut_it(long_model_folder):
    """The second request begins when the first answer is sent, whose task has not ended then."""

    def request(**fields):
        said = json.dumps({"prompt": "Hello", "ignore_eos": True, "temperature": 0, "stream": True, **fields})
        return f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(said)}\r\n\r\n{said}".encode()

    two = request(max_tokens=1) + request(max_tokens=800)
    with serving(long_model_folder, body_timeout=0.5) as live, connect(live.url, two) as connection:
        seen = b""
        while seen.count(b"HTTP/1.1 200") < 2:
            seen += connection.recv(65536)
        connection.sendall(b"GET /hea")
        while seen.count(b"[DONE]") < 2:
            received = connection.recv(65536)
            assert received, seen[-500:]
            seen += received


def test_those_that_wait_longest_make_room(model_folder):
    with serving(model_folder, max_open_requests=1) as live, contextlib.ExitStack() as held:
        for _ in range(150):
            held.enter_context(connect(live.url, b"GET /hea"))
        for _ in range(3):
            assert httpx.get(f"{live.url}/health", timeout=30).status_code == 200
        until(lambda: len(live.server.connections) <= 101)
        ok(live.post("/v1/completions", {"prompt": "Hello", "max_tokens": 1}))


def test_few_open_files_mean_fewer_connections_and_a_warning(caplog):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = ServerConfig(max_open_requests=2048)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        assert most_connections(config) == 1024 - 96
        assert "ulimit -n" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert most_connections(ServerConfig(max_open_requests=1)) == 101


def test_what_cannot_be_accepted_is_said_once_in_a_while(caplog):
    loop = asyncio.new_event_loop()
    try:
        handler = AcceptErrors()
        for _ in range(1000):
            handler(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many")})
        assert len(caplog.records) == 1
        handler(loop, {"message": "something else"})
        assert len(caplog.records) == 2
    finally:
        loop.close()


@pytest.mark.slow
def test_with_few_descriptors_200_half_heads_stop_nobody(model_folder, tmp_path):
    flags = "--port 0 --memory 1GiB --threads 1"
    command = f"ulimit -n 128; exec {sys.executable} -m truffula serve {model_folder} {flags}"
    said = tmp_path / "log"
    with said.open("w") as log, subprocess.Popen(["bash", "-c", command], stderr=log) as process:
        try:
            until(lambda: "ready at " in said.read_text(), patience_s=120)
            url = said.read_text().split("ready at ")[1].split()[0]
            with contextlib.ExitStack() as held:
                for _ in range(200):
                    held.enter_context(connect(url, b"GET /hea"))
                for _ in range(5):
                    assert httpx.get(f"{url}/health", timeout=30).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert "--max-open-requests" in said.read_text()
    assert said.stat().st_size < 20_000, said.read_text()[-2000:]


def test_a_request_leaves_nothing_for_the_garbage_collector(live):
    """Whole, streamed, refused, and left by its client. In a server a collection of all objects is rare."""
    address, path = live.url.removeprefix("http://"), "/v1/completions"
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "temperature": 0}

    def ask(more, leave):
        with contextlib.closing(http.client.HTTPConnection(address, timeout=60)) as connection:
            connection.request("POST", path, json.dumps(body | more), {"content-type": "application/json"})
            with contextlib.closing(connection.getresponse()) as response:
                response.read(10 if leave else None)

    requests = [({}, False), ({"stream": True}, False), ({"model": "none"}, False)]
    requests.append(({"stream": True, "max_tokens": 40}, True))
    for more, leave in requests:
        ask(more, leave)
    until(lambda: live.service.active == 0)
    gc.collect()
    gc.freeze()  # what the other tests hold
    gc.disable()
    try:
        for more, leave in requests:
            gc.collect()
            for _ in range(5):
                ask(more, leave)
            until(lambda: live.service.active == 0)
            time.sleep(0.1)  # the tasks of the last one end
            assert gc.collect() < 15, f"cycles are left by {more}"  # each left 20 to 50 objects
    finally:
        gc.unfreeze()
        gc.enable()
