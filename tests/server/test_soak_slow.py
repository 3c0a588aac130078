"""A minute of ``make soak``: no answer is wrong, no request waits too long, nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_minute_of_soak(tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    sizes = ["--adapters", "300", "--resident", "20", "--patience", "60"]
    command = [sys.executable, str(SCRIPT), "--seconds", "60", "--json", str(report), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert found["wrong"] == [] and found["outcomes"]["answered"] > 100
    assert all(found["outcomes"][what] for what in ("replaced", "unloaded", "left", "refused"))
