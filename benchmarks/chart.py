"""Draw docs/throughput.svg from benchmarks/figures.json.

    python benchmarks/chart.py

The figures are those of a table in benchmarks/README.md. A test compares them, and compares the chart with the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from truffula.bench.chart import FOOT, LEFT, RIGHT, TOP, WIDTH, Bars, bars, document, shown

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures.json"
CHART = HERE.parent / "docs" / "throughput.svg"
PLOT = 240
"""The height of a chart of lines."""
DASHES = ("", "7 3", "2 2", "8 3 2 3")


def draw(data: Mapping[str, Any]) -> str:
    """The chart as SVG: a group of bars per row, one bar per contestant."""
    names = data["names"]
    ours = frozenset({names["truffula"]})
    groups = [
        Bars(row["title"], [(names[key], value) for key, value in row["figures"].items()], ours) for row in data["rows"]
    ]
    source = f"{data['machine']}; benchmarks/README.md, commit {data['commit']}"
    return bars(data["title"], data["subtitle"], groups, source)


def lines(title: str, subtitle: str, series: Sequence[tuple[str, Sequence[float]]], ends: str, source: str) -> str:
    """At most four series of values at even distances, from 0 to the largest; ``ends`` is where the x axis ends."""
    most = max(max(values) for _, values in series)
    width, bottom = WIDTH - LEFT - RIGHT, TOP + PLOT
    parts = []
    for mark in (0.0, most / 2, most):
        y = bottom - mark / most * PLOT
        parts += [
            f'<text class="name note" x="{LEFT - 8}" y="{y + 4:.1f}">{shown(mark)}</text>',
            f'<path d="M{LEFT} {y:.1f}H{LEFT + width}" stroke="#9198a1" stroke-opacity="0.3"/>',
        ]
    for number, (name, values) in enumerate(series):
        step, x, y = width / max(1, len(values) - 1), LEFT + number * 130, bottom + 18
        drawn = f'fill="none" stroke-width="2" stroke="{"#9198a1" if number else "#bf3989"}"'
        drawn += f' stroke-dasharray="{DASHES[number]}"' if DASHES[number] else ""
        points = " ".join(f"{LEFT + i * step:.1f},{bottom - value / most * PLOT:.1f}" for i, value in enumerate(values))
        parts += [
            f'<polyline points="{points}" {drawn}/>',
            f'<path d="M{x} {y - 4}h22" {drawn}/>',
            f'<text class="note" x="{x + 26}" y="{y}">{escape(name)}</text>',
        ]
    parts.append(f'<text class="note name" x="{LEFT + width}" y="{bottom + 36}">{escape(ends)}</text>')
    told = (
        f"{name}: from {shown(values[0])} to {shown(values[-1])}, at most {shown(max(values))}"
        for name, values in series
    )
    return document(title, subtitle, told, parts, bottom + FOOT + 34, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="draw, and write nothing")
    args = parser.parse_args()
    chart = draw(json.loads(FIGURES.read_text(encoding="utf-8")))
    if not args.smoke:
        CHART.write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main()
