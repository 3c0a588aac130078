"""``truffula bench compare``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from truffula.bench.compare import Result, compare
from truffula.bench.machine import commit
from truffula.bench.peers import Place
from truffula.bench.processes import end_children_on_sigterm
from truffula.bench.report import figures, markdown, number, report
from truffula.bench.scenarios import BUILT_IN, Row, chosen, read_scenarios
from truffula.cli.output import err, out, table, warn
from truffula.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """What the command line said; files that are None are not written, or are where they usually lie."""

    scenarios: tuple[str, ...]
    scenario_file: Path | None
    repeats: int
    peers: Path | None
    bench_dir: Path | None
    json_file: Path | None
    markdown_file: Path | None


def run_bench_compare(asked: Asked) -> None:
    if asked.repeats < 1:
        raise ConfigError(f"--repeats is {asked.repeats}; it must be 1 or more.", param="repeats")
    for file in (asked.json_file, asked.markdown_file):  # known now, not after an hour
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file} can't be written: {file.parent} is not a folder.", param="json")
    end_children_on_sigterm()
    rows = chosen(read_scenarios(asked.scenario_file or BUILT_IN), asked.scenarios)
    files = asked.bench_dir or Path(tempfile.gettempdir()) / "bench"
    place = Place(asked.peers or _checkout(), files.absolute())
    machine = _machine()
    results: list[Result] = []
    for row in rows:
        result = compare(row, place, asked.repeats, lambda text: err().print(f"[dim]{escape(text)}[/]"))
        results.append(result)
        _print(result)
        # Written after each row: whoever stops an evening's measurement keeps what it had.
        if asked.json_file is not None:
            asked.json_file.write_text(json.dumps(report(results, machine, asked.repeats), indent=1) + "\n")
        if asked.markdown_file is not None:
            asked.markdown_file.write_text(markdown(results, machine, asked.repeats))
    out().print(f"[dim]{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, commit {machine['commit']}[/]")
    absent = sum(len(result.absent) for result in results)
    if absent:
        raise ConfigError(f"{absent} contestants were not measured; the reasons are listed above.", param="peers")


def list_scenarios(scenario_file: Path | None) -> None:
    shown = table("scenario", "row", "what", "contestants")
    for row in read_scenarios(scenario_file or BUILT_IN):
        shown.add_row(row.scenario or row.name, row.name, row.what, ", ".join(c.title for c in row.contestants))
    out().print(shown)


def _checkout() -> Path:
    """The scripts of the checkout that this package is run from."""
    return Path(__file__).resolve().parents[3] / "benchmarks" / "peers"


def _machine() -> dict[str, Any]:
    from truffula.cli.doctor import cpu_name
    from truffula.kernels.host import usable_cpus

    name, sets = cpu_name()
    return {"cpu": name, "isa": sets[0] if sets else "unknown", "cores": usable_cpus(), "commit": commit()}


def _print(result: Result) -> None:
    row: Row = result.row
    shown = table("", f">{row.unit}", ">spread", ">x", ">x of each round", "also", title=f"{row.name}: {row.what}")
    for one in figures(result):
        ratio = "" if one.ratio is None else f"[bold]{one.ratio:.2f}[/]"
        shown.add_row(
            escape(one.contestant), number(one.median), f"{number(one.low)}-{number(one.high)}", ratio,
            _ratios(one.ratios), one.note,
        )  # fmt: skip
    out().print(shown)
    for why in result.absent.values():
        warn(f"not measured: {why}")


def _ratios(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
