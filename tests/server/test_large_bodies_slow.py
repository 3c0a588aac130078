"""No body of legal size delays another stream by more than 50 ms beyond its idle gap, or ``/health`` by more than 100.

Times are asserted here only. Other programs of the machine delay streams too, so a body has several tries, and the idle
gap is measured around each: what a body causes, it causes every time.
"""

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import pytest
from live_server import until, write_model

GAP_S, HEALTH_S, TRIES = 0.05, 0.1, 6
TALK = [{"role": "user", "content": "a"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TRUE = [True] * 340_000
BIAS = {str(i): 1.0 for i in range(32_000)}
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
}  # fmt: skip


class Bystander:
    """A client that streams, and one that asks for ``/health``; each keeps its longest wait since ``reset``."""

    def __init__(self, port):
        self.port, self.ended = port, threading.Event()
        self.gap = self.health = 0.0
        self.last = None
        self.threads = [threading.Thread(target=work) for work in (self._stream, self._ask)]
        for thread in self.threads:
            thread.start()

    def reset(self):
        self.gap = self.health = 0.0

    def _stream(self):
        body = {"prompt": "Once", "max_tokens": 3500, "stream": True, "ignore_eos": True}
        while not self.ended.is_set():
            self.last = None
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
                connection.request("POST", COMPLETION, json.dumps(body), {"content-type": "application/json"})
                response = connection.getresponse()
                while not self.ended.is_set() and (line := response.readline()):
                    if line.startswith(b"data: {"):
                        now = time.monotonic()
                        self.gap = max(self.gap, now - (self.last or now))
                        self.last = now

    def _ask(self):
        while not self.ended.is_set():
            began = time.monotonic()
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
                connection.request("GET", "/health")
                assert connection.getresponse().status == 200
            self.health = max(self.health, time.monotonic() - began)
            time.sleep(0.01)

    def close(self):
        self.ended.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture(scope="module")
def bystander(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    model = write_model(folder / "model", max_position_embeddings=4096, vocab_size=32_000)
    log = folder / "log"
    command = [
        sys.executable,
        "-m",
        "truffula",
        "serve",
        str(model),
        "--port",
        "0",
        "--memory",
        "1GiB",
        "--threads",
        "1",
    ]
    with log.open("w") as said, subprocess.Popen(command, stderr=said) as process:
        try:
            until(lambda: "ready at " in log.read_text(), patience_s=120)
            port = urlsplit(log.read_text().split("ready at ")[1].split()[0]).port
            made = Bystander(port)
            until(lambda: made.last)
            yield made
            made.close()
        finally:
            process.terminate()
            process.wait(60)


def post(port, path, body):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=280)) as connection:
        connection.request("POST", path, body, {"content-type": "application/json"})
        connection.getresponse().read()


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
def test_a_large_body_delays_no_other_stream(bystander, name):
    path, value, count = BODIES[name]
    body = json.dumps(value).encode()
    assert len(body) <= 2 * 2**20
    seen = []
    for _ in range(TRIES):
        bystander.reset()
        began = time.monotonic()
        threads = [threading.Thread(target=post, args=(bystander.port, path, body)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took, gap, health = time.monotonic() - began, bystander.gap, bystander.health
        bystander.reset()
        time.sleep(min(took, 5.0) + 0.5)
        seen.append({"gap": gap, "idle": bystander.gap, "health": health})
        if gap <= bystander.gap + GAP_S and health <= HEALTH_S:
            return
    raise AssertionError(seen)
