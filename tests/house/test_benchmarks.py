"""Each benchmark runs for a moment, so that none rots; ``make bench FULL=1`` runs them for real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_benchmark_runs(script: Path, pytestconfig: pytest.Config) -> None:
    full = pytestconfig.getoption("--full")
    command = [sys.executable, str(script)] if full else [sys.executable, str(script), "--smoke"]
    done = subprocess.run(command, capture_output=not full, text=True, timeout=3600 if full else 300)
    assert done.returncode == 0, done.stderr
