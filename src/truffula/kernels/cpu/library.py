"""The native module, ``_native``: whether it can be loaded, and what it was compiled with."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from truffula.errors import KernelError, MissingDependency
from truffula.kernels.installation import installation

_NAME = "truffula.kernels.cpu._native"


def library() -> Any:
    """The native module.

    Raises:
        MissingDependency: It was not built, or can't be loaded.
    """
    if _NAME in sys.modules:  # the packer calls this for every matrix
        return sys.modules[_NAME]
    try:
        return importlib.import_module(_NAME)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == _NAME
        reason = (
            "truffula was installed without its native CPU kernels, because no C++20 compiler (such as g++) was found "
            "or compiling failed"
            if absent
            else f"truffula's native CPU kernels cannot be loaded ({error})"
        )
        raise MissingDependency(
            f"{reason}; with a compiler, compile them with: {installation().compile_again()}.",
            param="backend",
        ) from error


def instruction_sets() -> tuple[str, ...]:
    """The compiled instruction sets that this machine can run, the fastest of its kind of processor first.

    Raises:
        MissingDependency: See ``library``.
    """
    return tuple(library().table_names())


def available() -> bool:
    """Whether the native module can be loaded."""
    return not why_unavailable()


def why_unavailable() -> str:
    """Why the native module can't be loaded and what to do; empty when it can."""
    try:
        library()
    except MissingDependency as error:
        return error.message.removesuffix(".")
    return ""


@contextmanager
def as_kernel_errors() -> Iterator[None]:
    """Raise the native module's exceptions as ``KernelError``."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        raise KernelError(f"cpu backend: {error}.") from error
