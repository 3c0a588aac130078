"""How truffula was installed, for install commands in messages that work as printed."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

CPU_TORCH = (
    "without a GPU, install torch's CPU build first, from PyTorch's CPU package index: its default build for Linux "
    "brings gigabytes of CUDA libraries"
)


@dataclass(frozen=True)
class Installation:
    """``folder`` is the source tree it was installed from, None for a package index; ``editable`` as pip says."""

    folder: Path | None = None
    editable: bool = False

    def pip_install(self, extras: str = "", *, options: str = "") -> str:
        """A whole pip command for this interpreter that installs truffula with ``extras`` (``train``)."""
        target = f"{self.folder or 'truffula'}{f'[{extras}]' if extras else ''}"
        edit = ["-e"] if self.editable else []
        return shlex.join([sys.executable, *f"-m pip install {options}".split(), *edit, target])

    def compile_again(self) -> str:
        """A whole command that compiles the native kernels, after a compiler was installed."""
        folder = self.folder
        environment = Path(sys.prefix).resolve()
        if folder and self.editable and (folder / "Makefile").is_file() and environment == (folder / ".venv").resolve():
            return f"make -C {shlex.quote(str(folder))} native"
        return self.pip_install(options="--force-reinstall --no-deps --no-cache-dir")


def installation() -> Installation:
    """As pip recorded it (PEP 610)."""
    try:
        recorded = importlib.metadata.distribution("truffula").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return Installation()
    found = json.loads(recorded) if recorded else {}
    parts = urlsplit(found.get("url", ""))
    folder = Path(unquote(parts.path))
    if parts.scheme != "file" or not (folder / "pyproject.toml").is_file():
        return Installation()
    return Installation(folder, bool(found.get("dir_info", {}).get("editable")))
