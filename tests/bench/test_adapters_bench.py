"""``truffula bench adapters``: a row meets its goal or not, and the command prints, writes and draws all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from truffula.bench.adapters import SCENARIOS, Row
from truffula.bench.chart import Bars, bars
from truffula.testing.tiny import write_tiny_checkpoint


def command(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "truffula", "bench", "adapters", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=280)


def test_a_row_and_its_goal() -> None:
    ratio = Row("mixed", 0.9, "x", 0.9, False, "9 of 10 tokens/s")
    late = Row("joins", 20.5, "ms", 20, True, "median")
    assert ratio.met and not late.met
    assert ratio.shown == ("mixed", "0.90", "at least 0.9", "9 of 10 tokens/s")
    assert late.shown[1:3] == ("20.5 ms", "at most 20 ms")


def test_a_chart_marks_the_goal_and_tells_what_it_shows() -> None:
    drawn = bars("Title", "Below", [Bars("a < b", [("one", 1.5), ("two", 3.0)], frozenset({"one"}), 2.0)], "here")
    root = ElementTree.fromstring(drawn)
    space = {"s": "http://www.w3.org/2000/svg"}
    assert root.findtext("s:desc", namespaces=space) == "a < b: one 1.50, two 3.00"
    assert [one.get("class") for one in root.findall("s:rect", space)] == ["ours", "theirs"]
    widths = [float(one.get("width", "")) for one in root.findall("s:rect", space)]
    (path,) = root.findall("s:path", space)
    assert widths[1] == 2 * widths[0] and path.get("d", "").startswith(f"M{150 + widths[1] * 2 / 3:.1f} ")


def test_an_unknown_scenario_is_an_error(tmp_path: Path) -> None:
    done = command(str(tmp_path), "joins")
    assert done.returncode == 1 and "'joins' is not one of join, gaps" in done.stderr.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", [list(SCENARIOS)[:4], list(SCENARIOS)[4:]], ids=["first", "second"])
def test_every_scenario_runs(tmp_path: Path, names: list[str]) -> None:
    model, table, charts = write_tiny_checkpoint(tmp_path / "model"), tmp_path / "table.md", tmp_path / "charts"
    done = command(str(model), *names, "--tiny", "--json", "--markdown", str(table), "--plot", str(charts))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert {row["scenario"] for row in rows} == set(names) and all(row["value"] > 0 for row in rows)
    assert len(table.read_text().splitlines()) == len(rows) + 2
    assert sorted(path.stem for path in charts.iterdir()) == sorted(names)
    for path in charts.iterdir():
        ElementTree.fromstring(path.read_text())
