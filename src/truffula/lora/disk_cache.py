"""``DiskCache``: the files of fetched adapters, by content, for all engines of this machine and after a restart.

    entries/ID/       the files of one adapter; ID is the hash of their names and bytes, so that damage is noticed
    sources/KEY       which entry a source had, by which marks (``Stamp``); no name, URL or credential is written
    scratch/…         downloads that are not finished; one without a lock was left by a killed process

An entry appears by one rename, complete. A reader holds a shared lock of the entry's folder (``flock``), and an entry
is evicted under an exclusive one, least recently used first: time of use is the folder's mtime. Changes of the cache
are made one at a time, under the lock of the cache's folder. The bytes counted are those of the entries' files and of
unfinished downloads, whose files have their full size from the start where it is known.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from truffula.lora.staging import remove_abandoned

_SOURCES = ".sources"
"""A file in an entry: the keys of the sources that had it, one in a line. Not part of its content."""


class Stamp(msgspec.Struct, frozen=True):
    """What identifies the state of a file at its source: an ETag, a commit or a time. ``size``: bytes, if known."""

    mark: str
    size: int | None = None


class CachedSource(msgspec.Struct, frozen=True):
    """A source as it was last seen. ``checked``: the fingerprint of the load that last compared it by the operator's
    right; None when only clients with credentials of their own have shown that they may read it.
    """

    entry: str
    stamps: dict[str, Stamp]
    checked: str | None = None


@dataclass(frozen=True)
class Scratch:
    """A folder for one download, and the descriptor that locks it."""

    folder: Path
    fd: int


def content_id(folder: Path) -> str:
    """The hash of the names and bytes of an entry's files. Raises ``OSError``."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != _SOURCES:
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class DiskCache:
    """See the module. ``limit``: bytes of entries at most; 0: nothing is kept. ``damaged``: entries that were removed.

    ``OSError`` is raised where the folder cannot be written to. Nothing else is raised for what others do to the cache
    meanwhile: what cannot be read is not there.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._entries, self._sources, self._scratch = (folder / name for name in ("entries", "sources", "scratch"))
        self._limit = limit
        self.damaged: list[str] = []

    def find(self, key: str) -> CachedSource | None:
        """What is known of a source."""
        try:
            return msgspec.json.decode((self._sources / key).read_bytes(), type=CachedSource)
        except (OSError, msgspec.DecodeError):
            return None

    @contextlib.contextmanager
    def open(self, entry: str) -> Iterator[Path | None]:
        """The folder of an entry, which stays while the block runs; None when it is not there or is damaged.

        Costs one pass over the files. A damaged entry is removed.
        """
        path = self._entries / entry
        with contextlib.ExitStack() as stack:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_SH)
                here = path.stat().st_ino == os.fstat(fd).st_ino  # else it was evicted before it was locked
                sound = here and content_id(path) == entry
                if sound:
                    os.utime(fd)
            except OSError:
                here, sound = False, False
            if here and not sound:
                self.damaged.append(entry)
                with self._locked():
                    self._remove(path)
            yield path if sound else None

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Scratch]:
        """A new folder to download to, locked by this process. It is removed after the block unless it was stored."""
        self._scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self._scratch.iterdir():
            remove_abandoned(left)
        hidden = Path(tempfile.mkdtemp(prefix=".", dir=self._folder))
        fd = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            path = hidden.rename(self._scratch / hidden.name.removeprefix("."))  # locked before others may find it
            try:
                yield Scratch(path, fd)
            finally:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            os.close(fd)

    def store(self, key: str, stamps: Mapping[str, Stamp], checked: str | None, scratch: Scratch) -> tuple[str, Path]:
        """Make a scratch folder an entry, and that the source's. Returns the entry's id, and where the files are.

        One that does not fit stays where it is. It is not evicted before the ``scratch`` block ends.
        """
        folder = scratch.folder
        entry = content_id(folder)
        nbytes = _nbytes(folder)
        if nbytes > self._limit:
            return entry, folder
        with self._locked():
            target = self._entries / entry
            self._entries.mkdir(exist_ok=True, mode=0o700)
            if not target.is_dir():
                self._make_room()
                folder.rename(target)
                fcntl.flock(scratch.fd, fcntl.LOCK_SH)  # from here on others may read it
                folder = target
            else:
                os.utime(target)
            self._note(key, CachedSource(entry, dict(stamps), checked))
        return entry, folder

    def note(self, key: str, source: CachedSource) -> None:
        """Record when a source was compared with its entry."""
        with self._locked():
            self._note(key, source)

    def nbytes(self) -> int:
        """The bytes of all entries."""
        return sum(_nbytes(path) for path in self._listed())

    def _note(self, key: str, source: CachedSource) -> None:
        known = self.find(key)
        self._sources.mkdir(exist_ok=True, mode=0o700)
        fresh = self._sources / f".{uuid.uuid4().hex}"
        fresh.write_bytes(msgspec.json.encode(source))
        fresh.replace(self._sources / key)
        if known is None or known.entry != source.entry:
            with (self._entries / source.entry / _SOURCES).open("a") as file:
                file.write(f"{key}\n")

    def _listed(self) -> list[Path]:
        return list(self._entries.iterdir()) if self._entries.is_dir() else []

    def make_room(self) -> None:
        """Evict entries until the rest fits beside the unfinished downloads."""
        with self._locked():
            self._make_room()

    def _make_room(self) -> None:
        """``make_room``. An entry that is being read stays, and downloads are not ended, so both may exceed the limit;
        a download that will not be kept, as it is larger than the limit, does not count.
        """
        sized = sorted((path.stat().st_mtime_ns, _nbytes(path), path) for path in self._listed())
        unfinished = map(_nbytes, self._scratch.iterdir())
        used = sum(size for _, size, _ in sized) + sum(size for size in unfinished if size <= self._limit)
        for _, size, path in sized:
            if used <= self._limit:
                return
            used -= size if self._evict(path) else 0

    def _evict(self, path: Path) -> bool:
        """Remove an entry unless a process reads it."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            self._remove(path)
            return True
        finally:
            os.close(fd)

    def _remove(self, path: Path) -> None:
        """Move an entry out of sight in one step, then delete it, and what refers to it."""
        try:
            keys = (path / _SOURCES).read_text().split()
        except OSError:
            keys = []
        self._scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        gone = self._scratch / f"evicted-{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):  # another engine was faster
            path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        for key in keys:
            source = self.find(key)
            if source is not None and source.entry == path.name:
                (self._sources / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _nbytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir() if path.name != _SOURCES)
    except OSError:
        return 0
