"""How much of a steady decode step the engine spends in Python: everything outside the native calls.

    python benchmarks/python_share.py smollm2                    # 32 rows of the base
    python benchmarks/python_share.py smollm2 --adapters FOLDER  # one adapter a row, from FOLDER's folders
    python benchmarks/python_share.py --smoke                    # a tiny random model

A turn is what the engine's process does per step: plan, fill the step's arrays, run and sample (native), commit, and
send all events as one frame. Shares are medians over turns, by the clock and by the CPU time of the engine's
thread, which a busy neighbour moves less. Native backend only.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from truffula.config import EngineConfig
from truffula.engine import wire
from truffula.engine.build import build_engine
from truffula.engine.engine import close_engine
from truffula.params import EngineParams
from truffula.testing.tiny import write_tiny_checkpoint
from truffula.types import AdapterRef, EngineRequest

PROMPT = 105


class Native:
    """The native executable, the time of all calls counted: seconds by the clock, and of this thread's CPU."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.wall = self.cpu = 0.0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)

        def timed(*given: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*given)
            finally:
                self.wall += time.perf_counter() - wall
                self.cpu += time.thread_time() - cpu

        return timed


def requests(rows: int, tokens: int, folders: list[Path]) -> list[EngineRequest]:
    refs = [AdapterRef(name=f"a{i}", locator=str(folder.resolve())) for i, folder in enumerate(folders)]
    params = EngineParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, seed=0)
    return [
        EngineRequest(
            request_id=str(i), prompt_ids=[10 + (7 * i + j) % 80 for j in range(PROMPT)], params=params,
            adapter=refs[i % len(refs)] if refs else None, arrival=time.monotonic(),
        )
        for i in range(rows)
    ]  # fmt: skip


def measure(model: str, rows: int, turns: int, folders: list[Path]) -> list[tuple[float, ...]]:
    """(wall, wall outside, CPU, CPU outside) in seconds of each turn that decodes ``rows`` rows."""
    engine, info = build_engine(EngineConfig(model=model))
    if info.backend != "cpu":
        sys.exit(f"the backend is {info.backend}; this measures the native one")
    executable = engine._runner._executable
    native = executable._native = Native(executable._native)
    ours, theirs = socket.socketpair()
    channel = wire.engine_channel(ours)
    threading.Thread(target=_drain, args=(theirs,), daemon=True).start()
    found: list[tuple[float, ...]] = []
    try:
        for request in requests(rows, PROMPT + 40 * turns, folders):
            engine.add(request)
        while len(found) < turns:
            began = (time.perf_counter(), time.thread_time(), native.wall, native.cpu)
            events = engine.step()
            if events:
                channel.send(wire.Events(events))
            ended = (time.perf_counter(), time.thread_time(), native.wall, native.cpu)
            wall, cpu, native_wall, native_cpu = (b - a for a, b in zip(began, ended, strict=True))
            if any(event.finish_reason for event in events):
                sys.exit(f"a request ended: {events[0].error or events[0].finish_reason}")
            if len(events) == rows and rows == executable.inputs.T:
                found.append((wall, wall - native_wall, cpu, cpu - native_cpu))
            elif not events:
                time.sleep(0.002)  # adapters are loading
    finally:
        close_engine(engine)
        ours.close()
    return found


def _drain(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--adapters", type=Path, help="a folder of adapter folders: one a row, in turn")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    folders = sorted(path.parent for path in given.adapters.glob("*/adapter_config.json")) if given.adapters else []
    with tempfile.TemporaryDirectory() as folder:
        if given.smoke:
            write_tiny_checkpoint(Path(folder))
            given.model, given.rows, given.turns = folder, 2, 2
        found = measure(given.model, given.rows, given.turns, folders)
    wall, outside, cpu, cpu_outside = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"{given.rows} rows, {len(folders[: given.rows])} adapters, {len(found)} turns (medians)")
    print(f"by the clock       {1e3 * wall:7.2f} ms a turn, {1e3 * outside:6.3f} outside: {outside / wall:.2%}")
    print(f"of the thread's CPU {1e3 * cpu:6.2f} ms a turn, {1e3 * cpu_outside:6.3f} outside: {cpu_outside / cpu:.2%}")


if __name__ == "__main__":
    main()
