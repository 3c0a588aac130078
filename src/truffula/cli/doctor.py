"""``truffula doctor``: what this machine offers, what is missing and the way to it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.markup import escape

from truffula.cli.output import nbytes, out, table
from truffula.errors import TruffulaError

# What a CPU must say of itself for what speeds up products, fastest first.
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
    findings = [*_machine(), *_native(), *_packages(), *_backends(), *_settings()]
    if as_json:
        out().print_json(json.dumps([asdict(f) for f in findings]))
        return
    shown = table("", "what", "found", "what to do")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for finding in findings:
        shown.add_row(marks[finding.state], *map(escape, (finding.what, finding.value, finding.advice)))
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
    return [
        Finding("python", platform.python_version()),
        Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        Finding("cpu", ", ".join((name, f"{cores} usable core{'s' * (cores != 1)}", *sets[:1]))),
        Finding(
            "free memory",
            nbytes(memory),
            "ok" if memory > 2e9 else "note",
            "" if memory > 2e9 else "choose a small model",
        ),
    ]


def _native() -> list[Finding]:
    """The native module, the instruction sets and threads it would use, and the compiler it takes to have it."""
    from truffula.config import load_settings
    from truffula.engine.memory import usable_cpus
    from truffula.kernels.cpu import instruction_sets, why_this_set, why_unavailable

    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if why := why_unavailable():
        advice = "" if compiler else "install one, such as g++, then truffula again"
        return [
            Finding("native kernels", "no", "missing", why),
            Finding("C++ compiler", compiler or "none", "ok" if compiler else "missing", advice),
        ]
    settings = {s.option.name: s.value for s in load_settings({})}
    sets = instruction_sets()
    asked = settings["cpu_isa"]
    used = sets[0] if asked == "auto" else asked
    state, advice = ("ok", "") if used in sets else ("missing", "not to be had here; the cpu backend will refuse it")
    threads = settings["threads"] or usable_cpus()
    return [
        Finding("native kernels", "yes"),
        Finding("instruction sets", ", ".join(sets), "ok", "--cpu-isa forces one" if len(sets) > 1 else ""),
        *([Finding("tried", why)] if (why := why_this_set()) else []),
        Finding("would use", f"{used}, {threads} thread{'s' * (threads != 1)}", state, advice),
        Finding("C++ compiler", compiler or "none"),
    ]


def _packages() -> list[Finding]:
    wanted = (
        ("torch", "the reference backend", "pip install 'truffula[torch]'"),
        ("transformers", "truffula verify", "pip install 'truffula[hf]'"),
        ("peft", "truffula verify --adapter", "pip install peft"),
    )
    findings = []
    for package, purpose, advice in wanted:
        try:
            findings.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "not installed", "note", f"{advice} (for {purpose})"))
    return findings


def _backends() -> list[Finding]:
    from truffula.config import load_settings
    from truffula.kernels.select import backend_names, fallback_warning, select_backend

    isa = next(s.value for s in load_settings({}) if s.option.name == "cpu_isa")
    findings = []
    for name in backend_names():
        try:
            backend = select_backend(name, "cpu", cpu_isa="auto" if name == "reference" else isa)
        except TruffulaError as error:
            state = "note" if name == "reference" else "missing"
            findings.append(Finding(f"backend {name}", "not available", state, error.message))
            continue
        probe = backend.probe()
        slow = fallback_warning(name, backend)
        detail = f"{probe.name} on {probe.device}, {probe.isa} ({', '.join(probe.dtypes)})"
        findings.append(Finding(f"backend {name}", detail, "note" if slow else "ok", slow))
    return findings


def _settings() -> list[Finding]:
    from truffula.config import load_settings

    given = [s for s in load_settings({}) if s.origin == "environment"]
    return [Finding(f"set by {s.source}", f"{s.option.name} = {s.shown}", "note") for s in given]
