"""Draw docs/throughput.svg from benchmarks/figures.json.

    python benchmarks/chart.py

The figures are those of a table in benchmarks/README.md. A test compares them, and compares the chart with the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truffula.bench.chart import Bars, bars

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures.json"
CHART = HERE.parent / "docs" / "throughput.svg"


def draw(data: Mapping[str, Any]) -> str:
    """The chart as SVG: a group of bars per row, one bar per contestant."""
    names = data["names"]
    ours = frozenset({names["truffula"]})
    groups = [
        Bars(row["title"], [(names[key], value) for key, value in row["figures"].items()], ours) for row in data["rows"]
    ]
    source = f"{data['machine']}; benchmarks/README.md, commit {data['commit']}"
    return bars(data["title"], data["subtitle"], groups, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="draw, and write nothing")
    args = parser.parse_args()
    chart = draw(json.loads(FIGURES.read_text(encoding="utf-8")))
    if not args.smoke:
        CHART.write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    main()
