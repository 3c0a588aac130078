"""``truffula bench serve``."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truffula.bench.client import OpenAI, Target, closed_loop
from truffula.bench.client import open_loop as run_open_loop
from truffula.bench.load import MIXES, Load, arrivals, used
from truffula.bench.results import Limits
from truffula.bench.server import TruffulaServer, end_children_on_sigterm, plan_of, random_adapters
from truffula.cli.output import err, out, table, warn
from truffula.config import EngineConfig
from truffula.errors import ConfigError

# Token ids below this exist in every vocabulary; used when the server's model is unknown.
UNKNOWN_VOCABULARY = 1000
ZIPF = 1.0


@dataclass(frozen=True)
class ServeBench:
    """The options of ``bench serve``; None: not given. With ``rate``, an open loop with ``requests`` in all.

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
    url: str | None
    rate: float | None = None
    adapter_count: int | None = None
    zipf_exponent: float | None = None
    limits: Limits | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.adapters not in MIXES:
            raise _invalid("adapters", self.adapters, f"one of {', '.join(MIXES)}")
        for name in ("clients", "requests", "rank", "prompt_tokens", "max_tokens", "repeats", "adapter_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _invalid(name, value, "1 or more")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise _invalid("rate", self.rate, "above 0")
        if self.zipf_exponent is not None and not 0 <= self.zipf_exponent < float("inf"):
            raise _invalid("zipf_exponent", self.zipf_exponent, "0 or more")
        self._check_together()

    def _check_together(self) -> None:
        open_loop = self.rate is not None
        if open_loop and self.clients is not None:
            raise _conflict(
                "clients", "--rate", "an open loop has no clients; --requests says how many requests it sends"
            )
        if not open_loop and self.limits is not None:
            raise _conflict("ttft_limit", "a closed loop", "goodput is for --rate; leave the limits out")
        if self.zipf_exponent is not None and self.adapters != "zipf":
            raise _conflict("zipf_exponent", f"--adapters {self.adapters}", "it is for --adapters zipf")
        counted = self.adapters == "zipf" or (self.adapters == "distinct" and open_loop)
        if self.adapter_count is not None and not counted:
            why = "distinct gives each client its own" if self.adapters == "distinct" else "it fixes the number"
            raise _conflict("adapter_count", f"--adapters {self.adapters}", why)
        if self.adapter_count is None and counted:
            raise ConfigError(f"--adapters {self.adapters} needs --adapter-count here.", param="adapter_count")

    def names(self) -> list[str]:
        """Names of the adapters that the mix uses."""
        counts = {"none": 0, "shared": 1, "distinct": self.adapter_count or self.streams, "zipf": self.adapter_count}
        return [f"bench-{i:03d}" for i in range(counts[self.adapters] or 0)]

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


def _invalid(name: str, value: object, right: str) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')} is {value!r}; it must be {right}.", param=name)


def _conflict(name: str, other: str, why: str) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')} cannot be combined with {other}: {why}.", param=name)


def run_bench_serve(config: EngineConfig, bench: ServeBench, *, as_json: bool) -> None:
    end_children_on_sigterm()
    names = bench.names()
    runs = _runs(bench.url, bench, names, UNKNOWN_VOCABULARY) if bench.url else _own_server(config, bench, names)
    median, machine = _median(runs), _machine()
    if as_json:
        report = {"bench": asdict(bench), "model": config.model, "machine": machine, "runs": runs, "http": median}
        out().print_json(json.dumps(report))
        return
    _print(median, bench)
    out().print(f"[dim]{machine}[/]")


def _own_server(config: EngineConfig, bench: ServeBench, names: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="truffula-bench-") as folder:
        plan = plan_of(config)
        random_adapters(plan, Path(folder), names, bench.rank)
        with TruffulaServer(config, ["--adapter-dir", folder, "--log-level", "warning"]) as server:
            return _runs(server.wait(), bench, names, plan.interface.vocab_size)


def _runs(url: str, bench: ServeBench, names: list[str], vocab_size: int) -> list[dict[str, Any]]:
    runs = []
    target = Target(url, OpenAI())
    for repeat in range(bench.repeats + 1):  # the first is a warm-up, which loads adapters and touches pages
        err().print(f"[dim]run {repeat or 'warm-up'} ...[/]")
        load = bench.load(names, vocab_size, repeat)
        if bench.rate is None:
            measured = closed_loop(target, load)
        else:
            measured = run_open_loop(target, load, arrivals(bench.rate, load.clients, load.seed))
        if measured.errors:
            raise ConfigError(f"{len(measured.errors)} requests failed; the first error: {measured.errors[0]}")
        open_loop = bench.rate is not None
        summary = (
            measured.open_summary(bench.rate or 0.0, bench.limits or Limits()) if open_loop else measured.summary()
        )
        runs.append({**summary, "adapters": _shares(load)})
    return runs[1:]


def _shares(load: Load) -> dict[str, Any]:
    """The number of adapters that a run used, and the share of requests of the most used one."""
    counts = Counter(name for name in used(load) if name is not None)
    total = load.clients * load.requests
    return {"used": len(counts), "largest_share": round(max(counts.values(), default=0) / total, 3)}


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median rate, and the range of the rates of all runs."""
    rates = [run["output_tok_s"] for run in runs]
    median = min(runs, key=lambda run: abs(run["output_tok_s"] - statistics.median(rates)))
    return {**median, "output_tok_s_spread": [min(rates), max(rates)]}


def _machine() -> str:
    from truffula.cli.doctor import cpu_name
    from truffula.kernels.host import usable_cpus

    name, sets = cpu_name()
    return f"{name}, {usable_cpus()} cores, {sets[0] if sets else 'unknown instruction set'}"


def _print(row: dict[str, Any], bench: ServeBench) -> None:
    loop = f"{bench.streams} clients" if bench.rate is None else f"{bench.streams} requests at {bench.rate:g}/s"
    title = (
        f"{loop}, adapters {bench.adapters} (rank {bench.rank}), {bench.prompt_tokens} prompt tokens, "
        f"{bench.max_tokens} new: median of {bench.repeats}"
    )
    shown = table(
        ">output tok/s", ">spread", ">TTFT p50 ms", ">p99", ">ITL p50 ms", ">p99", ">prefix hits", title=title
    )
    low, high = row["output_tok_s_spread"]
    latencies = [f"{of[q]:.1f}" if of else "-" for of in (row["ttft_ms"], row["itl_ms"]) for q in ("p50", "p99")]
    shown.add_row(f"{row['output_tok_s']:.1f}", f"{low:.1f}-{high:.1f}", *latencies, f"{row['prefix_hit_rate']:.1%}")
    out().print(shown)
    if bench.adapters == "zipf":
        uses = row["adapters"]
        out().print(f"{uses['used']} of {bench.adapter_count} adapters used; the first {uses['largest_share']:.0%}")
    if bench.rate is not None:
        _print_open(row, bench.limits or Limits())


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
