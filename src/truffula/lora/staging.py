"""Staging folders: the loading workers write adapter images there, and the engine maps them from there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

PREFIX = "truffula-staging-"


class Staging:
    """The folders of one engine: in shared memory if available, and on disk.

    The engine locks each folder (``flock``) while it runs, and gives it its final name once it is locked. So a folder
    with that name and without a lock was left by a killed engine: its worker, or one of another engine, removes it.
    """

    def __init__(self, roots: Sequence[Path] | None = None) -> None:
        if roots is None:
            shared = Path("/dev/shm")
            usable = shared.is_dir() and os.access(shared, os.W_OK | os.X_OK)
            roots = [*([shared] if usable else []), Path(tempfile.gettempdir())]
        self.folders: list[Path] = []
        self._locks: list[int] = []
        for root in roots:
            made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=root))
            self._locks.append(os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            fcntl.flock(self._locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.folders.append(made.rename(root / made.name.removeprefix(".")))

    def discard(self, ticket: int) -> None:
        """Remove the files of a failed load."""
        for folder in self.folders:
            for path in folder.glob(f"{ticket}-*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def holds(self, path: Path) -> bool:
        """Whether ``path`` is a file directly in one of the folders."""
        return path.parent in self.folders

    def close(self) -> None:
        """Remove the folders. Idempotent."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()


def sweep(folders: Sequence[Path]) -> None:
    """Remove the abandoned staging folders beside ``folders``."""
    for folder in folders:
        for other in folder.parent.glob(f"{PREFIX}*"):
            remove_abandoned(other)


def remove_abandoned(folder: Path) -> bool:
    """Remove a staging folder whose engine has ended; True when the folder does not exist any more.

    A folder that is locked, or belongs to another user, is kept.
    """
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
    return not folder.exists()
