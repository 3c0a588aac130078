"""Chooses a backend and a compute dtype at start."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

from truffula.environment import prepare_compute
from truffula.errors import ConfigError, MissingDependency
from truffula.kernels.backend import Backend
from truffula.kernels.cpu import CpuBackend, available, why_unavailable
from truffula.kernels.installation import CPU_TORCH, installation

log = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "reference", "triton")
"""The values of ``--backend``."""
UNTRIED = (
    "the triton backend has been tested under Triton's interpreter only: it has not run on a GPU yet. "
    "--backend reference computes with torch alone"
)


@dataclass(frozen=True)
class Precision:
    """Options besides the dtype. ``quantize``: the format (``q8_0``) that float matrices are rounded to at load, or
    ``none``. ``exact``: compute on the dequantised values of quantised files, not in int8."""

    quantize: str = "none"
    exact: bool = False


def _reference(device: str, threads: int | None, cpu_isa: str, precision: Precision) -> Backend:
    if precision.quantize != "none":
        raise ConfigError(
            f"quantize is {precision.quantize!r}, which the reference backend does not support; the cpu backend does.",
            param="quantize",
        )
    if importlib.util.find_spec("torch") is None:
        raise MissingDependency(
            f"the reference backend needs torch, which is not installed: {installation().pip_install('torch')} "
            f"({CPU_TORCH}).",
            param="backend",
        )
    if cpu_isa != "auto":
        raise ConfigError(
            f"cpu_isa is {cpu_isa!r}, but the backend is reference, and torch chooses its instructions itself; leave "
            "cpu_isa at auto or use the cpu backend.",
            param="cpu_isa",
        )
    prepare_compute()
    from truffula.kernels.reference import ReferenceBackend

    return ReferenceBackend(threads=threads, device=device)


def _cpu(device: str, threads: int | None, cpu_isa: str, precision: Precision) -> Backend:
    if device != "cpu":
        raise ConfigError(
            f"device is {device!r}, but the cpu backend computes on the CPU; the triton backend runs on NVIDIA GPUs, "
            "the reference backend (torch) on other devices: leave backend at auto.",
            param="device",
        )
    if why := why_unavailable():
        raise MissingDependency(
            f"the cpu backend is not available: {why}. Or compute with torch, which is several times slower: "
            f"{installation().pip_install('torch')} ({CPU_TORCH}).",
            param="backend",
        )
    return CpuBackend(threads=threads, isa=cpu_isa, quantize=precision.quantize, exact=precision.exact)


def _triton(device: str, threads: int | None, cpu_isa: str, precision: Precision) -> Backend:
    if device.partition(":")[0] != "cuda":
        raise ConfigError(
            f"device is {device!r}, but the triton backend computes on NVIDIA GPUs: --device cuda, or leave backend at "
            "auto.",
            param="device",
        )
    for name, value, default in (("quantize", precision.quantize, "none"), ("cpu_isa", cpu_isa, "auto")):
        if value != default:
            raise ConfigError(
                f"{name} is {value!r}, which the triton backend does not support; the cpu backend does.", param=name
            )
    if importlib.util.find_spec("torch") is None:
        raise MissingDependency(
            f"the triton backend needs torch, which is not installed: {installation().pip_install('cuda')}.",
            param="backend",
        )
    prepare_compute()
    from truffula.kernels.triton.device import cuda_device

    found = cuda_device(device)
    from truffula.kernels.triton.backend import TritonBackend

    return TritonBackend(found, threads)


def gpu_device() -> str:
    """``cuda`` where a GPU is that kernels can run on, else ``cpu``. torch is asked only where the system has a GPU."""
    there = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if not there or importlib.util.find_spec("torch") is None:
        return "cpu"
    from truffula.kernels.triton.device import cuda_facts, why_unusable

    if (error := why_unusable(cuda_facts(), "cuda")) is None:
        return "cuda"
    log.warning("device auto: computing on the CPU, as the GPU cannot be used: %s", error.message)
    return "cpu"


def select_backend(
    name: str = "auto",
    device: str = "auto",
    *,
    threads: int | None = None,
    cpu_isa: str = "auto",
    precision: Precision = Precision(),
) -> Backend:
    """The backend called ``name``, on ``device`` (``auto`` is a GPU where kernels can use one, else the CPU). The
    backend ``auto`` is cpu on a CPU, triton on ``cuda``, and torch on another device or when the native kernels cannot
    be loaded.

    ``threads`` is how many the backend may compute with (None leaves its own default), ``cpu_isa`` the instruction set
    that the cpu backend must use.

    Raises:
        ConfigError: An unknown name, a device the backend does not run on, an instruction set this machine has not, or
            a precision it does not serve.
        MissingDependency: The backend is not installed, or none is; the message says what to do.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}.", param="backend")
    if device == "auto":
        device = "cpu" if name == "cpu" else "cuda" if name == "triton" else gpu_device()
    if name == "auto":
        no_torch = importlib.util.find_spec("torch") is None  # then the cpu backend's error says what to install
        name = "cpu" if device == "cpu" and (available() or no_torch) else "reference"
        name = "triton" if device.partition(":")[0] == "cuda" else name
    create = {"cpu": _cpu, "triton": _triton, "reference": _reference}[name]
    return create(device, threads, cpu_isa, precision)


def fallback_warning(asked: str, chosen: Backend) -> str:
    """A warning when ``auto`` has chosen a slow backend, or one that has not run on hardware; else empty."""
    if chosen.name == "triton":
        return f"{UNTRIED}."
    if asked != "auto" or chosen.name == "cpu":
        return ""
    if (device := chosen.device) != "cpu":
        return f"computing with torch on {device}, op by op: there are no kernels for it."
    return f"computing with the {chosen.name} backend, which is several times slower: {why_unavailable()}."


@dataclass(frozen=True)
class DtypeChoice:
    """The compute dtype, and the reason for the start log."""

    dtype: str
    reason: str


def choose_dtype(backend: Backend, requested: str, stored: str) -> DtypeChoice:
    """``requested`` itself, or for ``auto`` the faster of what the backend serves.

    ``stored`` is the checkpoint's dtype: ``float32``, ``float16``, ``bfloat16`` (or as safetensors writes them). A
    float32 checkpoint is served in float32: rounding it is the operator's choice. So is one in float16 where the
    backend computes in it. For the others the backend says which is faster.

    Raises:
        ConfigError: The backend does not compute in ``requested``.
    """
    served = backend.dtypes
    wanted = _ALIASES.get(requested.lower(), requested)
    stored = _ALIASES.get(stored.lower(), stored)
    if wanted != "auto":
        if wanted not in served:
            raise ConfigError(
                f"dtype is {requested!r}, which the {backend.name} backend does not support; use one of "
                f"{', '.join(('auto', *served))} (float16 weights are converted).",
                param="dtype",
            )
        return DtypeChoice(wanted, "asked for")
    if stored == "float32":
        return DtypeChoice("float32", "the checkpoint is float32")
    if stored == "float16" and stored in served:
        return DtypeChoice(stored, "the checkpoint is float16")
    if "bfloat16" not in served:
        return DtypeChoice("float32", f"the {backend.name} backend supports no other dtype")
    dtype, reason = backend.faster_dtype()
    if stored == "float16" and dtype == "bfloat16":
        reason += "; float16 weights are rounded to it (--dtype float32 keeps them)"
    return DtypeChoice(dtype, reason)


_ALIASES = {
    "fp32": "float32", "f32": "float32", "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16", "f16": "float16", "half": "float16",
}  # fmt: skip
