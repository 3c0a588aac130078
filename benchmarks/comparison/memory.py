"""What a process and its children hold in memory.

PSS is what a process has in memory, pages that several share divided among them, so a sum over processes counts every
page once. Anonymous memory is the part that no file is behind.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil

from truffula.errors import ConfigError


@dataclass(frozen=True)
class Resident:
    """Bytes. ``model_file`` is the part of ``pss`` that maps the model's own files."""

    pss: int
    anonymous: int
    model_file: int


def resident(pid: int, model: Path) -> Resident:
    """Sums over ``pid`` and its living descendants. ``model`` is a file, or a folder whose files are the model's.

    Raises:
        ConfigError: The system does not report it (only Linux does), or not to this user.
    """
    process = psutil.Process(pid)
    try:
        maps = process.memory_maps(grouped=False)
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, and holds nothing
                maps += child.memory_maps(grouped=False)
    except (psutil.Error, AttributeError) as error:
        raise ConfigError(f"Memory can't be measured: {error}. It needs Linux's /proc/PID/smaps.") from error
    of_model = [mapped.pss for mapped in maps if Path(mapped.path).is_relative_to(model.resolve())]
    return Resident(sum(mapped.pss for mapped in maps), sum(mapped.anonymous for mapped in maps), sum(of_model))
