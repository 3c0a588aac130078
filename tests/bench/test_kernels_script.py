"""benchmarks/kernels.py: every kernel and format is measured, and a wrong option is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from truffula.kernels.cpu import available

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="truffula was installed without its native kernels"),
]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), "--smoke", *words], capture_output=True, text=True, timeout=120)


def test_every_kernel_and_format_is_measured_beside_its_limit() -> None:
    done = run("--shape", "50x64", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    linears = [(line["shape"], line["format"], line["rows"]) for line in report["lines"] if line["kernel"] == "linear"]
    formats = ("float32", "bfloat16", "FP8_128", "NF4", "FP4_16", "Q8_0", "Q4_0", "Q4_1", "Q5_0")
    assert linears == [("50x64", stored, rows) for stored in formats for rows in (1, 3)]
    others = {line["kernel"] for line in report["lines"]} - {"linear"}
    parts = {"lora", "lora, bias", "lora, input scale", "dora"}
    rest = {"with one adapter", "with adapter a row", "decode", "prefill", "norm", "head", "sampler"}
    assert others == parts | rest
    assert all(line["us"] > 0 and line["limit_us"] > 0 for line in report["lines"])
    assert all(report["limits"][name] > 0 for name in ("float_peak", "byte_peak", "read_one", "read_all"))


@pytest.mark.parametrize(
    ("wrong", "said"), [("--shape=9", "960x576"), ("--shape=8x31", "multiple of 32"), ("--format=Q9", "Q5_0")]
)
def test_a_wrong_option_is_refused(wrong: str, said: str) -> None:
    refused = run(wrong)
    assert refused.returncode == 1 and said in refused.stderr
