"""From the start of ``truffula serve`` to its first token over HTTP, and what the idle server holds in memory.

    python benchmarks/start.py [smollm2]           # five starts, then one more and its memory
    python benchmarks/start.py --smoke             # one start of a tiny random model

The files are in the system's cache from the first start on, which is not counted. CPU seconds are those of all the
server's processes until the first token: they move less with a busy neighbour than the wall clock does. Memory is each
process's proportional share (PSS) once the server has answered a request and has been idle; weights and touched KV lie
in the engine's anonymous memory. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

from truffula.bench.server import free_port
from truffula.environment import installed_environment
from truffula.testing.tiny import write_tiny_checkpoint

POLL_S = 0.005
NAME = "measured"
T = TypeVar("T")


def name_of(process: psutil.Process) -> str:
    return next((word for word in process.cmdline() if word.startswith("truffula.")), "truffula serve")


def ask(port: int, path: str, body: dict[str, object] | None = None) -> int:
    """The status of one request; 0 while no server listens."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        try:
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except ConnectionError:
            return 0


def cpu_of(process: psutil.Process, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of processor time of ``process`` alone during ``work``, and its result. Its threads must live on."""

    def seconds() -> float:
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        return (
            sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
        )  # cpu_times counts in 10 ms

    before = seconds()
    result = work()
    return seconds() - before, result


@contextlib.contextmanager
def server(arguments: list[str]) -> Iterator[tuple[psutil.Popen, int]]:
    """Started, not waited for: its process and port."""
    port = free_port()
    command = [sys.executable, "-m", "truffula", "serve", *arguments]
    command += ["--port", str(port), "--served-model-name", NAME]
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(command, stdout=log, stderr=log, env=installed_environment())
        try:
            yield process, port
        finally:
            process.terminate()
            process.wait()


def first_token(
    arguments: list[str], prompt: str | list[int], rest_s: float = 0.0
) -> tuple[float, float, float, dict[str, float]]:
    """Wall seconds to healthy, to the first token; CPU seconds; MB of PSS by process after ``rest_s`` of rest."""
    began = time.monotonic()
    with server(arguments) as (process, port):
        while ask(port, "/health") != 200:
            if process.poll() is not None or time.monotonic() - began > 120:
                sys.exit("the server did not start")
            time.sleep(POLL_S)
        healthy = time.monotonic() - began
        status = ask(port, "/v1/completions", {"model": NAME, "prompt": prompt, "max_tokens": 1})
        done = time.monotonic() - began
        if status != 200:
            sys.exit(f"the first request was answered with {status}")
        family = [process, *process.children(recursive=True)]
        cpu = sum(sum(one.cpu_times()[:4]) for one in family)  # own and waited-for children, user and system
        if rest_s:
            time.sleep(rest_s)
        memory = {f"{name_of(one)} {one.pid}": one.memory_full_info().pss / 2**20 for one in family if rest_s}
    return healthy, done, cpu, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", default=["smollm2"], help="the model, and options of the server behind --")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rest", type=float, default=15.0, help="seconds of rest before memory is looked at")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    prompt: str | list[int] = "Once"
    with tempfile.TemporaryDirectory() as folder:
        if given.smoke:
            write_tiny_checkpoint(Path(folder))
            given.model, given.repeats, given.rest, prompt = [folder], 1, 0.1, [1, 2, 3]
        first_token(given.model, prompt)
        runs = [first_token(given.model, prompt) for _ in range(given.repeats)]
        memory = first_token(given.model, prompt, given.rest)[3]
    for name, values in zip(
        ("healthy", "first token", "CPU"), zip(*(run[:3] for run in runs), strict=True), strict=True
    ):
        median = statistics.median(values)
        print(f"{name:12s} {median:.2f} s (least {min(values):.2f}, most {max(values):.2f})")
    for name, megabytes in memory.items():
        print(f"{name:28s} PSS {megabytes:.1f} MB")
    print(f"together     PSS {sum(memory.values()):.1f} MB")


if __name__ == "__main__":
    main()
