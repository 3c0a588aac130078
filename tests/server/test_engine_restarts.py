"""An engine that dies: what the log, the metrics and ``/info`` of a real ``truffula serve`` say of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
from live_server import MODEL, health_of, ok, until

from truffula.bench.server import free_port


def healthy(client: httpx.Client) -> bool:
    try:
        return health_of(client) == 200
    except httpx.TransportError:
        return False


def kill_engine(server: int) -> int:
    (engine,) = (child.pid for child in psutil.Process(server).children() if "engine.worker" in str(child.cmdline()))
    os.kill(engine, signal.SIGKILL)
    return engine


def test_each_death_is_logged_with_its_reason_and_counted_until_the_server_ends(
    long_model_folder: Path, tmp_path: Path
):
    port, log = free_port(), tmp_path / "log"
    command = [
        sys.executable, "-m", "truffula", "serve", str(long_model_folder), "--port", str(port), "--memory", "256MiB",
        "--max-restarts", "1", "--threads", "1", "--served-model-name", MODEL,
    ]  # fmt: skip

    def errors() -> list[str]:
        return [line for line in log.read_text().splitlines() if " error " in line]

    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        try:
            until(lambda: healthy(client))
            until(lambda: "ready at" in log.read_text())
            start = log.read_text()
            assert f"Listening on 127.0.0.1:{port}; loading {long_model_folder}" in start
            assert re.search(r"KiB weights, (tied|separate)\n", start), "tying in one word"
            assert "truffula_engine_restarts_total 0.0" in client.get("/metrics").text
            assert ok(client.get("/info"))["engine_restart_reason"] is None

            body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4000, "stream": True, "ignore_eos": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                frames = answer.iter_lines()
                next(frames)
                first = kill_engine(server.pid)
                assert "SIGKILL" in "".join(frames)
            until(errors)
            (line,) = errors()
            assert f"engine process {first} died" in line and "SIGKILL" in line
            assert "1 open request failed" in line and "restart 1 of 1 within 300 s" in line

            until(lambda: healthy(client))
            assert "truffula_engine_restarts_total 1.0" in client.get("/metrics").text
            found = ok(client.get("/info"))
            assert found["engine_restarts"] == 1 and "SIGKILL" in found["engine_restart_reason"]

            second = kill_engine(server.pid)
            assert server.wait(60) == 1
            last = errors()[1]
            assert f"engine process {second} died" in last and "0 open requests failed" in last
            assert "not restarted" in last and "2 times within 300 s" in last and "--max-restarts is 1" in last
            assert any("exiting with status 1" in line for line in errors())
        finally:
            server.kill()
