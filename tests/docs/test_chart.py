"""docs/throughput.svg is what benchmarks/chart.py draws, and its figures are those of benchmarks/README.md."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType
from xml.etree import ElementTree

import pytest
from pages import ROOT

BENCHMARKS = ROOT / "benchmarks"
DATA = json.loads((BENCHMARKS / "figures.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def chart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chart", BENCHMARKS / "chart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_script_draws(chart: ModuleType) -> None:
    drawn = chart.draw(DATA)
    assert chart.CHART.read_text(encoding="utf-8") == drawn, "run python benchmarks/chart.py"
    ElementTree.fromstring(drawn)


def test_the_figures_are_those_of_the_table() -> None:
    """Title, contestant and command of each bar lead to its figure in the section that the data names."""
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(DATA['section'])}\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)
    assert DATA["commit"] in section
    table: dict[str, dict[str, float]] = {}
    commands: dict[str, str] = {}
    title = ""
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and re.match(r"[\d.]+ ", cells[2]):
            title = cells[0] or title
            table.setdefault(title, {})[cells[1]] = float(cells[2].split()[0])
            commands[title] = commands.get(title) or cells[5].strip("`")
    for row in DATA["rows"]:
        assert row["figures"] == table[row["row"]]
        assert row["command"] == commands[row["row"]]
