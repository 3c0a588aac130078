"""What ``--backend auto`` takes, and what is said where the native module, torch or both are missing.

A missing package is simulated in a process of its own, by a finder that knows of none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest

from truffula.errors import ConfigError
from truffula.kernels.cpu import CpuBackend, available, instruction_sets
from truffula.kernels.installation import installation
from truffula.kernels.select import fallback_warning, select_backend

NATIVE = "truffula.kernels.cpu._native"
needs_native = pytest.mark.skipif(not available(), reason="truffula was installed without its native kernels")
# Each with another set of packages that are missing ("!": there, and broken). Those without torch come first: what is
# once imported is there.
WITHOUT = (f"{NATIVE},torch", "torch", NATIVE, f"{NATIVE}!")
SCRIPT = """
import importlib.util, json, sys
missing = set()
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name + "!" in missing:
            raise ImportError("libstdc++.so.6: version not found", name=name)
sys.meta_path[:0] = [Absent(), Broken()]
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in missing else found(name, *rest)

def choose(asked, isa):
    from truffula.errors import TruffulaError
    from truffula.kernels.select import fallback_warning, select_backend
    try:
        backend = select_backend(asked, "cpu", cpu_isa=isa)
        return {"name": backend.name, "warning": fallback_warning(asked, backend)}
    except TruffulaError as error:
        return {"code": error.code, "param": error.param, "message": error.message}

answers = {}
for without in sys.argv[1:]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "truffula"]:
        del sys.modules[name]  # nobody remembers what there was before
    missing = set(without.split(","))
    for asked, isa in (("auto", "auto"), ("cpu", "auto"), ("reference", "auto"), ("auto", "portable")):
        answers[f"{without} {asked} {isa}"] = choose(asked, isa)
print(json.dumps(answers))
"""


@cache
def answers() -> dict[str, dict[str, str]]:
    """From one process, for importing torch is nearly all that it costs."""
    command = [sys.executable, "-c", SCRIPT, *WITHOUT]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


def without(missing: str, asked: str = "auto", isa: str = "auto") -> dict[str, str]:
    return answers()[f"{missing} {asked} {isa}"]


def test_without_the_native_module_auto_takes_torch_and_says_why() -> None:
    found = without(NATIVE)
    assert found["name"] == "reference"
    assert "several times slower" in found["warning"] and "C++20 compiler" in found["warning"]
    assert installation().compile_again() in found["warning"]


def test_torch_asked_for_by_name_is_no_reason_to_warn() -> None:
    assert without(NATIVE, "reference") == {"name": "reference", "warning": ""}


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_with_neither_the_error_names_both_ways_out(asked: str) -> None:
    error = without(f"{NATIVE},torch", asked)
    assert (error["code"], error["param"]) == ("missing_dependency", "backend")
    assert "C++20 compiler" in error["message"] and installation().compile_again() in error["message"]
    assert installation().pip_install("torch") in error["message"] and "CPU build" in error["message"]


def test_a_native_module_that_does_not_load_is_not_called_missing() -> None:
    found = without(f"{NATIVE}!")
    assert "cannot be loaded (libstdc++.so.6: version not found)" in found["warning"]


def test_an_instruction_set_is_never_silently_ignored() -> None:
    error = without(NATIVE, isa="portable")
    assert (error["code"], error["param"]) == ("config_invalid", "cpu_isa")
    with pytest.raises(ConfigError) as caught:
        select_backend("reference", "cpu", cpu_isa="portable")
    assert caught.value.param == "cpu_isa"


@needs_native
def test_with_the_native_module_auto_takes_it_and_needs_no_torch() -> None:
    assert without("torch") == {"name": "cpu", "warning": ""}
    assert fallback_warning("auto", select_backend()) == ""


@needs_native
def test_an_instruction_set_is_forced_or_refused_naming_what_there_is() -> None:
    for isa in instruction_sets():
        assert select_backend("cpu", cpu_isa=isa).isa == isa
    assert select_backend("cpu").isa == instruction_sets()[0]
    with pytest.raises(ConfigError, match=r"auto, .*portable") as caught:
        CpuBackend(isa="nonsense")
    assert caught.value.param == "cpu_isa"
