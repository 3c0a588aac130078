"""``truffula bench``: ``serve``, ``adapters`` and ``step``."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from truffula.bench.adapters import SCENARIOS, TINY, Bench, Row, Sizes
from truffula.bench.chart import Bars, bars
from truffula.bench.load import MIXES, Limits, Load, arrivals, run_load, used
from truffula.bench.server import end_children_on_sigterm, plan_of, random_adapters, truffula_server
from truffula.bench.step import SMOLLM2, StepBench, measure, read_rate
from truffula.cli.doctor import cpu_name
from truffula.cli.output import note, out, table, warn
from truffula.config import EngineConfig
from truffula.environment import prepare_compute
from truffula.errors import ConfigError
from truffula.kernels.host import usable_cpus
from truffula.kernels.select import Precision, choose_dtype, select_backend
from truffula.settings import load_settings
from truffula.testing.programs import decoder_program
from truffula.testing.tiny import tiny_config

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
        open_loop, mix = self.rate is not None, f"--adapters {self.adapters}"
        if self.adapters not in MIXES:
            raise _invalid("adapters", self.adapters, f"one of {', '.join(MIXES)}")
        for name in ("clients", "requests", "rank", "prompt_tokens", "max_tokens", "repeats", "adapter_count"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise _invalid(name, count, "1 or more")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise _invalid("rate", self.rate, "above 0")
        if self.zipf_exponent is not None and not 0 <= self.zipf_exponent < float("inf"):
            raise _invalid("zipf_exponent", self.zipf_exponent, "0 or more")
        counted = self.adapters == "zipf" or (self.adapters == "distinct" and open_loop)
        conflicts = (
            ("clients", self.clients, open_loop, "--rate", "--requests says how many requests an open loop sends"),
            ("ttft_limit", self.limits, not open_loop, "a closed loop", "goodput is for --rate; leave the limits out"),
            ("zipf_exponent", self.zipf_exponent, self.adapters != "zipf", mix, "it is for --adapters zipf"),
            ("adapter_count", self.adapter_count, not counted, mix, "it is for zipf, and with --rate for distinct"),
        )
        for name, value, conflict, other, why in conflicts:
            if conflict and value is not None:
                raise ConfigError(f"--{name.replace('_', '-')} cannot be combined with {other}: {why}.", param=name)
        if self.adapter_count is None and counted:
            raise ConfigError(f"{mix} needs --adapter-count here.", param="adapter_count")

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
        tokens = (self.prompt_tokens, self.max_tokens)
        return Load(self.streams, each, *tokens, tuple(names), vocab_size, self.seed + seed, exponent)


def _invalid(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"--{name.replace('_', '-')} is {value!r}; it must be {expected}.", param=name)


def run_bench_serve(config: EngineConfig, bench: ServeBench, *, as_json: bool) -> None:
    end_children_on_sigterm()
    names = bench.names()
    runs = _runs(bench.url, bench, names, UNKNOWN_VOCABULARY) if bench.url else _own_server(config, bench, names)
    median, machine = _median(runs), _machine()
    if as_json:
        report = {"bench": asdict(bench), "model": config.model, "machine": machine, "runs": runs, "http": median}
        out().print_json(data=report)
        return
    _print(median, bench)
    out().print(machine, style="dim")


def _own_server(config: EngineConfig, bench: ServeBench, names: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="truffula-bench-") as folder:
        plan = plan_of(config)
        random_adapters(plan, Path(folder), names, bench.rank)
        with truffula_server(config, folder) as server:
            return _runs(server.wait(), bench, names, plan.interface.vocab_size)


def _runs(url: str, bench: ServeBench, names: list[str], vocab_size: int) -> list[dict[str, Any]]:
    runs = []
    for repeat in range(bench.repeats + 1):  # the first is a warm-up, which loads adapters and touches pages
        note(f"run {repeat or 'warm-up'} ...")
        load = bench.load(names, vocab_size, repeat)
        at = None if bench.rate is None else arrivals(bench.rate, load.clients, load.seed)
        measured = run_load(url, load, at=at)
        if measured.errors:
            raise ConfigError(f"{len(measured.errors)} requests failed; the first error: {measured.errors[0]}")
        if bench.rate is None:
            summary = measured.summary()
        else:
            summary = measured.open_summary(bench.rate, bench.limits or Limits())
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


def run_bench_adapters(
    config: EngineConfig,
    names: Sequence[str],
    repeats: int,
    files: Sequence[str],
    written: tuple[Path | None, Path | None],
    *,
    tiny: bool,
    as_json: bool,
) -> None:
    """``written``: the file of the table and the folder of the charts."""
    if unknown := sorted(set(names) - SCENARIOS.keys()):
        raise ConfigError(f"The scenario {unknown[0]!r} is not one of {', '.join(SCENARIOS)}.", param="scenario")
    end_children_on_sigterm()
    logging.getLogger("truffula").setLevel(logging.ERROR)  # of each adapter: that it is for another base
    found: dict[str, list[Row]] = {}
    for name in names or SCENARIOS:
        note(f"{name} ...")
        with tempfile.TemporaryDirectory(prefix="truffula-bench-") as folder:
            bench = Bench(config, Path(folder), TINY if tiny else Sizes(repeats), files)
            found[name] = list(SCENARIOS[name](bench))
    rows, (markdown, plot), source = [row for each in found.values() for row in each], written, _machine()
    if markdown is not None:
        cells = [(*row.shown[:-1], row.sides + ("" if row.met else "; **missed**")) for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in (("what", "figure", "goal", "measured"), ("---",) * 4, *cells)]
        markdown.write_text("\n".join(lines) + "\n")
    if plot is not None:
        plot.mkdir(parents=True, exist_ok=True)
        for name, each in found.items():
            groups = [_bars_of(row) for row in each]
            title, below = f"Adapters: {name}", f"{config.model}; each figure to its goal (dashed); grey: missed"
            (plot / f"{name}.svg").write_text(bars(title, below, groups, source))
    if as_json:
        shown = [asdict(row) | {"scenario": name, "met": row.met} for name, each in found.items() for row in each]
        out().print_json(data={"model": config.model, "machine": source, "rows": shown})
        return
    printed = table("", ">figure", ">goal", "measured", title=f"{config.model}: median of {1 if tiny else repeats}")
    for row in rows:
        printed.add_row(*row.shown, style=None if row.met else "yellow")
    out().print(printed)
    out().print(source, style="dim")


def _bars_of(row: Row) -> Bars:
    what, figure, goal, _ = row.shown
    return Bars(f"{what} ({goal})", [(figure, row.value / row.goal)], frozenset({figure} if row.met else ()), 1.0)


def run_bench_step(bench: StepBench, options: dict[str, Any], *, tiny: bool, as_json: bool) -> None:
    prepare_compute()
    given = {setting.option.name: setting.value for setting in load_settings(options)}
    threads, quantize = given["threads"] or usable_cpus(), given["quantize"]
    isa, precision = given["cpu_isa"], Precision(quantize)
    chosen = select_backend(given["backend"], "cpu", threads=threads, cpu_isa=isa, precision=precision)
    served = choose_dtype(chosen, given["dtype"], "bfloat16").dtype
    program = decoder_program(tiny_config() if tiny else SMOLLM2)
    rate = read_rate(threads, 1 << 22 if tiny else 1 << 28)
    lines = measure(chosen, program, served, bench, rate)
    report = {
        "cpu": cpu_name()[0],
        "backend": chosen.name,
        "isa": chosen.isa,
        "dtype": served,
        "quantize": quantize,
        "adapter_dtype": bench.adapter_dtype,
        "threads": threads,
        "read_gb_per_s": round(rate / 1e9, 1),
        "lines": [asdict(line) for line in lines],
    }
    if as_json:
        out().print_json(data=report)
        return
    title = (
        f"{report['cpu']}, {report['threads']} threads, {chosen.name}/{report['isa']}, "
        f"{served if quantize == 'none' else quantize}, adapters {bench.adapter_dtype}; "
        f"memory reads {report['read_gb_per_s']} GB/s"
    )
    shown = table(
        "", ">rows", "adapters", ">ms", ">best", ">tok/s", ">of base", ">of roofline", "ms by op", title=title
    )
    for line in lines:
        by_op = ", ".join(f"{name} {ms:.1f}" for name, ms in line.ops.items() if ms >= 0.05)
        shares = ("" if share is None else f"{share:.2f}" for share in (line.tax, line.roofline))
        times = (f"{line.ms:.1f}", f"{line.best_ms:.1f}", f"{line.tokens_per_s:.0f}")
        shown.add_row(line.what, str(line.rows), line.adapters, *times, *shares, by_op)
    out().print(shown)
