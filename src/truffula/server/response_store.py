"""``ResponseStore``: the responses that clients continue or retrieve later, in one SQLite file or in memory.

All of its work happens in one thread, off the event loop. A row belongs to the tenant that made it and is invisible to
others. The oldest rows go when the file holds more than ``max_bytes``, and each after ``max_age_s``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from truffula.environment import state_folder
from truffula.errors import ConfigError, TruffulaError

T = TypeVar("T")
log = logging.getLogger(__name__)

VERSION = 1
"""Of the tables. A file with another one is replaced."""
MAX_CHAIN = 10_000
"""Responses of one conversation."""
STALE_S = 60.0
"""An unfinished row that its server has not touched for so long is lost."""
TOUCH_S = 15.0
"""How often a server touches its unfinished rows."""
LOCK_WAIT_S = 5.0
"""How long a call waits in all, with those before it, while another process has the file locked."""
_TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created REAL NOT NULL, touched REAL NOT NULL, previous TEXT,
    finished INTEGER NOT NULL, input BLOB NOT NULL, body BLOB NOT NULL, output BLOB NOT NULL, events BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_age ON responses (created);
CREATE TABLE IF NOT EXISTS total (bytes INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM total);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON responses BEGIN
    UPDATE total SET bytes = bytes + 512 + length(new.input) + length(new.body) + length(new.output)
        + length(new.events);
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON responses BEGIN
    UPDATE total SET bytes = bytes - 512 - length(old.input) - length(old.body) - length(old.output)
        - length(old.events);
END;
"""
_CHAIN = """
WITH RECURSIVE chain (id, previous, input, output, depth) AS (
    SELECT id, previous, input, output, 1 FROM responses WHERE id = ?1 AND tenant = ?2 AND created > ?3
    UNION ALL
    SELECT r.id, r.previous, r.input, r.output, chain.depth + 1 FROM chain JOIN responses r
        ON r.id = chain.previous WHERE r.tenant = ?2 AND r.created > ?3 AND chain.depth < ?4
) SELECT id, previous, input, output FROM chain ORDER BY depth
"""


class StoreFailed(TruffulaError):
    """The file of stored responses cannot be read or written."""

    code = "store_failed"


class StoredResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One response. ``input`` and ``output`` are JSON arrays of items, ``body`` the response object without output.

    ``events`` are the frames of a background response that was streamed. ``finished`` False: it is still generated.
    """

    id: str
    tenant: str
    created: float
    input: bytes
    body: bytes
    output: bytes = b"[]"
    previous: str | None = None
    events: bytes = b""
    finished: bool = True


class ResponseStore:
    """See the module. ``path`` None keeps the responses in memory. The file is opened when it is first needed.

    Every method raises ``StoreFailed`` when the file cannot be used.
    """

    def __init__(
        self, path: Path | None, *, max_bytes: int, max_age_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._path, self._max_bytes, self._max_age_s, self._clock = path, max_bytes, max_age_s, clock
        self._db: sqlite3.Connection | None = None
        self._wait_s = 0.0  # for a lock, of the call that runs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="truffula-responses")

    async def put(self, row: StoredResponse) -> bool:
        """Add ``row``, or replace the one of its id; False where it is larger than the store."""
        return await self._run(lambda: self._put(row))

    async def finish(self, row: StoredResponse) -> bool:
        """Replace the row of its id; False where there is none any more, as another server may have deleted it."""
        return await self._run(lambda: self._get(row.tenant, row.id) is not None and self._put(row))

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """The row, None where the tenant has none of this id."""
        return await self._run(lambda: self._get(tenant, response_id))

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Remove the row; False where the tenant has none of this id."""
        return await self._run(lambda: self._delete(tenant, response_id))

    async def history(self, tenant: str, response_id: str) -> list[StoredResponse | str]:
        """The responses that end with ``response_id``, oldest first; only ``id``, ``input`` and ``output`` are filled.

        An id in place of the first one is that of a response that is not stored any more; [] where the last is not.
        """
        return await self._run(lambda: self._history(tenant, response_id))

    async def touch(self, ids: list[str]) -> None:
        """Say that the unfinished rows ``ids`` are still generated."""
        await self._run(lambda: self._touch(ids))

    def close(self) -> None:
        """Waits for what was begun."""
        self._thread.submit(self._close)
        self._thread.shutdown(wait=True)

    async def _run(self, work: Callable[[], T]) -> T:
        asked = time.monotonic()

        def timed() -> T:
            self._wait_s = max(0.0, asked + LOCK_WAIT_S - time.monotonic())
            if self._db is not None:
                self._db.execute(f"PRAGMA busy_timeout = {int(self._wait_s * 1000)}")
            return work()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, timed)
        except (sqlite3.Error, OSError) as error:
            raise StoreFailed(
                f"The stored responses cannot be used ({error}). They are in {self._path or 'memory'}; the option "
                "response_store chooses another place."
            ) from error

    def _put(self, row: StoredResponse) -> bool:
        now, db = self._clock(), self._opened()
        with db:
            db.execute("DELETE FROM responses WHERE id = ? OR created <= ?", (row.id, now - self._max_age_s))
            db.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(row.id, row.tenant, row.created, now, row.previous, row.finished),
                    *(row.input, row.body, row.output, row.events),
                ),
            )
            while db.execute("SELECT bytes FROM total").fetchone()[0] > self._max_bytes:
                db.execute(
                    "DELETE FROM responses WHERE id IN (SELECT id FROM responses ORDER BY created, rowid LIMIT 1)"
                )
            return db.execute("SELECT 1 FROM responses WHERE id = ?", (row.id,)).fetchone() is not None

    def _get(self, tenant: str, response_id: str) -> StoredResponse | None:
        now = self._clock()
        found = (
            self._opened()
            .execute(
                "SELECT created, touched, previous, finished, input, body, output, events FROM responses "
                "WHERE id = ? AND tenant = ? AND created > ?",
                (response_id, tenant, now - self._max_age_s),
            )
            .fetchone()
        )
        if found is None:
            return None
        created, touched, previous, finished, given, body, output, events = found
        return StoredResponse(
            id=response_id, tenant=tenant, created=created, previous=previous, input=given, body=body, output=output,
            events=events, finished=bool(finished) or touched < now - STALE_S,
        )  # fmt: skip

    def _delete(self, tenant: str, response_id: str) -> bool:
        with self._opened() as db:
            return db.execute("DELETE FROM responses WHERE id = ? AND tenant = ?", (response_id, tenant)).rowcount > 0

    def _history(self, tenant: str, response_id: str) -> list[StoredResponse | str]:
        since = self._clock() - self._max_age_s
        rows = self._opened().execute(_CHAIN, (response_id, tenant, since, MAX_CHAIN)).fetchall()
        chain: list[StoredResponse | str] = [
            StoredResponse(
                id=row[0], tenant=tenant, created=0.0, previous=row[1], input=row[2], body=b"", output=row[3]
            )
            for row in reversed(rows)
        ]
        first = rows[-1][1] if rows else None
        return chain if first is None else [first, *chain]

    def _touch(self, ids: list[str]) -> None:
        with self._opened() as db:
            db.executemany("UPDATE responses SET touched = ? WHERE id = ?", [(self._clock(), one) for one in ids])

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = self._open()
        return self._db

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            return _connect(":memory:", 0.0)
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # only its owner reads it
        try:
            return _connect(self._path, self._wait_s)
        except sqlite3.OperationalError:
            raise  # locked, not writable: the file itself may be sound
        except sqlite3.DatabaseError as error:
            aside = self._path.with_name(f"{self._path.name}.unreadable-{int(self._clock())}")
            log.warning("%s is not a database of stored responses (%s); it is now %s", self._path, error, aside.name)
            self._path.rename(aside)
            for extra in ("-wal", "-shm"):
                self._path.with_name(self._path.name + extra).unlink(missing_ok=True)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            return _connect(self._path, self._wait_s)

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def default_file() -> Path | None:
    """The file where no option names one; None where this user has no folder for it, as in many containers."""
    try:
        path = state_folder() / "responses.db"
        existing = next(folder for folder in path.parents if folder.exists())
        writable = os.access(existing, os.W_OK | os.X_OK)
    except (ConfigError, OSError) as error:
        log.info("stored responses are kept in memory: %s", error)
        return None
    if not writable:
        log.info("stored responses are kept in memory: %s cannot be written (--response-store-file)", existing)
    return path if writable else None


def _connect(where: Path | str, wait_s: float) -> sqlite3.Connection:
    """A connection whose tables exist. Waits ``wait_s`` for a lock.

    Raises ``sqlite3.DatabaseError`` for a file that is not such a database.
    """
    db = sqlite3.connect(where, timeout=wait_s, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a loss of power may lose the last responses, never the file
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, VERSION):
            raise sqlite3.DatabaseError(f"its version is {found}, not {VERSION}")
        db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        db.execute("SELECT bytes FROM total").fetchone()
    except BaseException:
        db.close()
        raise
    return db
