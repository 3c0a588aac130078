"""The command line as a user runs it: in a process of its own, or, where that is not what is tested, in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest

from truffula.cli import main


def truffula(*args: str, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """A process: its output and its status."""
    return subprocess.run(
        [sys.executable, "-m", "truffula", *args],
        capture_output=True, text=True, input=stdin, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def here(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """``truffula``'s entry point in this process: what starting an interpreter and its imports cost is not paid again.

    Output, error, input and environment are its own. An exception that the entry point lets through is the test's.
    """
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["truffula", *args])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        for name, value in env.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main()
            sys.exit(0)
    code = ended.value.code
    assert code is None or isinstance(code, int), code
    return subprocess.CompletedProcess(["truffula", *args], code or 0, out.getvalue(), err.getvalue())
