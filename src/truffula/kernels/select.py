"""Choosing a backend and a compute dtype at start, with the reason in words."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from truffula.errors import ConfigError, MissingDependency
from truffula.kernels.backend import Backend


@dataclass(frozen=True)
class Precision:
    """What is asked of a backend beside the dtype. ``quantize``: the format (``q8_0``) that float matrices are rounded
    to at load, or ``none``. ``exact``: compute on the values of quantised files, not in whole numbers."""

    quantize: str = "none"
    exact: bool = False


def _reference(device: str, threads: int | None, precision: Precision) -> Backend:
    if precision.quantize != "none":
        raise ConfigError(
            f"quantize is {precision.quantize!r}, which the reference backend does not serve; the cpu backend does.",
            param="quantize",
        )
    if importlib.util.find_spec("torch") is None:
        raise MissingDependency(
            "the reference backend needs torch, which is not installed: pip install 'truffula[torch]'.", param="backend"
        )
    if device not in ("cpu", "auto"):
        raise ConfigError(f"device is {device!r}; the reference backend runs on cpu.", param="device")
    from truffula.kernels.reference import ReferenceBackend

    return ReferenceBackend(threads=threads)


def _cpu(device: str, threads: int | None, precision: Precision) -> Backend:
    if device not in ("cpu", "auto"):
        raise ConfigError(f"device is {device!r}; the cpu backend runs on cpu.", param="device")
    from truffula.kernels.cpu import CpuBackend

    return CpuBackend(threads=threads, quantize=precision.quantize, exact=precision.exact)


BACKENDS: Mapping[str, Callable[[str, int | None, Precision], Backend]] = MappingProxyType(
    {"cpu": _cpu, "reference": _reference}
)
"""Creators by name; each imports its own library when called. The names are the command line's choices."""


def backend_names() -> tuple[str, ...]:
    """What ``--backend`` accepts."""
    return ("auto", *BACKENDS)


def select_backend(
    name: str = "auto", device: str = "auto", *, threads: int | None = None, precision: Precision = Precision()
) -> Backend:
    """The backend called ``name``; ``auto`` takes the first that is available on ``device``.

    ``threads`` is how many the backend may compute with; None leaves its own default.

    Raises:
        ConfigError: An unknown name, a device the backend does not run on, or a precision it does not serve.
        MissingDependency: Its library is not installed; the message names the extra.
    """
    if name == "auto":
        name = next(iter(BACKENDS))
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; it must be one of {', '.join(backend_names())}.", param="backend")
    return BACKENDS[name](device, threads, precision)


@dataclass(frozen=True)
class DtypeChoice:
    """The compute dtype and why, in words for the start log."""

    dtype: str
    reason: str


def choose_dtype(backend: Backend, requested: str, stored: str) -> DtypeChoice:
    """``requested`` itself, or for ``auto`` the faster of what the backend serves.

    ``stored`` is the checkpoint's dtype: ``float32``, ``float16``, ``bfloat16`` (or as safetensors writes them). A
    float32 checkpoint is served in float32: rounding it is the operator's choice. For the others a few products are
    timed (about 50 ms).

    Raises:
        ConfigError: The backend does not compute in ``requested``.
    """
    served = backend.probe().dtypes
    wanted = _ALIASES.get(requested.lower(), requested)
    stored = _ALIASES.get(stored.lower(), stored)
    if wanted != "auto":
        if wanted not in served:
            raise ConfigError(
                f"dtype is {requested!r}, which the {backend.name} backend does not compute in; use one of "
                f"{', '.join(('auto', *served))} (float16 weights are converted).",
                param="dtype",
            )
        return DtypeChoice(wanted, "asked for")
    if stored == "float32":
        return DtypeChoice("float32", "the checkpoint is float32")
    if "bfloat16" not in served:
        return DtypeChoice("float32", f"the {backend.name} backend computes in nothing else")
    seconds = backend.time_products(("float32", "bfloat16"))
    ratio = seconds["float32"] / seconds["bfloat16"]
    if ratio >= 1.0:
        return DtypeChoice("bfloat16", f"its products are {ratio:.1f} times as fast as float32's here")
    return DtypeChoice("float32", f"its products are {1 / ratio:.1f} times as fast as bfloat16's here")


_ALIASES = {
    "fp32": "float32", "f32": "float32", "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16", "f16": "float16", "half": "float16",
}  # fmt: skip
