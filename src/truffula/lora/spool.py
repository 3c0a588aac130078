"""Private folders where images lie between the worker that wrote them and the engine that maps them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PREFIX = "truffula-spool-"
LOCK = "lock"
STALE_AFTER_S = 60.0


class Spool:
    """Folders of one engine: in shared memory where there is some, and on disk.

    A locked file in each says that the owner lives. Folders of owners that were killed are removed by their workers, or
    by the next owner to come.
    """

    def __init__(self, roots: Sequence[Path] | None = None) -> None:
        if roots is None:
            shared = Path("/dev/shm")
            usable = shared.is_dir() and os.access(shared, os.W_OK | os.X_OK)
            roots = [*([shared] if usable else []), Path(tempfile.gettempdir())]
        self.folders: list[Path] = []
        self._locks: list[int] = []
        for root in roots:
            for folder in root.glob(f"{PREFIX}*"):
                remove_abandoned(folder, STALE_AFTER_S)
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.folders.append(folder)
            self._locks.append(lock)

    def discard(self, ticket: int) -> None:
        """Remove what a load that failed has left."""
        for folder in self.folders:
            for path in folder.glob(f"{ticket}-*"):
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


def remove_abandoned(folder: Path, older_than_s: float = 0.0) -> bool:
    """Remove a spool folder whose owner is gone; True when it is gone now.

    One that is not ours to touch, is younger than ``older_than_s`` (its owner may be about to lock it) or still locked
    is left alone.
    """
    with contextlib.suppress(OSError):
        if time.time() - folder.stat().st_mtime >= older_than_s:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
    return not folder.exists()
