"""Draw docs/throughput.svg from benchmarks/figures.json.

    python benchmarks/chart.py

The figures are those of a table in benchmarks/README.md. A test compares them, and compares the chart with the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures.json"
CHART = HERE.parent / "docs" / "throughput.svg"

WIDTH, LEFT, RIGHT = 760, 150, 60  # pixels: all of it, the names of the bars, the values behind them
TOP, BAR, GAP, TITLE, FOOT = 66, 20, 14, 24, 30
STYLE = """\
  text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-size: 17px; font-weight: 600; }
  .group { font-weight: 600; }
  .note { font-size: 12px; fill: #59636e; }
  .name { text-anchor: end; }
  .ours { fill: #bf3989; }
  .theirs { fill: #9198a1; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .note { fill: #9198a1; }
    .ours { fill: #f778ba; }
    .theirs { fill: #656c76; }
  }"""


def draw(data: Mapping[str, Any]) -> str:
    """The chart as SVG: a group of bars per row, one bar per contestant, all on one scale."""
    rows = data["rows"]
    scale = (WIDTH - LEFT - RIGHT) / max(value for row in rows for value in row["figures"].values())
    parts, y = [], TOP
    for row in rows:
        parts.append(f'<text class="group" x="{LEFT}" y="{y + 14}">{escape(row["title"])}</text>')
        y += TITLE
        for key, value in row["figures"].items():
            width = f"{value * scale:.1f}".rstrip("0").rstrip(".")
            middle = y + BAR / 2 + 4.5
            kind = "ours" if key == "truffula" else "theirs"
            parts += [
                f'<text class="name" x="{LEFT - 8}" y="{middle}">{escape(data["names"][key])}</text>',
                f'<rect class="{kind}" x="{LEFT}" y="{y + 2}" width="{width}" height="{BAR - 4}" rx="2"/>',
                f'<text x="{LEFT + float(width) + 6:.1f}" y="{middle}">{shown(value)}</text>',
            ]
            y += BAR
        y += GAP
    height = y + FOOT - GAP
    source = f"{data['machine']}; benchmarks/README.md, commit {data['commit']}"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'role="img">',
        f"<title>{escape(data['title'])}</title>",
        f"<desc>{escape(described(data))}</desc>",
        f"<style>\n{STYLE}\n</style>",
        f'<text class="title" x="8" y="26">{escape(data["title"])}</text>',
        f'<text class="note" x="8" y="48">{escape(data["subtitle"])}</text>',
    ]
    foot = [f'<text class="note" x="8" y="{height - 10}">{escape(source)}</text>', "</svg>"]
    return "\n".join([*head, *parts, *foot]) + "\n"


def shown(value: float) -> str:
    """Three digits, as in the tables."""
    return f"{value:#.3g}".rstrip(".")


def described(data: Mapping[str, Any]) -> str:
    """The chart in words, for readers who do not see it."""
    return "; ".join(
        f"{row['title']}: " + ", ".join(f"{data['names'][key]} {shown(value)}" for key, value in row["figures"].items())
        for row in data["rows"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="draw, and write nothing")
    args = parser.parse_args()
    chart = draw(json.loads(FIGURES.read_text(encoding="utf-8")))
    if not args.smoke:
        CHART.write_text(chart, encoding="utf-8")
        print(CHART)


if __name__ == "__main__":
    main()
