"""The peers' scripts, without the peers: they can be read, teach their use, and say what is not there."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from comparison.processes import LineChild
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.tiny import write_tiny_checkpoint

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
SCRIPTS = sorted(path for path in PEERS.glob("*.sh") if path.name != "common.sh")


def run(script: Path, *words: str, bench_dir: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "BENCH_DIR": str(bench_dir)}
    return subprocess.run(["bash", str(script), *words], capture_output=True, text=True, timeout=60, env=env)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_teaches_its_use(script: Path, tmp_path: Path) -> None:
    done = run(script, bench_dir=tmp_path)
    assert done.returncode == 2 and f"{script.name} setup" in done.stderr
    assert "#" not in done.stderr.replace("# ", "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_knows_that_nothing_is_installed(script: Path, tmp_path: Path) -> None:
    assert run(script, "check", bench_dir=tmp_path).returncode == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", sorted(PEERS.glob("*.py")), ids=lambda p: p.name)
def test_a_helper_compiles(script: Path, tmp_path: Path) -> None:
    py_compile.compile(str(script), cfile=str(tmp_path / "made.pyc"), doraise=True)


def test_llama_server_gets_one_argument_a_line(tmp_path: Path) -> None:
    command = ("serve-command", "8123", "/a model.gguf", "2", "8", "4096", "-lv", "4")
    lines = run(PEERS / "llamacpp.sh", *command, bench_dir=tmp_path).stdout.splitlines()
    assert lines[1:3] == ["-m", "/a model.gguf"] and lines[-2:] == ["-lv", "4"]
    lora = lines[lines.index("--lora") + 1].split(",")
    assert [Path(name).name for name in lora] == ["a000.gguf", "a001.gguf"]


@pytest.mark.slow
def test_peft_answers_a_mixed_batch(tmp_path: Path) -> None:
    """What the child needs is in the tests' own environment: transformers and peft."""
    model = write_tiny_checkpoint(tmp_path / "model")
    folders = [write_tiny_adapter(tmp_path / f"a00{i}", model, rank=2, alpha=4, seed=i) for i in range(2)]
    argv = [sys.executable, str(PEERS / "hf_peft_child.py"), str(model), "bfloat16", *map(str, folders)]
    with LineChild("hf-peft", argv) as child:
        assert child.read()["ready"] is True
        question = {"prompts": [[3, 4, 5], [6, 7, 8]], "adapters": ["a001", "a000"], "max_tokens": 4}
        answer = child.ask(question)
    assert answer["output_tokens"] == 8 and answer["wall_s"] > 0
