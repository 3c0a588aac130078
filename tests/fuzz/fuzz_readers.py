"""Fuzzes what reads files: ``make fuzz``, or ``python tests/fuzz/fuzz_readers.py [--seconds S] [--seed N]``.

Inputs are made from valid ones by changing their structure (tests/fuzz/fuzz_mutations.py); those that reach code which
none before reached are kept and changed further. All of it follows from the seed. Inputs run in child processes with
limits of memory and time. A find is written to build/fuzz and can be run again: ``--again FOLDER`` (with ``--target``).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # a process with threads cannot be forked
sys.path.insert(0, str(Path(__file__).parent))

from fuzz_mutations import Case, mutated  # noqa: E402
from fuzz_targets import TARGETS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BATCH = 40
MORE_BYTES = 512 << 20
"""What an input of some kilobytes may take of address space: a native executable and its threads are in it."""
CPU_SECONDS, WALL_SECONDS = 10.0, 120.0
WATCHED = (
    "/truffula/weights/",
    "/truffula/lora/",
    "/truffula/model/",
    "/truffula/kernels/",
    "/truffula/text/tokenizer",
)


class Coverage:
    """Pairs of lines that followed one another, in the files that are fuzzed."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        path = frame.f_code.co_filename
        if not any(part in path for part in WATCHED):
            return None
        base, before, seen = hash_of(path + frame.f_code.co_name), 0, self.seen

        def line(inner: Any, event: str, arg: Any) -> Any:
            nonlocal before
            if event == "line":
                seen.add((base * 31 + before * 4099 + inner.f_lineno) & (2**48 - 1))
                before = inner.f_lineno
            return line

        return line


def hash_of(text: str) -> int:
    """The same in every process."""
    value = 0
    for byte in text.encode():
        value = (value * 257 + byte) & 0xFFFFFFFF
    return value


def run_one(target: str, files: dict[str, bytes], folder: Path) -> None:
    """Write the files into an empty ``folder`` and do with them what the target does. Raises what a find raises."""
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TARGETS[target][0](folder)


def limit() -> None:
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if sys.platform == "linux"
        else 4 << 30
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, used + MORE_BYTES))


def child(target: str, cases: list[dict[str, bytes]], scratch: Path, pipe: int) -> None:
    """Runs cases one after another; a line before each and one behind it."""
    limit()
    with os.fdopen(pipe, "w", buffering=1) as told:
        for number, case in enumerate(cases):
            print(json.dumps({"begin": number}), file=told, flush=True)
            folder = scratch / str(number)
            folder.mkdir()
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)  # ends the process
            coverage, fault = Coverage(), ""
            try:
                sys.settrace(coverage.trace)
                try:
                    run_one(target, case, folder)
                finally:
                    sys.settrace(None)
            except BaseException:  # noqa: BLE001  whatever it is, it is a find
                fault = traceback.format_exc()[-4000:]
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            shutil.rmtree(folder, ignore_errors=True)
            print(json.dumps({"fault": fault, "lines": sorted(coverage.seen)}), file=told, flush=True)


def batch(target: str, cases: list[Case], scratch: Path) -> list[tuple[str, set[int]]]:
    """``(fault, lines)`` of each case, in as many child processes as it takes."""
    results: list[tuple[str, set[int]]] = []
    rendered = [case.render() for case in cases]
    while len(results) < len(cases):
        left = rendered[len(results) :]
        folder = Path(tempfile.mkdtemp(dir=scratch))
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            try:
                child(target, left, folder, writing)
            finally:
                os._exit(0)
        os.close(writing)
        answers, why = _listen(reading, process)
        results += answers
        if len(answers) < len(left):
            results.append((f"the process ended: {why}", set()))
        shutil.rmtree(folder, ignore_errors=True)
    return results


def _listen(reading: int, process: int) -> tuple[list[tuple[str, set[int]]], str]:
    answers: list[tuple[str, set[int]]] = []
    why, waiting = "", b""
    while True:
        ready, _, _ = select.select([reading], [], [], WALL_SECONDS)
        some = os.read(reading, 1 << 20) if ready else b""
        if not ready:
            why = f"nothing for {WALL_SECONDS:g} seconds"
            os.kill(process, signal.SIGKILL)
        if not some:
            break
        *lines, waiting = (waiting + some).split(b"\n")
        for line in lines:
            found = json.loads(line)
            if "fault" in found:
                answers.append((found["fault"], set(found["lines"])))
    os.close(reading)
    _, status = os.waitpid(process, 0)
    return answers, why or f"exit status {os.waitstatus_to_exitcode(status)}"


def signature(fault: str) -> str:
    """What tells two finds apart: the last line of ours and the kind of exception."""
    lines = fault.strip().splitlines()
    ours = [line for line in lines if line.startswith("  File") and "/truffula/" in line]
    return (ours[-1].strip() if ours else "") + " " + lines[-1].split(":")[0]


def fuzz(target: str, seconds: float, seed: int, scratch: Path) -> tuple[int, int, dict[str, Path]]:
    """How many inputs ran, how many were kept, and where the finds are."""
    corpus = TARGETS[target][1]()
    for (fault, _), case in zip(batch(target, corpus, scratch), corpus, strict=True):
        assert not fault, f"a valid {target} is refused: {fault}\n{list(case.files)}"
    seen: set[int] = set()
    finds: dict[str, Path] = {}
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        cases = []
        for number in range(done, done + BATCH):
            rng = random.Random(f"{seed}/{target}/{number}")
            # Half the time what was kept last: it reached something new.
            parent = corpus[-1 - rng.randrange(min(16, len(corpus)))] if rng.random() < 0.5 else rng.choice(corpus)
            cases.append(mutated(parent, rng))
        for number, (case, (fault, lines)) in enumerate(zip(cases, batch(target, cases, scratch), strict=True), done):
            if fault and signature(fault) not in finds:
                finds[signature(fault)] = keep(target, seed, number, case, fault)
            elif not fault and not lines <= seen:
                corpus.append(case)
            seen |= lines
        done += BATCH
    return done, len(corpus), finds


def keep(target: str, seed: int, number: int, case: Case, fault: str) -> Path:
    folder = ROOT / "build" / "fuzz" / f"{target}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, raw in case.render().items():
        (folder / name).write_bytes(raw)
    folder.with_suffix(".txt").write_text(fault)
    print(f"FIND {target} --seed {seed}, input {number}: {folder}\n{fault}", flush=True)
    return folder


def main() -> int:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--seconds", type=float, default=60.0, help="of all targets together")
    told.add_argument("--seed", type=int, default=0)
    told.add_argument("--target", choices=list(TARGETS), help="one alone")
    told.add_argument("--again", type=Path, help="a folder of files, as a find left them")
    asked = told.parse_args()
    if asked.again is not None:
        with tempfile.TemporaryDirectory() as folder:
            run_one(asked.target, {file.name: file.read_bytes() for file in asked.again.iterdir()}, Path(folder))
        return 0
    chosen = [asked.target] if asked.target else list(TARGETS)
    faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        for target in chosen:
            done, kept, finds = fuzz(target, asked.seconds / len(chosen), asked.seed, Path(scratch))
            print(f"{target}: {done} inputs of seed {asked.seed}, {kept} kept, {len(finds)} finds", flush=True)
            faults += len(finds)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
