"""``truffula doctor``: hardware, native kernels, packages and settings, with advice on what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from truffula.cli.output import out, table
from truffula.errors import TruffulaError
from truffula.option import format_size
from truffula.settings import load_settings

if TYPE_CHECKING:
    from truffula.kernels.host import CpuLimits

# Instruction sets for matrix products and their flags in /proc/cpuinfo, fastest first.
ISA_FLAGS = (
    ("AMX bf16", ("amx_bf16",)),
    ("AVX512-BF16", ("avx512_bf16",)),
    ("AVX-512 + VNNI", ("avx512f", "avx512_vnni")),
    ("AVX-512", ("avx512f",)),
    ("AVX2 + FMA", ("avx2", "fma")),
)

STORED = ("float32", "float16", "bfloat16", "quantised")
"""Stored dtypes for which the compute dtype may differ."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``state`` is ok, note or missing; ``advice`` is what to do."""

    what: str
    value: str
    state: str = "ok"
    advice: str = ""


def run_doctor(*, as_json: bool) -> None:
    settings = load_settings({})
    given = {setting.option.name: setting.value for setting in settings}
    findings = [*_machine(), *_native(given), *_gpus(), *_packages(), *_backends(given["cpu_isa"])]
    findings += _dtypes(given)
    changed = (setting for setting in settings if setting.origin in ("environment", "file"))
    findings += [Finding(f"set by {s.source}", f"{s.option.name} = {s.shown}", "note") for s in changed]
    if as_json:
        out().print_json(data=[asdict(f) for f in findings])
        return
    shown = table("", "what", "found", "what to do")
    styles = {"ok": "green", "note": "yellow", "missing": "red"}
    for finding in findings:
        shown.add_row(Text(finding.state, styles[finding.state]), finding.what, finding.value, finding.advice)
    out().print(shown)


def cpu_name() -> tuple[str, list[str]]:
    """The CPU's model name, and its instruction sets of ``ISA_FLAGS``; empty when the system has no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(values.get("flags", values.get("Features", "")).split())
    return values.get("model name", platform.machine()), [name for name, need in ISA_FLAGS if flags.issuperset(need)]


def _machine() -> list[Finding]:
    from truffula.kernels.host import cpu_limits, free_memory

    name, sets = cpu_name()
    cores = cpu_limits().usable
    memory = free_memory().nbytes
    state, advice = ("ok", "") if memory > 2e9 else ("note", "choose a small model")
    return [
        Finding("python", platform.python_version()),
        Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        Finding("cpu", ", ".join((name, f"{cores} usable core{'s' * (cores != 1)}", *sets[:1]))),
        cpu_limit(cpu_limits()),
        Finding("free memory", format_size(memory), state, advice),
    ]


def cpu_limit(limits: CpuLimits) -> Finding:
    """The limits of the compute threads. A fractional quota is a note: it throttles the last thread, for which all
    wait.
    """
    quota = "no quota" if limits.quota is None else f"a control group's quota of {limits.quota:g} CPUs"
    found = Finding("cpu limit", f"{limits.affinity} of {limits.machine} CPUs in the affinity mask, {quota}")
    if limits.quota is None or limits.quota >= limits.affinity or limits.quota == int(limits.quota):
        return found
    advice = f"the quota throttles threads: assign whole CPUs, or try --threads {max(1, int(limits.quota))}"
    return replace(found, state="note", advice=advice)


def faster_instructions(sets: Sequence[str], tables: Sequence[str]) -> str:
    """Advice for a CPU with the instruction ``sets`` when the native module can use ``tables`` (best first)."""
    if tables[0] == "portable":
        return "AVX2 is missing or was not compiled in: matrix products take several times as long without it"
    if "AMX bf16" in sets and "amx" not in tables:
        return "this CPU has AMX, which needs Linux 5.16 or newer and truffula compiled with gcc 11, clang 12 or newer"
    if any(table.startswith("avx512") for table in tables):
        return "--cpu-isa forces one of them"
    if "AVX-512" in sets:
        return "this CPU has AVX-512, but it was not compiled in: install truffula again with a newer compiler"
    return "this CPU has no AVX-512, which makes prompts and large batches faster; --cpu-isa forces a set"


def _native(given: Mapping[str, Any]) -> list[Finding]:
    """Findings about the native module: instruction sets, threads and the compiler that builds it."""
    from truffula.kernels.cpu import instruction_sets, why_unavailable
    from truffula.kernels.host import usable_cpus
    from truffula.kernels.installation import installation

    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if why := why_unavailable():
        advice = "" if compiler else f"install one, such as g++, then: {installation().compile_again()}"
        return [
            Finding("native kernels", "no", "missing", why),
            Finding("C++ compiler", compiler or "none", "ok" if compiler else "missing", advice),
        ]
    sets = instruction_sets()
    used = sets[0] if given["cpu_isa"] == "auto" else given["cpu_isa"]
    threads = given["threads"] or usable_cpus()
    would_use = Finding("would use", f"{used}, {threads} thread{'s' * (threads != 1)}")
    if used not in sets:
        advice = "not usable on this machine; the cpu backend rejects it"
        would_use = replace(would_use, state="missing", advice=advice)
    return [
        Finding("native kernels", "yes"),
        Finding("instruction sets", ", ".join(sets), "ok", faster_instructions(cpu_name()[1], sets)),
        *_self_check(sets),
        would_use,
        Finding("C++ compiler", compiler or "none"),
    ]


def _self_check(sets: Sequence[str]) -> list[Finding]:
    """One finding for each instruction set that computes wrong values, because of a compiler or an emulated CPU."""
    from truffula.testing.self_check import difference

    wrong = [(isa, found) for isa in sets if (found := difference(isa))]
    if not wrong:
        return [Finding("self-check", "every instruction set computes as portable does")]
    advice = "choose another one with --cpu-isa, or compile with another compiler"
    return [Finding("self-check", f"{isa} computes {found} wrongly", "missing", advice) for isa, found in wrong]


def _gpus() -> list[Finding]:
    """The GPUs, and whether the triton backend can use each."""
    from truffula.kernels.installation import installation
    from truffula.kernels.select import UNTRIED

    if importlib.util.find_spec("torch") is None:
        advice = f"not needed to serve; {installation().pip_install('cuda')} (for an NVIDIA GPU)"
        return [Finding("gpu", "not looked for, as torch is not installed", "ok", advice)]
    from truffula.kernels.triton.device import cuda_facts, driver_version, why_unusable

    facts = cuda_facts()
    if not facts.gpus:
        error = why_unusable(facts, "cuda")
        return [Finding("gpu", "none", "ok", error.message if error else "")]
    driver, findings = driver_version() or "of unknown version", []
    for index, gpu in enumerate(facts.gpus):
        capability = ".".join(map(str, gpu.capability))
        value = f"{gpu.name}, capability {capability}, {format_size(gpu.memory_bytes)}, driver {driver}"
        unusable = why_unusable(facts, f"cuda:{index}")
        state, advice = ("missing", unusable.message) if unusable else ("note", UNTRIED)
        findings.append(Finding(f"gpu {index}", value, state, advice))
    return findings


def _packages() -> list[Finding]:
    from truffula.kernels.cpu import available
    from truffula.kernels.installation import installation

    here = installation()
    wanted = (
        ("torch", "the reference backend", here.pip_install("torch")),
        ("triton", "--device cuda", here.pip_install("cuda")),
        ("transformers", "truffula verify", here.pip_install("train")),
        ("peft", "truffula verify --adapter", here.pip_install("train")),
    )
    findings = []
    for package, purpose, advice in wanted:
        try:
            findings.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            needed = "not needed to serve; " if available() else ""
            state = "ok" if available() else "note"
            findings.append(Finding(package, "not installed", state, f"{needed}{advice} (for {purpose})"))
    return findings


def _backends(isa: str) -> list[Finding]:
    from truffula.kernels.select import BACKENDS, fallback_warning, select_backend

    findings = []
    for name in BACKENDS:
        if name == "triton":  # see the GPUs
            continue
        try:
            backend = select_backend(name, "cpu", cpu_isa="auto" if name == "reference" else isa)
        except TruffulaError as error:
            state = "note" if name == "reference" else "missing"
            findings.append(Finding(f"backend {name}", "not available", state, error.message))
            continue
        slow = fallback_warning(name, backend)
        detail = f"{backend.name} on {backend.device}, {backend.isa} ({', '.join(backend.dtypes)})"
        findings.append(Finding(f"backend {name}", detail, "note" if slow else "ok", slow))
    return findings


def _dtypes(given: Mapping[str, Any]) -> list[Finding]:
    """The compute dtype that ``serve`` would choose for each stored dtype, and why."""
    from truffula.kernels.cpu.formats import INT8_KINDS
    from truffula.kernels.select import Precision, choose_dtype, select_backend

    try:
        precision = Precision(given["quantize"], given["exact"])
        backend = select_backend(given["backend"], given["device"], cpu_isa=given["cpu_isa"], precision=precision)
        choices = {kind: choose_dtype(backend, given["dtype"], kind) for kind in STORED}
    except TruffulaError as error:
        return [Finding("dtype", "none", "missing", error.message)]
    findings = [Finding(f"dtype, {kind} files", at.dtype, "ok", at.reason) for kind, at in choices.items()]
    int8 = ", ".join(sorted(backend.block_kinds.intersection(INT8_KINDS)))
    floats = ", ".join(sorted(backend.block_kinds.difference(INT8_KINDS)))
    value = f"int8 for {int8}, floats for {floats}" if int8 else "on the values, none in int8"
    advice = "fastest; --exact computes on the file's values (docs/quantization.md)" if int8 else ""
    return [*findings, Finding("products with quantised files", value, "ok", advice)]
