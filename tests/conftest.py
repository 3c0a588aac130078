"""What all tests share: the way of the suite's options. Builders live in ``truffula.testing``."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Helper modules beside the tests (pages.py, ...) import by name from any test folder.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
for folder in sorted({path.parent for path in Path(__file__).parent.rglob("*.py")}):
    sys.path.insert(0, str(folder))

# Before any test imports triton: its kernels run under its interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

# A shell starts a run in the background with Ctrl-C ignored, which the commands under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["smoke"]  # it wants an environment without torch: make smoke


def backends() -> str:
    """Which backends this run tests: the native one on each of its instruction sets, where it was compiled."""
    from truffula.kernels.cpu import instruction_sets, why_unavailable

    why = why_unavailable()
    native = f"not cpu: {why}" if why else f"cpu ({', '.join(instruction_sets())})"
    triton = "triton (interpreted)" if importlib.util.find_spec("triton") else "not triton: it is not installed"
    return f"backends: reference, {native}, {triton}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """What is imported and collected stays: a million objects, which each garbage collection would go through."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    if "triton" in sys.modules:  # its bindings report what is not freed at the end as leaked
        gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """At the end, for ``-q`` shows no header."""
    terminalreporter.write_line(backends())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the benchmarks for real (make bench FULL=1)")
    parser.addoption("--explore", action="store_true", help="new random examples for the properties, not the same ones")


def pytest_configure(config: pytest.Config) -> None:
    # The same examples in every run, so that CI says of a commit what it said yesterday; --explore looks for new ones.
    settings.register_profile("repeat", derandomize=True, print_blob=True, deadline=None)
    settings.register_profile("explore", derandomize=False, print_blob=True, deadline=None)
    settings.load_profile("explore" if config.getoption("--explore") else "repeat")
