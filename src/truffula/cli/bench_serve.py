"""``truffula bench serve``."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truffula.bench.client import Target, closed_loop, open_loop
from truffula.bench.dialects import OpenAI
from truffula.bench.load import MIXES, Load, arrivals, used
from truffula.bench.measured import Limits
from truffula.bench.processes import child_error, end_children_on_sigterm
from truffula.bench.server import OwnServer, config_fields, planned, random_adapters
from truffula.cli.output import err, out, table, warn
from truffula.config import EngineConfig
from truffula.errors import ConfigError

# Ids below this exist in the vocabulary of any server whose model we don't know.
UNKNOWN_VOCABULARY = 1000
ZIPF = 1.0


@dataclass(frozen=True)
class ServeBench:
    """What was asked for; None stands for not given. ``rate`` makes it an open loop of ``requests`` in all.

    Raises:
        ConfigError: A value is out of its range, or two options contradict each other.
    """

    clients: int | None
    requests: int | None
    adapters: str
    rank: int
    prompt_tokens: int
    max_tokens: int
    repeats: int
    against_llm: bool
    url: str | None
    rate: float | None = None
    adapter_count: int | None = None
    zipf_exponent: float | None = None
    limits: Limits | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.adapters not in MIXES:
            raise _wrong("adapters", self.adapters, f"one of {', '.join(MIXES)}")
        for name in ("clients", "requests", "rank", "prompt_tokens", "max_tokens", "repeats", "adapter_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _wrong(name, value, "1 or more")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise _wrong("rate", self.rate, "above 0")
        if self.zipf_exponent is not None and not 0 <= self.zipf_exponent < float("inf"):
            raise _wrong("zipf_exponent", self.zipf_exponent, "0 or more")
        self._check_together()

    def _check_together(self) -> None:
        opened = self.rate is not None
        if opened and self.clients is not None:
            raise _apart("clients", "--rate", "an open loop has no clients; --requests says how many requests it sends")
        if opened and self.against_llm:
            raise _apart("against_llm", "--rate", "LLM.generate receives all prompts at the same time")
        if not opened and self.limits is not None:
            raise _apart("ttft_limit", "a closed loop", "goodput is for --rate; leave the limits out")
        if self.zipf_exponent is not None and self.adapters != "zipf":
            raise _apart("zipf_exponent", f"--adapters {self.adapters}", "it is for --adapters zipf")
        counted = self.adapters == "zipf" or (self.adapters == "distinct" and opened)
        if self.adapter_count is not None and not counted:
            why = "distinct gives each client its own" if self.adapters == "distinct" else "it fixes the number"
            raise _apart("adapter_count", f"--adapters {self.adapters}", why)
        if self.adapter_count is None and counted:
            raise ConfigError(f"--adapters {self.adapters} needs --adapter-count here.", param="adapter_count")

    def names(self) -> list[str]:
        """Names of the adapters the mix needs."""
        of_mix = {"none": 0, "shared": 1, "distinct": self.adapter_count or self.streams, "zipf": self.adapter_count}
        return [f"bench-{i:03d}" for i in range(of_mix[self.adapters] or 0)]

    @property
    def streams(self) -> int:
        """Clients of a closed loop, requests of an open one."""
        return self.requests or 32 if self.rate is not None else self.clients or 8

    def load(self, names: list[str], vocab_size: int, seed: int) -> Load:
        each = 1 if self.rate is not None else self.requests or 1
        exponent = None if self.adapters != "zipf" else ZIPF if self.zipf_exponent is None else self.zipf_exponent
        return Load(
            self.streams,
            each,
            self.prompt_tokens,
            self.max_tokens,
            tuple(names),
            vocab_size,
            self.seed + seed,
            exponent,
        )


def _wrong(name: str, value: object, right: str) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')} is {value!r}; it must be {right}.", param=name)


def _apart(name: str, other: str, why: str) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')} cannot be combined with {other}: {why}.", param=name)


def run_bench_serve(config: EngineConfig, bench: ServeBench, *, as_json: bool) -> None:
    end_children_on_sigterm()
    names = bench.names()
    if bench.url:
        results = {"http": _http_runs(bench.url, bench, names, UNKNOWN_VOCABULARY)}
    else:
        results = _own_server(config, bench, names)
    report = {"bench": asdict(bench), "model": config.model, "machine": _machine(), **_medians(results)}
    if as_json:
        out().print_json(json.dumps(report))
        return
    _print(report, bench)


def _own_server(config: EngineConfig, bench: ServeBench, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory(prefix="truffula-bench-") as folder:
        plan = planned(config)
        made = random_adapters(plan, Path(folder), names, bench.rank)
        vocabulary = plan.program.vocab_size
        results: dict[str, list[dict[str, Any]]] = {"http": []}
        with OwnServer(config, ["--adapter-dir", folder, "--log-level", "warning"]) as server:
            url = server.wait()
            results["http"] = _http_runs(url, bench, names, vocabulary)
        if bench.against_llm:
            results["llm"] = _llm_runs(config, bench, {name: str(path) for name, path in made.items()}, vocabulary)
        return results


def _http_runs(url: str, bench: ServeBench, names: list[str], vocab_size: int) -> list[dict[str, Any]]:
    runs = []
    target = Target(url, OpenAI())
    for repeat in range(bench.repeats + 1):  # the first warms up: adapters are loaded, pages touched
        err().print(f"[dim]http run {repeat or 'warm-up'} ...[/]")
        load = bench.load(names, vocab_size, repeat)
        if bench.rate is None:
            measured = asyncio.run(closed_loop(target, load))
        else:
            measured = asyncio.run(open_loop(target, load, arrivals(bench.rate, load.clients, load.seed)))
        if measured.failures:
            raise ConfigError(f"{len(measured.failures)} requests failed; the first error: {measured.failures[0]}")
        opened = bench.rate is not None
        said = measured.open_summary(bench.rate or 0.0, bench.limits or Limits()) if opened else measured.summary()
        runs.append({**said, "adapters": _shares(load)})
    return runs[1:]


def _shares(load: Load) -> dict[str, Any]:
    """How many adapters a run used, and the share of its requests that the most used one had."""
    counts = Counter(name for name in used(load) if name is not None)
    total = load.clients * load.requests
    return {"used": len(counts), "largest_share": round(max(counts.values(), default=0) / total, 3)}


def _llm_runs(
    config: EngineConfig, bench: ServeBench, adapters: dict[str, str], vocab_size: int
) -> list[dict[str, Any]]:
    """The same load through ``LLM.generate``, in a process of its own so that both have the machine alone."""
    err().print("[dim]the same through LLM.generate ...[/]")
    names = sorted(adapters)
    job = {
        "config": config_fields(config),
        "adapters": adapters,
        "loads": [asdict(bench.load(names, vocab_size, repeat)) for repeat in range(bench.repeats + 1)],
    }
    child = subprocess.run(
        [sys.executable, "-m", "truffula.bench.offline"], input=json.dumps(job), capture_output=True, text=True
    )
    if child.returncode:
        raise child_error("LLM.generate failed in the benchmark", child.stderr)
    runs: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return runs[1:]


def _medians(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    report: dict[str, Any] = {"runs": results}
    for way, runs in results.items():
        report[way] = {**min(runs, key=lambda run: abs(run["output_tok_s"] - _median(runs)))}
        report[way]["output_tok_s_spread"] = [
            min(r["output_tok_s"] for r in runs),
            max(r["output_tok_s"] for r in runs),
        ]
    if "llm" in report:
        report["http_over_llm"] = round(report["http"]["output_tok_s"] / report["llm"]["output_tok_s"], 3)
    return report


def _median(runs: list[dict[str, Any]]) -> float:
    return float(statistics.median(run["output_tok_s"] for run in runs))


def _machine() -> str:
    from truffula.cli.doctor import cpu_name
    from truffula.kernels.host import usable_cpus

    name, sets = cpu_name()
    return f"{name}, {usable_cpus()} cores, {sets[0] if sets else 'unknown instruction set'}"


def _print(report: dict[str, Any], bench: ServeBench) -> None:
    loop = f"{bench.streams} clients" if bench.rate is None else f"{bench.streams} requests at {bench.rate:g}/s"
    title = (
        f"{loop}, adapters {bench.adapters} (rank {bench.rank}), {bench.prompt_tokens} prompt tokens, "
        f"{bench.max_tokens} new: median of {bench.repeats}"
    )
    shown = table(
        "", ">output tok/s", ">spread", ">TTFT p50 ms", ">p99", ">ITL p50 ms", ">p99", ">prefix hits", title=title
    )
    for way in ("http", "llm"):
        if way in report:
            row = report[way]
            low, high = row["output_tok_s_spread"]
            ttft, itl = row["ttft_ms"], row["itl_ms"]
            shown.add_row(
                {"http": "HTTP", "llm": "LLM.generate"}[way], f"{row['output_tok_s']:.1f}", f"{low:.1f}-{high:.1f}",
                *(f"{d[q]:.1f}" if d else "-" for d in (ttft, itl) for q in ("p50", "p99")),
                f"{row['prefix_hit_rate']:.1%}",
            )  # fmt: skip
    out().print(shown)
    row = report["http"]
    if bench.adapters == "zipf":
        uses = row["adapters"]
        out().print(f"{uses['used']} of {bench.adapter_count} adapters used; the first {uses['largest_share']:.0%}")
    if bench.rate is not None:
        _print_open(row, bench.limits or Limits())
    if "http_over_llm" in report:
        out().print(f"HTTP / LLM.generate: [bold]{report['http_over_llm']:.3f}[/]")
    out().print(f"[dim]{report['machine']}[/]")


def _print_open(row: dict[str, Any], limits: Limits) -> None:
    out().print(
        f"goodput {row['goodput_rps']:.2f} requests/s of {row['rate']:g}: {row['good_requests']} of {row['requests']} "
        f"within {limits.ttft_ms:g} ms to the first token (from when it was due), {limits.itl_ms:g} ms between tokens"
    )
    late = row["sent_late_ms"]
    if row["kept_up"]:
        out().print(f"the load generator kept up: requests left {late['p99']:.1f} ms late (p99)")
    else:
        warn(f"the load generator did not keep up: requests left {late['p99']:.1f} ms late (p99); the rate was lower")
