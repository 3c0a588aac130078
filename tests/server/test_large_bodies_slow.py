"""No body of legal size delays another stream by more than 50 ms beyond its idle gap, or ``/health`` by more than 100.

Times are asserted here only, and on a machine that may compute other things too:

- The processor time of each callback of the server's event loop and of each garbage collection is measured in the
  server (``watched_server.py``) and may never be above the limit. Other programs do not change it.
- The client's waits are measured in a process of its own (``bystander.py``), which also measures how late its sleeps
  end. From a wait, that and the longest idle gap (of the time before the body) are subtracted. A body has ``TRIES``
  tries, since several processes in a row may have to wait for the machine: what a body causes, it causes every time.
"""

import contextlib
import http.client
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import hostile
import psutil
import pytest
from live_server import until, write_model

pytestmark = [pytest.mark.slow, pytest.mark.alone]
GAP_S, HEALTH_S, TRIES, IDLE_S = 0.05, 0.1, 4, 3.0
HERE = Path(__file__).parent
TALK = [{"role": "user", "content": "a"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TRUE = [True] * 340_000
BIAS = {str(i): 1.0 for i in range(32_000)}
SCORED = {"prompt": [5] * 4000, "max_tokens": 1}
ANSWERS = {"n": 16, "max_tokens": 300, "ignore_eos": True, "temperature": 1}
DETAILS = {"max_new_tokens": 2, "details": True, "decoder_input_details": True, "top_n_tokens": 20}
# name: (path, body, how many at the same time)
BODIES = {
    "prompt of booleans": (COMPLETION, {"prompt": TRUE}, 1),
    "stop ids of booleans": (COMPLETION, {"prompt": "a", "stop_token_ids": TRUE}, 1),
    "stops of nulls": ("/generate", {"inputs": "a", "parameters": {"stop": [None] * 340_000}}, 1),
    "tokens of booleans": ("/detokenize", {"tokens": TRUE}, 1),
    "messages of wrong roles": (CHAT, {"messages": [{"role": "x", "content": 1}] * 60_000}, 4),
    "long stops": (COMPLETION, {"prompt": "a", "n": 16, "stop": ["a" * 190_000 + str(i) for i in range(10)]}, 1),
    "stops at their limit": (COMPLETION, {"prompt": "a", "n": 16, "stop": ["a" * 1600 + str(i) for i in range(10)]}, 1),
    "biases": (COMPLETION, {"prompt": "a", "logit_bias": BIAS, "max_tokens": 2}, 1),
    "biases of 128 prompts": (COMPLETION, {"prompt": ["a"] * 128, "n": 16, "logit_bias": BIAS}, 1),
    "template variables": (CHAT, {"messages": TALK, "chat_template_kwargs": {f"x{i}": 1 for i in range(90_000)}}, 4),
    "text to tokenize": ("/tokenize", {"inputs": "ab c" * 100_000}, 8),
    "tokens with pieces": ("/tokenize", {"prompt": "ab c" * 500_000, "return_token_strs": True}, 1),
    "45,000 messages": (CHAT, {"messages": TALK * 45_000}, 4),
    "8,000 messages": (CHAT, {"messages": TALK * 8000}, 8),
    "1,700 messages": (CHAT, {"messages": TALK * 1700}, 4),
    "ids of 128 prompts": (COMPLETION, {"prompt": [[5] * 4000] * 128, "max_tokens": 1}, 1),
    "cut text": (COMPLETION, {"prompt": "a" * 2_000_000, "truncate_prompt_tokens": 5, "max_tokens": 1}, 4),
    "120,000 keys": (COMPLETION, {"prompt": "a", **{f"k{i}": i for i in range(120_000)}}, 1),
    "parts that are no parts": (CHAT, {"messages": [{"role": "user", "content": [1] * 300_000}]}, 1),
    "documents that are none": (CHAT, {"messages": TALK, "documents": [1] * 300_000}, 1),
    "echo": (COMPLETION, {"prompt": "ab c" * 900, "echo": True, "n": 16, "max_tokens": 1}, 1),
    "2,048 sequences": (COMPLETION, {"prompt": ["a"] * 128, "n": 16, "max_tokens": 1}, 1),
    "echo with alternatives": (COMPLETION, {**SCORED, "echo": True, "logprobs": 20}, 2),
    "streamed echo with alternatives": (COMPLETION, {**SCORED, "echo": True, "logprobs": 20, "stream": True}, 2),
    "prompt_logprobs": (COMPLETION, {**SCORED, "prompt_logprobs": 20}, 2),
    "prompt_logprobs of 15 prompts": (COMPLETION, {**SCORED, "prompt": [[5] * 1600] * 15, "prompt_logprobs": 19}, 1),
    "long answers with alternatives": (CHAT, {"messages": TALK, **ANSWERS, "logprobs": True, "top_logprobs": 20}, 1),
    "details": ("/generate", {"inputs": "ab c" * 900, "parameters": DETAILS}, 4),
}  # fmt: skip
BODIES |= {name: (path, body, 1) for name, path, body, _ in hostile.bombs()}


class Watched:
    """A server and its bystander."""

    def __init__(self, process, port, bystander, report):
        self.process, self.port, self._bystander, self._report = process, port, bystander, report

    def memory(self):
        """Bytes in memory of the server and its processes."""
        server = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in (server, *server.children(recursive=True)))

    def waits(self):
        """The bystander's longest waits since the last call."""
        self._bystander.stdin.write("\n")
        self._bystander.stdin.flush()
        return json.loads(self._bystander.stdout.readline())

    def long_callbacks(self):
        """``(processor time in seconds, name)`` of those since the last call, the longest first."""
        lines = [line.split(" ", 1) for line in self._report.read_text().splitlines()]
        self._report.write_text("")
        return sorted(((float(took), name) for took, name in lines), reverse=True)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    model = write_model(folder / "model", max_position_embeddings=4096, vocab_size=32_000)
    log, report = folder / "log", folder / "report"
    command = [sys.executable, str(HERE / "watched_server.py"), str(report), "serve", str(model)]
    command += ["--port", "0", "--memory", "1GiB", "--threads", "1"]
    with log.open("w") as said, subprocess.Popen(command, stderr=said) as process:
        try:
            until(lambda: "ready at " in log.read_text(), patience_s=120)
            port = urlsplit(log.read_text().split("ready at ")[1].split()[0]).port
            script = [sys.executable, str(HERE / "bystander.py"), str(port)]
            pipe = subprocess.PIPE
            with subprocess.Popen(script, stdin=pipe, stdout=pipe, text=True) as bystander:
                made = Watched(process, port, bystander, report)
                until(lambda: made.waits()["gap"])
                made.long_callbacks()  # of the start
                yield made
                bystander.terminate()
        finally:
            process.terminate()
            process.wait(60)


def post(port, path, body):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=280)) as connection:
        connection.request("POST", path, body, {"content-type": "application/json"})
        connection.getresponse().read()


@pytest.mark.parametrize("name", BODIES)
def test_a_large_body_delays_no_other_stream(watched, name):
    path, value, count = BODIES[name]
    body = json.dumps(value).encode()
    assert len(body) <= 2 * 2**20
    tries = []
    for _ in range(TRIES):
        watched.waits()
        time.sleep(IDLE_S)
        idle = watched.waits()
        threads = [threading.Thread(target=post, args=(watched.port, path, body)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        waits = watched.waits()
        long = watched.long_callbacks()
        assert [one for one in long if one[0] > GAP_S] == []
        gap, health = waits["gap"] - idle["gap"] - waits["machine"], waits["health"] - waits["machine"]
        tries.append({"gap": gap, "health": health, "idle": idle, "waits": waits, "long": long[:5]})
        if gap <= GAP_S and health <= HEALTH_S:
            return
    raise AssertionError(tries)


CONNECTIONS, GROWTH = 5000, 256 * 2**20
BEGINNINGS = (
    b"",
    b"GET /hea",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n{",
    b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n",
)
"""What a client sends that then sends one byte at a time."""


def hold_slow_connections(port, count):
    """Opens connections, as many at a time as there are, whose clients send slowly; all stay open to the end."""
    with contextlib.ExitStack() as held:
        for i in range(count):
            one = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            with contextlib.suppress(OSError):  # it may have been closed in favour of the next
                one.sendall(BEGINNINGS[i % len(BEGINNINGS)])
                one.sendall(b"x" if i % 3 == 0 else b"")
        yield


def test_5000_connections_that_send_slowly_disturb_no_stream(watched):
    """They are bounded, and cost little memory; a stream is as fast as before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = CONNECTIONS if hard == resource.RLIM_INFINITY else min(CONNECTIONS, hard - 200)
    before, tries = watched.memory(), []
    try:
        for _ in range(TRIES):
            watched.waits()
            time.sleep(IDLE_S)
            idle = watched.waits()
            for _ in hold_slow_connections(watched.port, count):
                waits = watched.waits()
                assert watched.memory() - before < GROWTH
            assert [one for one in watched.long_callbacks() if one[0] > GAP_S] == []
            tries.append({"gap": waits["gap"] - idle["gap"] - waits["machine"], "idle": idle, "waits": waits})
            if tries[-1]["gap"] <= GAP_S:
                break
        else:
            raise AssertionError(tries)
        until(lambda: watched.waits()["health"] > 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
