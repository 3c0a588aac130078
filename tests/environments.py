"""Virtual environments below ``.venvs``, for programs that are tested as they are installed; made once and kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = ("torch==2.13.0+cpu", "torch==2.13.0")
"""The CPU build, or else the same version: a plain "torch" may bring gigabytes of CUDA packages."""


def environment(name: str, packages: Sequence[str], *, torch: bool = False) -> Path:
    """The ``bin`` folder of the environment ``name`` with these ``packages``; ``torch`` is installed before them."""
    home = ROOT / ".venvs" / name
    made, wanted = home / "made.txt", "\n".join([*packages, *TORCH[: int(torch)]])
    if not made.is_file() or made.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        if torch and _install(home, TORCH[:1], check=False):
            _install(home, TORCH[1:])
        _install(home, packages)
        made.write_text(wanted)
    return home / "bin"


def _install(home: Path, packages: Sequence[str], *, check: bool = True) -> int:
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    return subprocess.run([*pip, *packages], check=check, timeout=900).returncode
