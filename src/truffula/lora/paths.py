"""An adapter's folder and the names of its files. ``OpenFolder`` opens files and checks where they are in one step."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Collection
from pathlib import Path

from truffula.weights.text_files import TOKENIZER_FILES

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
SHARD_PREFIX = "adapter_model"
PICKLE = "adapter_model.bin"


def fingerprint(stat_of: Callable[[str], os.stat_result], names: Callable[[], Collection[str]]) -> str:
    """Sizes, times and inodes of its files: it changes when a file of the adapter does. Reads no file.

    ``stat_of`` is the ``stat`` of a file by its name, such as ``OpenFolder.stat``; ``names`` lists the folder, which is
    done where there is no single file of tensors.
    """
    stamps = [_stamp(stat_of, name) for name in (CONFIG, TENSORS, *TOKENIZER_FILES)]
    if stamps[1] == "-":
        with contextlib.suppress(OSError):
            shards = sorted(name for name in names() if name.startswith(SHARD_PREFIX))
            stamps += [f"{name}={_stamp(stat_of, name)}" for name in shards]
    return ";".join(stamps)


def _stamp(stat_of: Callable[[str], os.stat_result], name: str) -> str:
    try:
        found = stat_of(name)
    except OSError:
        return "-"
    return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}"


class OpenFolder:
    """A folder held open. Files are opened relative to its descriptor, so renaming the folder changes nothing here.

    Args:
        path: The folder.
        root: None, or a folder above ``path``: nothing outside of it is opened, wherever links lead. The system finds
            a file first (``O_PATH``, which opens nothing), and what it found is opened once its real path is known to
            be below the root. So a link that is created in the meantime has no effect.

    Raises ``OSError``: what the system says of ``path``, or errno EXDEV for what is outside of ``root``.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path = path
        self.root = root
        self._fds: list[int] = []  # the root's, if there is one, and the folder's
        try:
            if root is not None:
                self._fds.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            self._fds.append(self._open(str(path), os.O_DIRECTORY))
        except OSError:
            self.close()
            raise

    def open(self, name: str) -> int:
        """A descriptor of a file, for reading; the caller closes it. Never blocks, whatever kind of file it is."""
        return self._open(name, os.O_NONBLOCK, self._fds[-1])

    def read(self, name: str, limit: int) -> bytes | None:
        """A file's bytes; None when it is missing, not a regular file, above ``limit`` bytes, or cannot be read."""
        with contextlib.suppress(OSError), os.fdopen(self.open(name), "rb") as file:
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_size <= limit:
                return file.read(limit)
        return None

    def names(self) -> set[str]:
        """The names in the folder."""
        return set(os.listdir(self._fds[-1]))  # noqa: PTH208  a descriptor, not a path

    def stat(self, name: str) -> os.stat_result:
        fd = self.open(name)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def _open(self, path: str, flags: int, folder: int | None = None) -> int:
        flags |= os.O_RDONLY | os.O_CLOEXEC
        if self.root is None:
            return os.open(path, flags, dir_fd=folder)
        found = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=folder)
        try:
            if not _real_path(found).is_relative_to(_real_path(self._fds[0])):
                raise OSError(errno.EXDEV, "a link leads out of the folder of adapters", path)
            return os.open(f"/proc/self/fd/{found}", flags)
        finally:
            os.close(found)


def _real_path(fd: int) -> Path:
    """Where an open file is now, without links."""
    return Path(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115  a link to a path that the system knows
