"""The native module built in other ways, under its op tests: with sanitizers, and with AVX-512 made of AVX2.

Where the module was compiled, what compiles it is wanted here: the scripts end with the way out where it is missing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_backends import ISAS, needs_native

pytestmark = needs_native
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(SCRIPTS / name), "--brief"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=1150, env=os.environ | env)


def said(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
def test_sanitizers_find_nothing():
    """AddressSanitizer and UBSan on the module, ThreadSanitizer on the team and whole steps."""
    done = script("sanitize.py")
    assert done.returncode == 0, said(done)


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in ISAS, reason="AVX-512 is made of AVX2 instructions, and there are none")
def test_avx512_tables_are_right_where_their_instructions_are_made_of_others():
    done = script("emulate.py")
    assert done.returncode == 0, said(done)
    (tested,) = [line for line in done.stdout.splitlines() if line.startswith("backends: ")]
    assert {"avx512", "avx512vnni", "avx512bf16", "amx"} <= set(re.findall(r"\w+", tested)), said(done)


@pytest.mark.parametrize("name", ["sanitize.py", "emulate.py"])
def test_without_a_compiler_the_way_out_is_told(name):
    done = script(name, CXX="no-such-compiler -O2")
    assert done.returncode == 1
    assert "no-such-compiler" in done.stderr and "CXX names another" in done.stderr and "make" in done.stderr
