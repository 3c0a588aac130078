"""The fuzzer of what reads files: it repeats itself, and a minute of it finds nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_mutations import mutated
from fuzz_targets import TARGETS

FUZZER = Path(__file__).parent / "fuzz_readers.py"


@pytest.mark.parametrize("target", TARGETS)
def test_a_seed_gives_the_same_inputs(target: str) -> None:
    first, again = (
        [mutated(case, random.Random(f"7/{number}")).render() for number, case in enumerate(TARGETS[target][1]() * 9)]
        for _ in range(2)
    )
    assert first == again


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them")
def test_a_minute_finds_nothing() -> None:
    done = subprocess.run([sys.executable, str(FUZZER), "--seconds", "60"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
