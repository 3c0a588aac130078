"""``truffula doctor``: what this machine offers, what is missing and the way to it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from truffula.cli.output import nbytes, out, table
from truffula.errors import TruffulaError

# What a CPU must say of itself for each kernel table that matters to us, fastest first.
ISA_FLAGS = (
    ("AMX bf16", ("amx_bf16",)),
    ("AVX512-BF16", ("avx512_bf16",)),
    ("AVX-512 + VNNI", ("avx512f", "avx512_vnni")),
    ("AVX-512", ("avx512f",)),
    ("AVX2 + FMA", ("avx2", "fma")),
)


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` ok, note or missing; ``advice`` is the way out."""

    what: str
    value: str
    state: str = "ok"
    advice: str = ""


def run_doctor(*, as_json: bool) -> None:
    findings = [*_machine(), *_packages(), *_backends(), *_settings()]
    if as_json:
        out().print_json(json.dumps([asdict(f) for f in findings]))
        return
    shown = table("", "what", "found", "what to do")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for finding in findings:
        shown.add_row(marks[finding.state], finding.what, finding.value, finding.advice)
    out().print(shown)


def cpu_name() -> tuple[str, list[str]]:
    """Model name and the instruction sets above that it has; empty where the system doesn't say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(values.get("flags", values.get("Features", "")).split())
    return values.get("model name", platform.machine()), [name for name, need in ISA_FLAGS if flags.issuperset(need)]


def _machine() -> list[Finding]:
    from truffula.engine.memory import available, usable_cpus

    name, sets = cpu_name()
    cores = usable_cpus()
    memory = available().nbytes
    fast = bool(sets) and sets[0] in ("AMX bf16", "AVX512-BF16")
    return [
        Finding("python", platform.python_version()),
        Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        Finding("cpu", f"{name}, {cores} usable core{'s' * (cores != 1)}"),
        Finding(
            "instruction sets",
            ", ".join(sets) or "unknown",
            "ok" if fast else "note",
            "" if fast else "no bf16 products: --dtype auto will likely compute in float32",
        ),
        Finding(
            "free memory",
            nbytes(memory),
            "ok" if memory > 2e9 else "note",
            "" if memory > 2e9 else "choose a small model",
        ),
    ]


def _packages() -> list[Finding]:
    wanted = (
        ("torch", "the reference backend", "pip install 'truffula[torch]'", "missing"),
        ("transformers", "truffula verify", "pip install 'truffula[hf]'", "note"),
        ("peft", "truffula verify --adapter", "pip install peft", "note"),
    )
    findings = []
    for package, purpose, advice, state in wanted:
        try:
            findings.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "not installed", state, f"{advice} (for {purpose})"))
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    findings.append(Finding("C++ compiler", compiler or "none", "ok" if compiler else "note"))
    return findings


def _backends() -> list[Finding]:
    from truffula.kernels.select import backend_names, select_backend

    findings = []
    for name in backend_names():
        try:
            probe = select_backend(name, "cpu").probe()
        except TruffulaError as error:
            findings.append(Finding(f"backend {name}", "not available", "missing", error.message))
            continue
        detail = f"{probe.device} {probe.isa} ({', '.join(probe.dtypes)})"
        findings.append(
            Finding(
                f"backend {name}", detail if probe.available else probe.reason, "ok" if probe.available else "missing"
            )
        )
    return findings


def _settings() -> list[Finding]:
    from truffula.config import load_settings

    given = [s for s in load_settings({}) if s.origin == "environment"]
    return [Finding(f"set by {s.source}", f"{s.option.name} = {s.shown}", "note") for s in given]
