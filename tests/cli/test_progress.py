"""Progress of a start: lines where there is no terminal, bars where there is one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from truffula.cli.output import progress

STAGES = """
from truffula.cli.output import progress
with progress() as report:
    report("wait for another process", 10 * 2**20, 90 * 2**20)
    report("download tiny", 0, 97_517_568)
    report("download tiny", 50_000_000, 97_517_568)
    report("download tiny", 97_517_568, 97_517_568)
    report("plan", 0, None)
    report("load", 2**20, 2**21)
"""


def test_lines_say_the_size_first_and_the_time_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as report:
        report("download tiny", 0, 97_517_568)
        report("download tiny", 50_000_000, 97_517_568)
        report("download tiny", 97_517_568, 97_517_568)
        report("download tiny", 97_517_568, 97_517_568)
        report("plan", 0, None)
        report("load", 2**20, 2**20)
    shown = capsys.readouterr()
    assert shown.out == ""
    told = re.sub(r"in \d+\.\d s", "in N s", shown.err).splitlines()
    assert told == [
        "download tiny (93 MiB) ...",
        "download tiny: 93 MiB in N s",
        "plan ...",
        "load (1 MiB) ...",
        "load: 1 MiB in N s",
    ]


def on_a_terminal(code: str) -> str:
    """What the code writes to stderr, as the lines of the last picture before the bars vanish."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=env) as child:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # Linux's end of a terminal whose other side is closed
            pass
        assert child.wait() == 0
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_bars_of_a_terminal() -> None:
    """What was done is complete, what was left is gone, and what has no size has no bar."""
    shown = on_a_terminal(STAGES).splitlines()
    last = {line.split("  ")[0].split(" ━")[0].strip(): line for line in shown if line.strip()}
    assert "93.0/93.0 MiB" in last["download tiny"]
    picture = shown[-6:]
    assert not any("wait for another process" in line for line in picture)
    assert any("1.0/2.0 MiB" in line for line in picture)
    assert not any("━" in line or "?" in line for line in shown if line.strip().startswith("plan"))
