"""What ``doctor`` says of limits, instructions and dtypes is what the engine would do."""

from __future__ import annotations

import json
import re

from command import here

from truffula.cli.doctor import STORED, cpu_limit, faster_instructions
from truffula.kernels.host import CpuLimits
from truffula.kernels.select import choose_dtype, select_backend


def doctor(**env: str) -> dict[str, dict[str, str]]:
    return {row["what"]: row for row in json.loads(here("doctor", "--json", **env).stdout)}


def without_figures(reason: str) -> str:
    """The torch backend's names how many times faster a dtype was just now: that is not the same twice."""
    return re.sub(r"[0-9]+(\.[0-9]+)?", "", reason)


def test_dtypes_and_reasons_are_those_of_a_start() -> None:
    rows, backend = doctor(), select_backend()
    for kind in STORED:
        choice, row = choose_dtype(backend, "auto", kind), rows[f"dtype, {kind} files"]
        assert (row["value"], without_figures(row["advice"])) == (choice.dtype, without_figures(choice.reason))
    int8 = rows["products with quantised files"]["value"]
    assert all(kind in int8 for kind in backend.block_kinds) and int8.startswith("int8") == bool(backend.block_kinds)


def test_a_dtype_and_precision_that_are_set_are_told() -> None:
    rows = doctor(TRUFFULA_DTYPE="float32", TRUFFULA_EXACT="1")
    assert {rows[f"dtype, {kind} files"]["value"] for kind in STORED} == {"float32"}
    assert rows["products with quantised files"]["value"] == "on the values, none in int8"


def test_settings_a_server_would_refuse_are_said_with_its_words() -> None:
    row = doctor(TRUFFULA_BACKEND="reference", TRUFFULA_QUANTIZE="q8_0")["dtype"]
    assert row["state"] == "missing" and "quantize" in row["advice"]


def test_a_quota_is_seen_and_a_broken_one_noted() -> None:
    assert cpu_limit(CpuLimits(8, 4, None)).state == "ok"
    assert "quota of 2 CPUs" in cpu_limit(CpuLimits(8, 8, 2.0)).value
    odd = cpu_limit(CpuLimits(8, 8, 2.5))
    assert odd.state == "note" and "--threads 2" in odd.advice
    assert cpu_limit(CpuLimits(8, 2, 2.5)).state == "ok"  # it does not bind


def test_what_would_be_faster_is_said_of_this_cpu() -> None:
    assert "no AVX-512" in faster_instructions(["AVX2 + FMA"], ["avx2", "portable"])
    assert "not compiled" in faster_instructions(["AVX-512", "AVX2 + FMA"], ["avx2", "portable"])
    assert "no AVX" not in faster_instructions(["AVX-512"], ["avx512", "avx2", "portable"])
    assert "AVX2" in faster_instructions([], ["portable"])
    assert "AMX" in faster_instructions(["AMX bf16", "AVX-512"], ["avx512vnni", "avx512", "avx2", "portable"])
    assert "AMX" not in faster_instructions(["AMX bf16", "AVX-512"], ["amx", "avx512", "avx2", "portable"])
