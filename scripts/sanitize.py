"""Native kernels under sanitizers: ``python scripts/sanitize.py [pytest arguments]``; what ``make sanitize`` runs.

Builds the module with AddressSanitizer and UBSan beside a copy of the sources in build/sanitize, runs the fuzzer of the
binding and the op tests on it, then the drivers of the thread team and of whole steps under ThreadSanitizer. Ends at
the first complaint. ``--brief`` takes less of each, on the best instruction table alone: what the slow suite runs.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
TESTS = (
    "test_row_ops",
    "test_linear_adapters",
    "test_adapter_parts",
    "test_paged_attention",
    "test_logits_op",
    "test_cpu_exact",
    "test_cpu_quantised",
    "test_cpu_tables",
    "test_expert_ops",
    "test_latent_attention",
    "test_states",
    "test_gated_delta",
)
BRIEF_TESTS = tuple(name for name in TESTS if not name.startswith("test_cpu"))
# Without an editable install's own import hook, which would go past the copy.
FRONT = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__.lower()]
sys.path.insert(0, {source!r})
from truffula.kernels.cpu import _native
assert _native.__file__.startswith({source!r}), _native.__file__
"""


def search_path() -> str:
    """Where tools are looked for: beside this interpreter first, where ``make`` installs them."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def need_tools() -> None:
    """End the process, with the way out, unless there is what compiles the module."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    missing = [name for name in ("cmake", "ninja", compiler[0]) if shutil.which(name, path=search_path()) is None]
    missing += [] if importlib.util.find_spec("nanobind") else ["nanobind"]
    if missing:
        sys.exit(
            f"The native kernels are compiled here, and {', '.join(missing)} can't be found. cmake, ninja and nanobind "
            f"are there when you go through make (make test-slow, sanitize, emulate), or install them for "
            f"{sys.executable} with pip; {compiler[0]} comes from your system, CXX names another compiler."
        )


def build(where_to: Path, *chosen: str) -> Path:
    """Compile the module (and the driver) with the settings ``chosen``; the folder of sources that imports it."""
    need_tools()
    where = subprocess.run(
        [sys.executable, "-m", "nanobind", "--cmake_dir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    settings = [
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={where}", *chosen,
    ]  # fmt: skip
    env = os.environ | {"PATH": search_path()}
    subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", where_to / "cmake", *settings], check=True, env=env)
    subprocess.run(["cmake", "--build", where_to / "cmake"], check=True, env=env)
    source = where_to / "src"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for module in (where_to / "cmake").glob("_native*.so"):
        shutil.copy(module, source / "truffula" / "kernels" / "cpu")
    return source


def library(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def run_tests(source: str, chosen: list[str], env: dict[str, str], names: tuple[str, ...] = TESTS) -> None:
    """The op tests that ``chosen`` picks, on the module beside ``source``: of all ``TESTS``, on every table."""
    paths = [f"tests/kernels/{name}.py" for name in names]
    slow = ["-m", "slow or not slow"] if names == TESTS else []  # the tables between the best and the portable one
    arguments = ["-p", "no:cacheprovider", "--timeout=1200", *paths, *slow, *chosen]
    code = f"{FRONT.format(source=source)}\nimport pytest\nsys.exit(pytest.main({arguments!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=ROOT)


def best(front: str, env: dict[str, str]) -> str:
    """The instruction table that tests of one run on, as pytest's -k names it."""
    code = f"{front}\nprint(_native.table_names()[0])"
    done = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    brief = "--brief" in sys.argv[1:]
    chosen = [word for word in sys.argv[1:] if word != "--brief"]
    settings = ("-DCMAKE_BUILD_TYPE=None", "-DTRUFFULA_SANITIZE=address,undefined", "-DTRUFFULA_NATIVE_TESTS=ON")
    source = str(build(BUILD, *settings))
    front = FRONT.format(source=source)
    env = os.environ | {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        # Python itself leaves memory behind at its end, and asks for too much where a test wants that refused.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    fuzzer = ROOT / "tests" / "kernels" / "binding_fuzz.py"
    for part in ("steps", "programs", "calls"):
        told = ["fuzz", part, "150" if brief else "1000"]
        code = f"{front}\nsys.path.insert(1, {str(fuzzer.parent)!r})\nsys.argv = {told!r}\n"
        code += f"runpy.run_path({str(fuzzer)!r}, run_name='__main__')"
        subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=ROOT)
    words = best(front, env) if brief else "cpu or avx or portable"
    run_tests(source, chosen or ["-k", words], env, BRIEF_TESTS if brief else TESTS)
    subprocess.run([BUILD / "cmake" / "team_driver", "200" if brief else "1000"], check=True)
    subprocess.run([BUILD / "cmake" / "step_driver", "100" if brief else "1000"], check=True)


if __name__ == "__main__":
    main()
