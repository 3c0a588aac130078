"""An adapter's folder and the names of its files. ``OpenFolder`` resolves links and opens files in one step."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Callable
from pathlib import Path

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_LINKS = 40


def fingerprint(folder: Path) -> str:
    """Sizes, times and inodes of both files: it changes when a file of the adapter does. Reads no file."""
    return _fingerprint(lambda name: (folder / name).stat())


def _fingerprint(stat_of: Callable[[str], os.stat_result]) -> str:
    stamps = []
    for name in (CONFIG, TENSORS):
        try:
            found = stat_of(name)
            stamps.append(f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}")
        except OSError:
            stamps.append("-")
    return ";".join(stamps)


class OpenFolder:
    """A folder held open. Files are opened relative to its descriptor, so renaming the folder changes nothing here.

    Args:
        path: The folder.
        root: None, or a folder above ``path`` that no link may lead out of. Each component below it is then opened
            relative to its parent without following links; a link is read and resolved component by component. So a
            link out of ``root`` is never followed, even one that is created during the walk.

    Raises ``OSError``: what the system says of ``path``, or errno EXDEV for a link that leads out of ``root``.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path = path
        self.root = root
        self._stack = [os.open(path if root is None else root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        if root is not None:
            (root_fd,) = self._stack
            try:
                self._stack = self._walk(str(path.relative_to(root)), os.O_RDONLY | os.O_DIRECTORY)
            finally:
                os.close(root_fd)

    def open(self, name: str) -> int:
        """A descriptor of a file, for reading; the caller closes it. Never blocks, whatever kind of file it is."""
        flags = os.O_RDONLY | os.O_NONBLOCK
        if self.root is None:
            return os.open(name, flags | os.O_CLOEXEC, dir_fd=self._stack[-1])
        *folders, file = self._walk(name, flags)
        for fd in folders:
            os.close(fd)
        return file

    def read(self, name: str, limit: int) -> bytes | None:
        """A file's bytes; None when it is missing, not a regular file, above ``limit`` bytes, or cannot be read."""
        with contextlib.suppress(OSError):
            fd = self.open(name)
            try:
                found = os.fstat(fd)
                if stat.S_ISREG(found.st_mode) and found.st_size <= limit:
                    with os.fdopen(os.dup(fd), "rb") as file:
                        return file.read(limit)
            finally:
                os.close(fd)
        return None

    def names(self) -> set[str]:
        """The names in the folder."""
        return set(os.listdir(self._stack[-1]))  # noqa: PTH208  a descriptor, not a path

    def stat(self, name: str) -> os.stat_result:
        fd = self.open(name)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def fingerprint(self) -> str:
        """As the function ``fingerprint``, of the files that ``open`` opens."""
        return _fingerprint(self.stat)

    def close(self) -> None:
        """Idempotent."""
        while self._stack:
            os.close(self._stack.pop())

    def _walk(self, path: str, flags: int) -> list[int]:
        """Open ``path`` from this folder, below the root; descriptors of every folder from the root, and of itself."""
        waiting, links = deque(Path(path).parts), 0
        stack = [os.dup(fd) for fd in self._stack]
        try:
            while waiting:
                part, last = waiting.popleft(), not waiting
                if part == os.pardir:
                    os.close(stack.pop())
                    if not stack:
                        raise _outside_error(path)
                    continue
                kind = flags if last else os.O_RDONLY | os.O_DIRECTORY
                try:
                    stack.append(os.open(part, kind | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stack[-1]))
                    continue
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
                        raise
                    target = _read_link(part, stack[-1], error)
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                if Path(target).is_absolute():
                    target = self._below_root(target)
                    while len(stack) > 1:
                        os.close(stack.pop())
                waiting.extendleft(reversed(Path(target).parts))
        except BaseException:
            for fd in stack:
                os.close(fd)
            raise
        return stack

    def _below_root(self, target: str) -> str:
        """An absolute link target as a path relative to the root. It is walked like any other path."""
        assert self.root is not None
        real = Path(os.path.realpath(target))
        if not real.is_relative_to(self.root):
            raise _outside_error(target)
        return str(real.relative_to(self.root))


def _read_link(name: str, folder: int, error: OSError) -> str:
    """The target of the link ``name``; raises ``error`` when it is not a link."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        raise error from None


def _outside_error(path: str) -> OSError:
    return OSError(errno.EXDEV, "a link leads out of the folder of adapters", path)
