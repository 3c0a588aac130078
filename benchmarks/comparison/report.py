"""Figures of a comparison: medians, spreads and ratios, as data and as rows of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from comparison.rounds import Result


@dataclass(frozen=True)
class Figure:
    """One contestant of a row. ``ratio`` says how many times better the row's first one is than this one: of the
    medians, and of each round; None of the first itself. ``note`` has what else was measured.
    """

    contestant: str
    version: str
    median: float
    low: float
    high: float
    ratio: float | None
    ratios: tuple[float, ...]
    note: str


def figures(result: Result) -> list[Figure]:
    """Of every contestant that took part, in the row's order."""
    made: list[Figure] = []
    first: list[float] | None = None
    for title, rounds in result.rounds.items():
        values = [turn.value for turn in rounds]
        ratio: float | None = None
        ratios: tuple[float, ...] = ()
        if title == result.row.contestants[0].title:
            first = values
        elif first is not None:
            ratio = _better(result, statistics.median(first), statistics.median(values))
            ratios = tuple(_better(result, a, b) for a, b in zip(first, values, strict=True))
        note = _note(result.row.measure, [run for turn in rounds for run in turn.runs])
        made.append(
            Figure(
                title, result.versions[title], statistics.median(values), min(values), max(values), ratio, ratios, note
            )
        )
    return made


def _better(result: Result, first: float, other: float) -> float:
    better, worse = (first, other) if result.row.more_is_better else (other, first)
    return round(better / worse, 3) if worse else float("inf")


def _note(measure: str, runs: Sequence[dict[str, Any]]) -> str:
    """One more figure that belongs beside the row's."""
    if measure == "decode":
        return f"{statistics.median(run['of_roofline'] for run in runs):.2f} of the memory's rate"
    if measure == "memory":
        beside = statistics.median(run["anonymous_beside"] for run in runs) / 1e6
        return f"anonymous alone {beside:.1f} MB"
    if measure in ("throughput", "ttft"):
        hits = max(run["prefix_hit_rate"] for run in runs)
        itl = [run["itl_ms"]["p50"] for run in runs if "p50" in run["itl_ms"]]
        ttft = [run["ttft_ms"]["p50"] for run in runs if "p50" in run["ttft_ms"]]
        parts = [f"prefix hits {hits:.1%}"]
        parts += [f"TTFT {statistics.median(ttft):.0f} ms"] if ttft and measure == "throughput" else []
        parts += [f"ITL {statistics.median(itl):.1f} ms"] if itl and measure == "throughput" else []
        return ", ".join(parts)
    return ""


def report(results: Sequence[Result], machine: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Everything, for ``--json``: every run of every round, and the figures made of them."""
    rows = []
    for result in results:
        rounds = {title: [asdict(turn) for turn in turns] for title, turns in result.rounds.items()}
        figure = [asdict(one) for one in figures(result)]
        rows.append(
            {
                "row": msgspec.to_builtins(result.row), "unit": result.row.unit, "figures": figure, "rounds": rounds,
                "absent": result.absent, "seconds": round(result.seconds, 1),
            }
        )  # fmt: skip
    return {"machine": machine, "repeats": repeats, "rows": rows}


def markdown(results: Sequence[Result], machine: dict[str, Any], repeats: int) -> str:
    """A table for ``benchmarks/README.md``: a line per contestant, the machine and versions above."""
    versions = {title: said for result in results for title, said in result.versions.items() if title != "truffula"}
    head = [
        f"{machine['cpu']} ({machine['isa']}), {machine['cores']} cores, truffula {machine['commit'] or 'unknown'}; "
        f"medians of {repeats} alternating rounds (least to most). x: how many times better truffula is, of the "
        "medians (of each round).",
        "",
        "Peers: " + ("; ".join(f"{title}: {said}" for title, said in versions.items()) or "none") + ".",
        "",
        "| what | who | figure | x | also | command |",
        "|---|---|---|---|---|---|",
    ]
    lines = []
    for result in results:
        row = result.row
        for i, one in enumerate(figures(result)):
            spread = f"{number(one.median)} ({number(one.low)}-{number(one.high)})"
            ratio = "" if one.ratio is None else f"{one.ratio:.2f} ({', '.join(f'{r:.2f}' for r in one.ratios)})"
            what = f"{row.what}, {row.unit}" if i == 0 else ""
            command = f"`python benchmarks/compare.py {row.name}`" if i == 0 else ""
            lines.append(f"| {what} | {one.contestant} | {spread} | {ratio} | {one.note} | {command} |")
        for title, why in result.absent.items():
            lines.append(f"| {row.what} | {title} | not measured | | {' '.join(why.split())[:120]} | |")
    return "\n".join([*head, *lines, ""])


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
