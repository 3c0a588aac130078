"""Many clients, many of whom leave: the others are right and nothing is left behind. And a server that drains."""

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest
from live_server import MODEL, serving, until
from test_leaving_clients import wait_idle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MODELS = [MODEL, "pirate", "org/poet", "in-dir"]


def options(adapter_folders, **more):
    named = {name: str(adapter_folders[name]) for name in ("pirate", "org/poet")}
    return {"adapters": named, "adapter_dir": adapter_folders["in-dir"].parent, "queue_timeout": 500, **more}


def body(i, *, stream):
    """Request ``i``: its model, prompt and length differ from its neighbours'."""
    prompt = [3 + (i * 7 + k) % 300 for k in range(4 + i % 9)]
    return {
        "model": MODELS[i % len(MODELS)],
        "prompt": prompt,
        "max_tokens": 6 + i % 10,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


@pytest.mark.parametrize("transport", ["inline", "process"])
def test_500_requests_of_which_a_third_leave(model_folder, adapter_folders, transport):
    with serving(model_folder, **options(adapter_folders, transport=transport, max_running=32)) as live:
        sample = range(0, 500, 37)
        alone = {i: live.post("/v1/completions", body(i, stream=False)).json()["choices"][0]["text"] for i in sample}
        answers, left = asyncio.run(flood(live.url, 500, random.Random(5)))
        stats = wait_idle(live)
        assert 120 < left < 220
        assert len(answers) == 500 - left
        for i, expected in alone.items():
            if i in answers:
                assert answers[i] == expected, i
        by_body = {}
        for i, text in answers.items():
            assert by_body.setdefault(json.dumps(body(i, stream=False)), text) == text
        assert stats.used_blocks == 0
        assert stats.running == stats.waiting == 0
        assert live.service.active == 0
        states = asyncio.run(adapter_states(live))
        assert all(state.leases == 0 for state in states)
        assert live.client.get("/health").status_code == 200


async def adapter_states(live):
    from truffula.types import AdapterCommand

    loop = live.server.loading.loop
    future = asyncio.run_coroutine_threadsafe(live.service.adapters(AdapterCommand(action="list")), loop)
    return await asyncio.wrap_future(future)


async def flood(url, count, rng):
    answers: dict[int, str] = {}
    left = 0
    limits = httpx.Limits(max_connections=count)
    plans = [(rng.random() < 1 / 3, rng.random() < 0.5, rng.randrange(4)) for _ in range(count)]

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=500) as client:

        async def one(i):
            nonlocal left
            leaves, streams, after = plans[i]
            if not streams and not leaves:
                response = await client.post("/v1/completions", json=body(i, stream=False))
                assert response.status_code == 200, response.text
                answers[i] = response.json()["choices"][0]["text"]
                return
            if not streams:
                left += 1
                task = asyncio.ensure_future(client.post("/v1/completions", json=body(i, stream=False)))
                for _ in range(after * 50):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return
            async with client.stream("POST", "/v1/completions", json=body(i, stream=True)) as response:
                assert response.status_code == 200
                text, seen = "", 0
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        assert "error" not in chunk, chunk
                        text += chunk["choices"][0]["text"]
                        seen += 1
                        if leaves and seen > after:
                            left += 1
                            return
                if leaves:
                    left += 1
                else:
                    answers[i] = text

        async with asyncio.TaskGroup() as group:
            for i in range(count):
                group.create_task(one(i))
    return answers, left


class Log:
    """A process's stderr, read to its end by a thread of its own: a full pipe would stop who writes to it."""

    def __init__(self, stream):
        self._lines, self._ended = [], False
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream):
        for line in stream:
            self._lines.append(line)
        self._ended = True

    def find(self, words):
        """The first line with ``words``, once it is there. The end of the stream without it is an error."""
        found = []

        def look():
            ended = self._ended  # before the lines: the last may come in between
            found[:] = [line for line in list(self._lines) if words in line]
            return found or ended

        until(look, patience_s=120)
        assert found, f"ended without {words!r}: {''.join(self._lines[-20:])}"
        return found[0]


@contextlib.contextmanager
def serve_process(model_folder, *flags):
    """``truffula serve`` itself; yields the process, its address and its log, and ends it when the test has not."""
    command = [sys.executable, "-m", "truffula", "serve", str(model_folder), "--port", "0", "--memory", "1GiB"]
    with subprocess.Popen([*command, "--threads", "1", *flags], stderr=subprocess.PIPE, text=True) as process:
        log = Log(process.stderr)
        try:
            yield process, log.find("ready at ").split("ready at ")[1].split()[0], log
        finally:
            process.kill()
            log._thread.join(60)


def signal_while_streaming(process, url, number, **more):
    """The data lines that come after the signal."""
    request = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "stream": True, **more}
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=100) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(number)
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def test_sigterm_lets_running_requests_end(model_folder):
    with serve_process(model_folder, "--drain-timeout", "60") as (process, url, _):
        seen = signal_while_streaming(process, url, signal.SIGTERM)
        assert seen[-1] == "[DONE]"
        assert json.loads(seen[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0


def test_a_drain_that_takes_too_long_says_so_in_the_stream(long_model_folder):
    with serve_process(long_model_folder, "--drain-timeout", "0.1") as (process, url, _):
        seen = signal_while_streaming(process, url, signal.SIGINT, n=16, max_tokens=4000)
        assert seen[-1] == "[DONE]"
        assert "error" in json.loads(seen[-2])
        assert process.wait(60) == 0


def test_a_second_signal_leaves_at_once(long_model_folder):
    with serve_process(long_model_folder, "--drain-timeout", "600") as (process, url, log):
        request = {"prompt": [5, 6, 7], "max_tokens": 4000, "n": 16, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=100) as response:
            next(response.iter_lines())
            process.send_signal(signal.SIGTERM)
            log.find("draining")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) != 0


def test_a_killed_engine_answers_every_request_and_comes_back(long_model_folder):
    with serve_process(long_model_folder) as (process, url, _):
        request = {"prompt": [5, 6, 7], "max_tokens": 4000, "n": 8, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=100) as response:
            lines = response.iter_lines()
            next(lines)
            for child in psutil.Process(process.pid).children():
                child.kill()
            seen = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert seen[-1] == "[DONE]"
        assert json.loads(seen[-2])["error"]["code"] == "engine_died"
        deadline = time.monotonic() + 120
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        again = {"prompt": [5], "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=again, timeout=100).status_code == 200
        process.terminate()
        assert process.wait(60) == 0
