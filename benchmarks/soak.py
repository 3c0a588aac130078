"""A server under many adapters for a long time: every answer is compared with the same adapter's alone.

    python benchmarks/soak.py                       # ten minutes: 1,000 adapters, memory for 50, 32 clients
    python benchmarks/soak.py --seconds 60 --json soak.json --markdown soak.md --plot soak.svg
    python benchmarks/soak.py --smoke               # a few seconds
    python benchmarks/soak.py --write               # the report to benchmarks/README.md, the chart beside it

The base is a tiny random model, and each adapter answers its prompt differently; what it answers is computed before by
an ``LLM`` that serves one request at a time. Names are drawn by Zipf's law. Adapters come from a folder and from an
HTTP server of this script, some of which is slow, cuts downloads off or fails at times; some adapters are damaged.
Meanwhile adapters are replaced by other versions and unloaded, and clients leave in the middle of answers. It fails
when an answer is not that of the adapter's current version, an error is another one than expected, a request waits
longer than ``--patience``, or anything is left at the end: files, running requests, memory, a cache above its limit.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import psutil
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from chart import lines
from truffula import LLM, SamplingParams
from truffula.bench.server import Server, end_children_on_sigterm, free_port
from truffula.cli.doctor import cpu_name
from truffula.kernels.host import usable_cpus
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint

VOCAB, PROMPT, TOKENS = 512, 12, 10
RANKS = (2, 4, 8)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
RELEASED = ("truffula_sequences_running", "truffula_sequences_waiting", "truffula_kv_blocks_used")
"""What is 0 after the last request."""
OUTCOMES = ("answered", "refused", "source failed", "left", "replaced", "unloaded", "wrong")
LOADED = ("adapter_loads", "adapter_load_failures_total", "adapter_evictions_total")
HERE = Path(__file__).resolve().parent
PROCESSES = {"server": "truffula serve", "engine": "truffula.engine", "loading workers": "truffula.lora", "others": "?"}
BEGIN, END = "<!-- soak.py --write: begin -->\n", "<!-- end -->\n"
COUNTED = ("truffula_adapters_resident", "truffula_adapter_evictions_total", "truffula_adapter_load_failures_total")
KINDS = {"local": 0.6, "replaced": 0.1, "url": 0.2, "slow": 0.04, "flaky": 0.04, "damaged": 0.02}
"""Shares of the adapters. ``slow``: a second for each file; ``flaky``: downloads are cut off, or answered with 503."""


@dataclass
class Adapter:
    name: str  # as requests name it
    kind: str
    folder: Path
    prompt: list[int]
    versions: list[tuple[bytes, list[int]]] = field(default_factory=list)  # tensors, and the tokens that they answer
    current: int = 0
    changed: list[tuple[float, int]] = field(default_factory=list)  # (before which, the version)

    def allowed(self, sent: float, ended: float) -> list[list[int]]:
        """The answers of the versions that it had in a period."""
        had = {self.current} | {version for until, version in self.changed if until >= sent}
        return [self.versions[version][1] for version in had]


@dataclass
class Report:
    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    processes: list[dict[str, float]] = field(default_factory=list)  # MiB (PSS) by process, over time
    facts: dict[str, Any] = field(default_factory=dict)
    output: str = ""  # what the server logged

    @property
    def memory(self) -> list[float]:
        """MiB of all processes over time."""
        return [sum(one.values()) for one in self.processes]

    def fail(self, text: str) -> None:
        if len(self.wrong) < 50:
            self.wrong.append(text)


# What is served


def write_model(folder: Path) -> Path:
    write_tiny_checkpoint(folder, tiny_llama_config(vocab_size=VOCAB, num_hidden_layers=2, eos_token_id=1), seed=5)
    words = {f"w{number}": number for number in range(VOCAB)}
    Tokenizer(WordLevel(words, unk_token="w2")).save(str(folder / "tokenizer.json"))
    return folder


def write_adapters(root: Path, model: Path, count: int, url: str, seed: int) -> list[Adapter]:
    """The adapters, and what each answers: computed alone, one request at a time. All answers differ."""
    rng = random.Random(seed)
    kinds = [kind for kind, share in KINDS.items() for _ in range(max(1, round(share * count)))]
    rng.shuffle(kinds)
    seen: set[tuple[int, ...]] = set()
    made, params = [], SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(model, dtype="float32", memory_bytes=256 << 20, max_running=1, max_model_len=256) as llm:
        for number, kind in enumerate(kinds[:count]):
            remote = kind in ("url", "slow", "flaky") or (kind == "damaged" and number % 2)
            folder = root / ("source" if remote else "local") / f"a{number:04d}"
            name = f"{url}/{kind}/{folder.name}" if remote else folder.name
            adapter = Adapter(name, kind, folder, [rng.randrange(2, VOCAB) for _ in range(PROMPT)])
            while len(adapter.versions) < (2 if kind == "replaced" else 1):
                rank = RANKS[number % len(RANKS)]
                random_seed, named = rng.randrange(2**31), {"base_model_name_or_path": str(model)}
                write_tiny_adapter(folder, model, rank=rank, alpha=4 * rank, seed=random_seed, **named)
                (out,) = llm.generate([adapter.prompt], params, adapters=[str(folder)])
                if tuple(out.token_ids) not in seen:
                    seen.add(tuple(out.token_ids))
                    adapter.versions.append(((folder / TENSORS).read_bytes(), out.token_ids))
            adapter.current = len(adapter.versions) - 1
            if kind == "damaged":
                (folder / TENSORS).write_bytes(adapter.versions[0][0][:-7])
            made.append(adapter)
    return made


class Source:
    """An HTTP server with the adapters of a folder, under ``/KIND/NAME``; their kind is how it answers."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._rng = random.Random(seed)
        self.faults: Counter[str] = Counter()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if not await self._answer(head.decode(), writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> bool:
        method, path, _ = head.split(" ", 2)
        kind, name, file = path.strip("/").split("/")
        found = self._folder / name / file
        body = found.read_bytes() if found.is_file() else None
        await asyncio.sleep(1.0 if kind == "slow" and method == "GET" else self._rng.random() / 50)
        fault = self._rng.random() if kind == "flaky" else 1.0
        status = "503 Busy" if fault < 0.05 else "404 Absent" if body is None else "200 OK"
        mark = hashlib.sha1(body or b"").hexdigest()
        shown = body if body is not None and status.startswith("200") else b""
        lines = f'HTTP/1.1 {status}\r\nContent-Length: {len(shown)}\r\nETag: "{mark}"\r\n\r\n'
        cut = method == "GET" and 0.05 <= fault < 0.3
        self.faults["503"] += fault < 0.05
        self.faults["cut off"] += cut
        writer.write(lines.encode() + (shown[: len(shown) // 2 if cut else None] if method == "GET" else b""))
        await writer.drain()
        return not cut


# The load


class Soak:
    def __init__(self, url: str, adapters: list[Adapter], args: argparse.Namespace, report: Report) -> None:
        self._adapters = adapters
        self._weights = list(accumulate(1 / rank for rank in range(1, len(adapters) + 1)))
        self._args = args
        self._report = report
        self._http = httpx.AsyncClient(base_url=url, timeout=args.patience + 30, trust_env=False)
        self._end = time.monotonic() + args.seconds

    async def run(self, pid: int) -> None:
        clients = [self._client(random.Random(f"{self._args.seed}/{n}")) for n in range(self._args.clients)]
        async with self._http:
            await asyncio.gather(*clients, self._replace(), self._unload(), self._measure(pid))
            await asyncio.sleep(1.0)
            for line in (await self._http.get("/metrics")).text.splitlines():
                name, _, value = line.rpartition(" ")
                if name in (*RELEASED, *COUNTED):
                    self._report.facts[name.removeprefix("truffula_")] = int(float(value))
                elif name.startswith("truffula_adapter_loads_total{"):
                    self._report.facts["adapter_loads"] = self._report.facts.get("adapter_loads", 0) + int(float(value))

    def _going(self) -> bool:
        return time.monotonic() < self._end

    async def _client(self, rng: random.Random) -> None:
        while self._going():
            adapter = rng.choices(self._adapters, cum_weights=self._weights)[0]
            leaves = rng.random() < 0.1
            sent = time.monotonic()
            body: dict[str, Any] = {"model": adapter.name, "prompt": adapter.prompt, "max_tokens": TOKENS}
            body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": leaves}
            try:
                if leaves:
                    await self._leave(body, rng)
                    continue
                reply = await self._http.post("/v1/completions", json=body)
            except httpx.TransportError as error:
                self._report.fail(f"{adapter.name}: {type(error).__name__}")
                continue
            ended = time.monotonic()
            self._report.waits[adapter.kind].append(ended - sent)
            if ended - sent > self._args.patience:
                self._report.fail(f"{adapter.name}: waited {ended - sent:.1f} s")
            self._check(adapter, sent, ended, reply)

    async def _leave(self, body: dict[str, Any], rng: random.Random) -> None:
        """Leave before the answer, or in the middle of it."""
        self._report.outcomes["left"] += 1
        try:
            async with asyncio.timeout(rng.random() / 10):
                async with self._http.stream("POST", "/v1/completions", json=body) as reply:
                    async for _ in reply.aiter_lines():
                        if rng.random() < 0.3:
                            return
        except TimeoutError:
            pass  # as intended

    def _check(self, adapter: Adapter, sent: float, ended: float, reply: httpx.Response) -> None:
        found = reply.json()
        code = found.get("error", {}).get("code") if reply.status_code != 200 else None
        if adapter.kind == "damaged":
            right, outcome = code == "adapter_invalid", "refused"
        elif code is not None:  # a flaky source may fail three times in a row
            right, outcome = adapter.kind == "flaky" and code == "adapter_load_failed", "source failed"
        else:
            right, outcome = found["choices"][0]["token_ids"] in adapter.allowed(sent, ended), "answered"
        self._report.outcomes[outcome if right else "wrong"] += 1
        if not right:
            self._report.fail(f"{adapter.name} ({adapter.kind}): {reply.status_code} {reply.text[:300]}")

    async def _replace(self) -> None:
        """Replace adapters by their other version, in one step each."""
        rng = random.Random(f"{self._args.seed}/replace")
        some = [adapter for adapter in self._adapters if adapter.kind == "replaced"]
        while self._going():
            await asyncio.sleep(rng.random() / 10)
            adapter = rng.choice(some)
            other = 1 - adapter.current
            (adapter.folder / "new").write_bytes(adapter.versions[other][0])
            before, adapter.current = adapter.current, other
            (adapter.folder / "new").replace(adapter.folder / TENSORS)
            adapter.changed = [*adapter.changed[-20:], (time.monotonic(), before)]
            self._report.outcomes["replaced"] += 1

    async def _unload(self) -> None:
        rng = random.Random(f"{self._args.seed}/unload")
        local = [adapter for adapter in self._adapters if adapter.kind in ("local", "replaced")]
        while self._going():
            await asyncio.sleep(rng.random() / 5)
            name = rng.choices(local, cum_weights=self._weights[: len(local)])[0].name
            reply = await self._http.post("/v1/unload_lora_adapter", json={"lora_name": name})
            self._report.outcomes["unloaded"] += reply.status_code == 200
            if reply.status_code not in (200, 404):
                self._report.fail(f"unload {name}: {reply.status_code} {reply.text[:200]}")

    async def _measure(self, pid: int) -> None:
        while self._going():
            self._report.processes.append(await asyncio.to_thread(pss, pid))
            await asyncio.sleep(max(0.5, self._args.seconds / 60))


def pss(pid: int) -> dict[str, float]:
    """MiB of a server's processes, by what they do."""
    found = dict.fromkeys(PROCESSES, 0.0)
    process = psutil.Process(pid)
    for one in (process, *process.children(recursive=True)):
        try:
            command = " ".join(one.cmdline())
            role = next((role for role, word in PROCESSES.items() if word in command), "others")
            found[role] += one.memory_full_info().pss / 2**20
        except psutil.Error:
            continue  # it has ended
    return found


def staging_folders(pid: int) -> set[Path]:
    """Those that a server's processes hold."""
    process = psutil.Process(pid)
    held: set[Path] = set()
    for one in (process, *process.children(recursive=True)):
        for fd in Path(f"/proc/{one.pid}/fd").glob("*"):
            try:
                path = fd.readlink()
            except OSError:
                continue  # it was closed, or its process has ended
            held |= {path} if path.name.startswith("truffula-staging-") else set()
    return held


# The whole


async def soak(args: argparse.Namespace, root: Path, report: Report) -> None:
    source = Source(root / "source", args.seed)
    listening = await asyncio.start_server(source, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    model = write_model(root / "model")
    started = time.monotonic()
    adapters = await asyncio.to_thread(write_adapters, root, model, args.adapters, url, args.seed)
    report.facts["adapters"] = len(adapters)
    report.facts["preparation_s"] = round(time.monotonic() - started, 1)
    size = max(len(adapter.versions[0][0]) for adapter in adapters)
    cache = 4 * args.resident * size
    port = free_port()
    options = {
        "--port": port, "--log-level": "error", "--dtype": "float32", "--adapter-dir": root / "local",
        "--memory": "512MiB", "--adapter-memory": args.resident * size, "--max-running": 16, "--max-model-len": 256,
        "--allow-source": f"{url}/*", "--adapter-cache-dir": root / "cache", "--adapter-cache": cache,
        "--adapter-recheck": 5, "--adapter-failure-ttl": 1,
    }  # fmt: skip
    flags = [str(part) for pair in options.items() for part in pair]
    argv = [sys.executable, "-m", "truffula", "serve", str(model), "--adapter-admin", *flags]
    with Server("truffula", argv, f"http://127.0.0.1:{port}") as server:
        await asyncio.to_thread(server.wait)
        try:
            await Soak(server.url, adapters, args, report).run(server.pid)
        finally:
            report.output = ("The server has ended. " if server.ended else "") + server.output()
        folders = staging_folders(server.pid)
        report.facts["staged_files"] = sum(len(list(folder.iterdir())) for folder in folders)
    report.facts["staging_folders_left"] = sum(folder.exists() for folder in folders)
    report.facts["source_faults"] = dict(source.faults)
    entries = [path.stat().st_size for path in (root / "cache").glob("entries/*/adapter*")]
    report.facts["cache_bytes"], report.facts["cache_limit"] = sum(entries), cache
    report.facts["scratch_left"] = len(list((root / "cache").glob("scratch/*")))
    listening.close()


def judge(report: Report, args: argparse.Namespace) -> None:
    """Add what was left behind to the report's failures."""
    facts = report.facts
    for name in ("staged_files", "staging_folders_left", "scratch_left"):
        if facts[name]:
            report.fail(f"{name}: {facts[name]}")
    for name in RELEASED:
        if facts[name.removeprefix("truffula_")]:
            report.fail(f"{name} is not 0 after the last request")
    if facts["cache_bytes"] > facts["cache_limit"]:
        report.fail("the disk cache is above its limit")
    settled, last = report.memory[len(report.memory) // 4 :][:3], report.memory[-3:]
    if len(report.memory) > 12 and statistics.median(last) > 1.2 * statistics.median(settled) + 32:
        report.fail(f"memory grew from {statistics.median(settled):.0f} to {statistics.median(last):.0f} MiB")
    if not report.outcomes["answered"]:
        report.fail("nothing was answered")


def described(report: Report, args: argparse.Namespace) -> str:
    """The report in Markdown: what was done, what became of it, waits by kind of adapter, what is left."""
    got, facts, memory = report.outcomes, report.facts, report.memory
    counts = ", ".join(f"{what} {got[what]:,}" for what in OUTCOMES)
    loads = ", ".join(f"{name.removeprefix('adapter_').replace('_', ' ')} {facts[name]:,}" for name in LOADED)
    verdict = "None was wrong" if not report.wrong else f"{len(report.wrong)} faults: {'; '.join(report.wrong)}"
    load = f"{facts['adapters']:,} adapters, memory for {args.resident}, {args.clients} clients, {args.seconds:g} s"
    faults = ", ".join(f"{what} {count:,}" for what, count in facts["source_faults"].items()) or "none"
    above = (
        f"{load}, on {cpu_name()[0]}, {usable_cpus()} cores. {verdict}. Requests and changes: {counts}. Of the engine: "
        f"{loads}. Faults of the sources: {faults}."
    )
    below = (
        f"Memory (PSS of all processes, MiB): {memory[0]:.0f} at first, {max(memory):.0f} at most, {memory[-1]:.0f} at "
        f"the end. Left behind: {facts['staged_files']} staged files, {facts['scratch_left']} unfinished downloads; "
        f"the disk cache is {facts['cache_bytes'] / facts['cache_limit']:.0%} full."
    )
    return "\n".join([textwrap.fill(above, 100), "", *table(report), "", textwrap.fill(below, 100)])


def table(report: Report) -> Iterator[str]:
    yield "| adapters | requests | p50 ms | p99 ms | longest ms |\n|---|---|---|---|---|"
    for kind, waits in sorted(report.waits.items()):
        ordered = sorted(waits)
        at = [statistics.median(ordered), ordered[-(-99 * len(ordered) // 100) - 1], ordered[-1]]
        yield f"| {kind} | {len(waits):,} | {' | '.join(f'{1000 * one:.0f}' for one in at)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--resident", type=int, default=50, help="adapters that there is memory for")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--patience", type=float, default=30, help="seconds that a request may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the memory over time as SVG")
    parser.add_argument("--write", action="store_true", help="put the report and the chart into benchmarks/")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.seconds, args.adapters, args.resident, args.clients = 4, 40, 8, 8
    end_children_on_sigterm()
    report, root = Report(), Path(tempfile.mkdtemp(prefix="truffula-soak-"))
    try:
        asyncio.run(soak(args, root, report))
    finally:
        shutil.rmtree(root, ignore_errors=True)
        print(report.output, file=sys.stderr)
    judge(report, args)
    text = described(report, args)
    print(f"{text}\n\n{dict(report.outcomes)}\n{report.facts}")
    if args.markdown is not None:
        args.markdown.write_text(text + "\n")
    if args.plot is not None or args.write:
        below = f"MiB (PSS); {report.facts['adapters']:,} adapters, memory for {args.resident}, {args.clients} clients"
        series = [("all", report.memory), *((one, [each[one] for each in report.processes]) for one in PROCESSES)]
        machine = f"{cpu_name()[0]}, {usable_cpus()} cores"
        chart = lines("Memory in the soak test", below, series[:4], f"{args.seconds:g} s", machine)
        (args.plot or HERE / "soak.svg").write_text(chart)
    if args.write:
        page = (HERE / "README.md").read_text()
        before, _, rest = page.partition(BEGIN)
        shown = f"{text}\n\n![Memory over time](soak.svg)\n"
        (HERE / "README.md").write_text(f"{before}{BEGIN}{shown}{END}{rest.partition(END)[2]}")
    if args.json is not None:
        result = {
            "outcomes": report.outcomes,
            "facts": report.facts,
            "memory_mib": report.processes,
            "wrong": report.wrong,
        }
        args.json.write_text(json.dumps(result | {"waits_s": report.waits}, indent=1))
    for fault in report.wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    sys.exit(main())
