"""What processes hold in memory, as Linux counts it in ``/proc/PID/smaps``.

PSS is what a process has in memory, pages that several share divided among them, so a sum over processes counts every
page once. Anonymous memory is the part that no file is behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from truffula.errors import ConfigError

_KIB = 1024


@dataclass(frozen=True)
class Resident:
    """Bytes. ``model_file`` is the part of ``pss`` that maps the model's own files."""

    pss: int
    anonymous: int
    model_file: int


def resident(pids: Iterable[int], model: Path) -> Resident:
    """Sums over ``pids``. ``model`` is a file, or a folder below which all files are the model's.

    Raises:
        ConfigError: The system has no ``/proc/PID/smaps``, or it is not ours to read.
    """
    try:
        texts = [Path(f"/proc/{pid}/smaps").read_text(errors="replace") for pid in pids]
    except OSError as error:
        raise ConfigError(f"Memory can't be measured: {error}. It needs Linux's /proc/PID/smaps.") from error
    parts = [parse_smaps(text, str(model.resolve())) for text in texts]
    return Resident(sum(p.pss for p in parts), sum(p.anonymous for p in parts), sum(p.model_file for p in parts))


def parse_smaps(text: str, model: str) -> Resident:
    """One process's mappings; a mapping's first line ends in its file's path."""
    pss = anonymous = model_file = 0
    path = ""
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            size = int(words[0]) * _KIB
            pss += size if name == "Pss" else 0
            anonymous += size if name == "Anonymous" else 0
            model_file += size if name == "Pss" and (path == model or path.startswith(model + "/")) else 0
        elif "-" in line.partition(" ")[0]:
            fields = line.split(maxsplit=5)
            path = fields[5] if len(fields) == 6 else ""
    return Resident(pss, anonymous, model_file)
