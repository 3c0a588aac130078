"""``AdapterRegistry``: the adapters that are registered while a server runs, with versions, aliases and pins.

A name has versions: ``support@7`` is one of them, ``support`` and ``support@latest`` are the one registered last. What
is registered without a version has no ``@``. An alias is another name for one adapter or, by weights, for several; it
may have the name of an adapter, and then decides which version that name means. With a ``path`` all of it is in one
SQLite file, written before a change counts, so that the next server has it, however this one ended.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from truffula.errors import AdapterExists, ConfigError, ErrorInfo, InvalidRequest, TruffulaError
from truffula.types import AdapterRef

if TYPE_CHECKING:
    import sqlite3

LATEST = "latest"
MAX_TARGETS = 64
FORMAT = 1
"""Of the file's tables."""
CONTENT = "@sha:"
"""Between a name and the generation that the adapter must have."""
_CONTENT = re.compile(r"[0-9a-f]{12,64}")
_VERSION = re.compile(r"[A-Za-z0-9][\w.+-]{0,127}", re.ASCII)
_TABLES = """
CREATE TABLE IF NOT EXISTS adapters (
    position INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, version TEXT NOT NULL, ref BLOB NOT NULL,
    created REAL NOT NULL, UNIQUE (name, version)
);
CREATE TABLE IF NOT EXISTS aliases (name TEXT PRIMARY KEY, alias BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS pins (name TEXT PRIMARY KEY);
"""
_ADD = (
    "INSERT INTO adapters (name, version, ref, created) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (name, version) DO UPDATE SET ref = excluded.ref, created = excluded.created"
)


class Registered(msgspec.Struct, frozen=True):
    """One version of an adapter; ``created`` is the Unix time of its registration."""

    ref: AdapterRef
    created: float


class Alias(msgspec.Struct, frozen=True, kw_only=True):
    """Another name. ``targets`` are names of adapters, not of aliases, with their weights.

    Of its requests ``shadow_percent`` are also sent to ``shadow``, whose answers are discarded.
    """

    name: str
    targets: dict[str, float]
    shadow: str | None = None
    shadow_percent: float = 100.0

    def choose(self, key: str) -> str:
        """The target for a request with ``key``: always the same while the targets and their weights are.

        The point in [0, 1) is the first 8 bytes of the SHA-256 of ``name``, a line feed and ``key``, as a big-endian
        number over 2**64; the targets share that interval by their weights, in their order.
        """
        names = list(self.targets)
        left = point(self.name, key) * sum(self.targets.values())
        for name in names[:-1]:
            left -= self.targets[name]
            if left < 0:
                return name
        return names[-1]

    def shadows(self, key: str) -> bool:
        """Whether a request with ``key`` is one of those that are also sent to ``shadow``."""
        return self.shadow is not None and point(f"{self.name}\nshadow", key) * 100 < self.shadow_percent


def point(name: str, key: str) -> float:
    digest = hashlib.sha256(f"{name}\n{key}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_name(name: str) -> tuple[str, str]:
    """Name and version ("": none) of what is registered as ``name``. Raises ``InvalidRequest``."""
    base, at, version = name.partition("@")
    if at and (not base or version == LATEST or not _VERSION.fullmatch(version)):
        raise InvalidRequest(
            f"{name[:80]!r} is not NAME@VERSION: a version has 1 to 128 letters, digits and . _ + - after one @, "
            f"begins with a letter or a digit and is not {LATEST!r}.",
            param="name",
        )
    return base, version


def split_content(name: str) -> tuple[str, str]:
    """Name and generation ("": any) of NAME@sha:GENERATION, of which at least 12 digits must be given. Raises
    ``InvalidRequest``.
    """
    base, mark, generation = name.partition(CONTENT)
    if mark and not (base and _CONTENT.fullmatch(generation)):
        raise InvalidRequest(
            f"{name[:80]!r} is not NAME@sha:GENERATION: a generation is given by the first 12 to 64 of its hexadecimal "
            "digits, in lower case.",
            param="model",
        )
    return base, generation


class AdapterRegistry:
    """See the module. Thread-safe: readers see whole changes, writers wait for each other.

    Raises ``ConfigError`` when the file cannot be used, or another server uses it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._db = None if path is None else _open(path)
        self._adapters: dict[str, MappingProxyType[str, Registered]] = {}
        self._aliases: dict[str, Alias] = {}
        self._pins: set[str] = set()
        if self._db is not None:
            try:
                self._read(self._db)
            except (self._db.Error, msgspec.MsgspecError) as error:
                self._db.close()
                raise _unusable(path, str(error)) from error

    def _read(self, db: sqlite3.Connection) -> None:
        for name, version, ref, created in db.execute(
            "SELECT name, version, ref, created FROM adapters ORDER BY position"
        ):
            self._set(name, version, Registered(msgspec.json.decode(ref, type=AdapterRef), created))
        for name, alias in db.execute("SELECT name, alias FROM aliases"):
            self._aliases[name] = msgspec.json.decode(alias, type=Alias)
        self._pins = {name for (name,) in db.execute("SELECT name FROM pins")}

    def _write(self, text: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Execute ``text`` for each of ``rows`` in one transaction, which is on disk when this returns.

        Raises ``TruffulaError`` (``store_failed``) when it cannot be written; nothing has changed then.
        """
        if self._db is None:
            return
        try:
            with self._db:
                self._db.executemany(text, rows)
        except self._db.Error as error:
            info = ErrorInfo(code="store_failed", message=f"The registered adapters cannot be written: {error}.")
            raise TruffulaError.from_info(info) from error

    def _set(self, name: str, version: str, one: Registered) -> None:
        self._adapters[name] = MappingProxyType({**self.versions(name), version: one})

    # What is registered

    def names(self) -> list[str]:
        """The names of adapters, without versions, and of aliases."""
        return list({*self._adapters, *self._aliases})

    def versions(self, name: str) -> MappingProxyType[str, Registered]:
        """The versions of an adapter, the last registered last."""
        return self._adapters.get(name, MappingProxyType({}))

    def owns(self, name: str) -> bool:
        """Whether ``name``, up to an ``@``, is registered, so that what follows is one of its versions or nothing."""
        return name.partition("@")[0] in self._adapters

    def find(self, name: str) -> AdapterRef | None:
        """The adapter that ``name`` means, aliases aside: NAME, NAME@VERSION or NAME@latest."""
        base, at, version = name.partition("@")
        versions = self.versions(base)
        if not versions or (at and version not in (LATEST, *versions)) or (at and not version):
            return None
        return versions[version if at and version != LATEST else next(reversed(versions))].ref

    def alias(self, name: str) -> Alias | None:
        return self._aliases.get(name)

    def aliases(self) -> list[Alias]:
        """All aliases by name."""
        return [self._aliases[name] for name in sorted(self._aliases)]

    def aliases_of(self, name: str) -> list[str]:
        """The names of the aliases one of whose targets is ``name``, a version of it, or, where ``name`` is the only
        version of an adapter, that adapter.
        """
        base, at, version = name.partition("@")
        if at and list(self.versions(base)) == [version]:
            name = base
        return [one.name for one in self.aliases() if any(_is_of(name, target) for target in _targets(one))]

    def is_pinned(self, name: str) -> bool:
        return name in self._pins

    def pins(self) -> list[str]:
        """The names of adapters that stay in memory."""
        return sorted(self._pins)

    # Changes

    def add(self, refs: Iterable[AdapterRef], *, replace: bool = True) -> None:
        """Register adapters under their names, all of them or none. One of the same name and version is replaced, or,
        without ``replace``, raises ``AdapterExists``.
        """
        now = time.time()
        rows = [(*split_name(ref.name), Registered(ref, now)) for ref in refs]
        with self._lock:
            taken = next((one.ref.name for n, v, one in rows if v in self.versions(n)), None)
            if taken is not None and not replace:
                raise AdapterExists(f"{taken[:80]!r} is already registered.", param="name")
            self._write(_ADD, ((n, v, msgspec.json.encode(one.ref), one.created) for n, v, one in rows))
            for name, version, one in rows:
                self._set(name, version, one)

    def remove(self, name: str) -> list[AdapterRef]:
        """Remove NAME with all versions, or NAME@VERSION; returns what was removed."""
        base, at, version = name.partition("@")
        with self._lock:
            versions = dict(self.versions(base))
            gone = [v for v in versions if not at or v == version]
            self._write("DELETE FROM adapters WHERE name = ? AND version = ?", [(base, v) for v in gone])
            removed = [versions.pop(v).ref for v in gone]
            if versions:
                self._adapters[base] = MappingProxyType(versions)
            else:
                self._adapters.pop(base, None)
        return removed

    def set_alias(self, alias: Alias) -> None:
        with self._lock:
            self._write("INSERT OR REPLACE INTO aliases VALUES (?, ?)", [(alias.name, msgspec.json.encode(alias))])
            self._aliases = {**self._aliases, alias.name: alias}

    def remove_alias(self, name: str) -> bool:
        """Remove an alias; whether there was one."""
        with self._lock:
            self._write("DELETE FROM aliases WHERE name = ?", [(name,)])
            found = name in self._aliases
            self._aliases = {key: alias for key, alias in self._aliases.items() if key != name}
        return found

    def set_pin(self, name: str, pinned: bool) -> None:
        """Record whether the adapter ``name`` stays in memory, also after a restart."""
        with self._lock:
            self._write(
                "INSERT OR IGNORE INTO pins VALUES (?)" if pinned else "DELETE FROM pins WHERE name = ?", [(name,)]
            )
            self._pins = self._pins | {name} if pinned else self._pins - {name}

    def close(self) -> None:
        with self._lock:
            if self._db is not None:
                self._db.close()


def _targets(alias: Alias) -> list[str]:
    return [*alias.targets, *([alias.shadow] if alias.shadow is not None else [])]


def _is_of(name: str, target: str) -> bool:
    return target == name or target.partition("@")[0] == name


def _open(path: Path) -> sqlite3.Connection:
    """The database, its tables made. In exclusive mode: what is in memory must be what is in the file."""
    import sqlite3  # only with --state-dir

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        db = sqlite3.connect(path, timeout=1.0, check_same_thread=False)
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, FORMAT):
            raise sqlite3.DatabaseError(f"its format is {found}, not {FORMAT}")
        db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
    except (sqlite3.Error, OSError) as error:
        raise _unusable(path, "another server uses it" if "locked" in str(error) else str(error)) from error
    return db


def _unusable(path: Path | None, why: str) -> ConfigError:
    text = f"The registered adapters in {path} cannot be used: {why}. --state-dir names another folder."
    return ConfigError(text, param="state_dir")
