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
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from truffula.bench.server import free_port
from truffula.testing.tiny import write_tiny_checkpoint

POLL_S = 0.005
NAME = "measured"
TICKS = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """``pid`` and all its descendants."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += family(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """Of a living process, with the children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def command_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return next((w for w in words if w.startswith("truffula.")), "truffula serve")


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


@contextlib.contextmanager
def server(arguments: list[str]) -> Iterator[tuple[int, int]]:
    """Started, not waited for: its process id and port."""
    port = free_port()
    command = [sys.executable, "-m", "truffula", "serve", *arguments]
    command += ["--port", str(port), "--served-model-name", NAME]
    # As it is installed: the interpreter keeps what it has compiled.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield process.pid, port
        finally:
            process.terminate()
            process.wait()


def first_token(
    arguments: list[str], prompt: str | list[int], rest_s: float = 0.0
) -> tuple[float, float, float, dict[str, dict[str, float]]]:
    """Wall seconds to healthy, to the first token; CPU seconds; memory by process, after ``rest_s`` seconds of rest."""
    began = time.monotonic()
    with server(arguments) as (pid, port):
        while ask(port, "/health") != 200:
            if not Path(f"/proc/{pid}/task/{pid}/children").exists() or time.monotonic() - began > 120:
                sys.exit("the server did not start")
            time.sleep(POLL_S)
        healthy = time.monotonic() - began
        status = ask(port, "/v1/completions", {"model": NAME, "prompt": prompt, "max_tokens": 1})
        done = time.monotonic() - began
        if status != 200:
            sys.exit(f"the first request was answered with {status}")
        cpu = sum(map(cpu_seconds, family(pid)))
        if rest_s:
            time.sleep(rest_s)
        memory = {f"{command_of(p)} {p}": rollup(p) for p in family(pid)} if rest_s else {}
    return healthy, done, cpu, memory


def rollup(pid: int) -> dict[str, float]:
    """Megabytes by the system's names."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}


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
    for name, found in memory.items():
        parts = ", ".join(f"{key} {found[key]:.1f}" for key in ("Pss_Anon", "Pss_File", "Pss_Shmem"))
        print(f"{name:28s} PSS {found['Pss']:.1f} MB ({parts})")
    print(f"together     PSS {sum(found['Pss'] for found in memory.values()):.1f} MB")


if __name__ == "__main__":
    main()
