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
    """Values at even distances, from 0 to the largest of them; ``ends`` says where the axis of x ends."""
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
        colour = "#bf3989" if not number else "#9198a1"
        step = width / max(1, len(values) - 1)
        points = " ".join(f"{LEFT + i * step:.1f},{bottom - value / most * PLOT:.1f}" for i, value in enumerate(values))
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{LEFT + number * 140}" y="{bottom + 18}" style="fill: {colour}">{escape(name)}</text>',
        ]
    parts.append(f'<text class="note name" x="{LEFT + width}" y="{bottom + 18}">{escape(ends)}</text>')
    told = (
        f"{name}: from {shown(values[0])} to {shown(values[-1])}, at most {shown(max(values))}"
        for name, values in series
    )
    return document(title, subtitle, told, parts, bottom + FOOT + 18, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="draw, and write nothing")
    args = parser.parse_args()
    chart = draw(json.loads(FIGURES.read_text(encoding="utf-8")))
    if not args.smoke:
        CHART.write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main()
