"""``ResponseStore`` against a dict, and what it does with bad files and sudden ends."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from truffula.server import response_store
from truffula.server.response_store import STALE_S, ResponseStore, StoredResponse, StoreFailed, default_file

LARGE = 2**40
ROW = 512  # what the store adds to a row's own bytes


def row(response_id="resp_a", tenant="", *, created=0.0, size=10, **more):
    return StoredResponse(
        id=response_id, tenant=tenant, created=created, input=b"x" * size, body=b"", output=b"", **more
    )


def run(work):
    return asyncio.run(work)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "responses.db"


def opened(path, **more):
    return ResponseStore(path, **{"max_bytes": LARGE, "max_age_s": 1e9, "clock": lambda: 1.0, **more})


IDS = st.sampled_from([f"resp_{n}" for n in range(8)])


class StoreMachine(RuleBasedStateMachine):
    """The store, opened again now and then, is a dict of what fits and is young."""

    max_bytes, max_age_s = 5 * (ROW + 50), 100.0

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = 1000.0
        self.rows = {}
        self.store = self.open()

    def open(self):
        path = Path(self.folder.name) / "responses.db"
        return ResponseStore(path, max_bytes=self.max_bytes, max_age_s=self.max_age_s, clock=lambda: self.now)

    @rule(
        response_id=IDS, tenant=st.sampled_from("ab"), size=st.integers(1, 100), events=st.integers(0, 60),
        previous=st.none() | IDS,
    )  # fmt: skip
    def put(self, response_id, tenant, size, events, previous):
        made = row(response_id, tenant, created=self.now, size=size, events=b"e" * events, previous=previous)
        kept = run(self.store.put(made))
        self.rows = {key: old for key, old in self.rows.items() if old.created > self.now - self.max_age_s}
        self.rows.pop(response_id, None)
        self.rows[response_id] = made
        while sum(ROW + len(one.input) + len(one.events) for one in self.rows.values()) > self.max_bytes:
            del self.rows[next(iter(self.rows))]
        assert kept == (response_id in self.rows)
        self.now += 1.0

    @rule(response_id=IDS, tenant=st.sampled_from("ab"))
    def delete(self, response_id, tenant):
        own = response_id in self.rows and self.rows[response_id].tenant == tenant
        assert run(self.store.delete(tenant, response_id)) == own
        if own:
            del self.rows[response_id]

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def open_again(self):
        self.store.close()
        self.store = self.open()

    @invariant()
    def equal(self):
        async def read():
            rows = {(n, tenant): await self.store.get(tenant, f"resp_{n}") for n in range(8) for tenant in "ab"}
            return rows, {n: await self.store.history("a", f"resp_{n}") for n in range(8)}

        rows, chains = run(read())
        young = {key: one for key, one in self.rows.items() if one.created > self.now - self.max_age_s}
        for (n, tenant), found in rows.items():
            expected = young.get(f"resp_{n}")
            assert found == (expected if expected is not None and expected.tenant == tenant else None)
        for n, found in chains.items():
            ids, at = [], f"resp_{n}"
            while at in young and young[at].tenant == "a" and at not in ids:
                ids.insert(0, at)
                at = young[at].previous
            if at not in ids:  # a circle, which no client can make
                expected = [at, *ids] if ids and at is not None else ids
                assert [one if isinstance(one, str) else one.id for one in found] == expected

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)


def test_the_file_is_its_owners_alone_and_made_when_needed(path):
    store = opened(path)
    assert not path.exists()
    assert run(store.put(row()))
    assert path.stat().st_mode & 0o777 == 0o600
    store.close()


@pytest.mark.parametrize("content", [b"no database" * 200, b"SQLite format 3\0" + b"\xff" * 4000], ids=["text", "head"])
def test_a_file_that_is_no_database_is_put_aside(path, content, caplog):
    path.parent.mkdir()
    path.write_bytes(content)
    store = opened(path)
    assert run(store.put(row())) and run(store.get("", "resp_a")) is not None
    store.close()
    (aside,) = path.parent.glob("responses.db.unreadable-*")
    assert aside.read_bytes() == content
    assert aside.name in caplog.text


def test_a_file_of_another_version_is_put_aside(path):
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    store = opened(path)
    assert run(store.put(row()))
    store.close()
    assert list(path.parent.glob("responses.db.unreadable-*"))


def test_pages_damaged_later_are_an_error_with_the_file_s_name(path):
    store = opened(path)
    for n in range(50):
        run(store.put(row(f"resp_{n}", size=2000)))
    store.close()
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half:] = b"\xa5" * (len(content) - half)
    path.write_bytes(content)
    store = opened(path)
    with pytest.raises(StoreFailed, match=r"responses\.db"):
        for n in range(50):
            run(store.get("", f"resp_{n}"))
    store.close()


def test_a_folder_that_cannot_be_written_is_an_error_with_the_file_s_name(tmp_path):
    (tmp_path / "file").write_text("")
    store = opened(tmp_path / "file" / "responses.db")
    with pytest.raises(StoreFailed, match=r"responses\.db"):
        run(store.put(row()))
    store.close()


def test_calls_wait_together_for_a_lock(path, monkeypatch):
    """A hundred calls while another process has the file locked: one wait for all of them, not one each."""
    monkeypatch.setattr(response_store, "LOCK_WAIT_S", 1.0)

    async def main():
        store = opened(path)
        assert await store.put(row())
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            async with asyncio.timeout(50):
                ended = await asyncio.gather(*(store.put(row(f"resp_{n}")) for n in range(100)), return_exceptions=True)
            assert {type(one) for one in ended} == {StoreFailed}
            assert (await store.get("", "resp_a")).id == "resp_a"
            other.execute("ROLLBACK")
        assert await store.put(row("resp_b"))
        store.close()

    run(main())


def test_a_response_that_another_server_deleted_stays_deleted(path):
    async def main():
        first, second = opened(path), opened(path)
        await first.put(row(finished=False))
        assert await second.delete("", "resp_a")
        assert not await first.finish(row())
        assert await first.get("", "resp_a") is None
        await first.put(row(finished=False))
        assert await first.finish(row()) and (await second.get("", "resp_a")).finished
        first.close()
        second.close()

    run(main())


def test_a_row_larger_than_the_store_is_not_kept(path):
    store = opened(path, max_bytes=2000)
    assert run(store.put(row("resp_small")))
    assert not run(store.put(row("resp_large", size=3000)))
    assert run(store.get("", "resp_large")) is None
    store.close()


def test_an_unfinished_row_that_nobody_touches_is_lost(path):
    now = [1000.0]
    store = opened(path, clock=lambda: now[0])
    run(store.put(row(finished=False)))
    now[0] += STALE_S - 1
    assert not run(store.get("", "resp_a")).finished
    run(store.touch(["resp_a"]))
    now[0] += STALE_S - 1
    assert not run(store.get("", "resp_a")).finished
    now[0] += 2
    assert run(store.get("", "resp_a")).finished
    store.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from truffula.server.response_store import ResponseStore, StoredResponse
store = ResponseStore(Path(sys.argv[1]), max_bytes=2**40, max_age_s=1e12)
async def main():
    n = 0
    while True:
        body = b"%d" % n
        await store.put(StoredResponse(id=f"resp_{n}", tenant="", created=float(n), input=b"x" * 5000, body=body))
        print(n, flush=True)
        n += 1
asyncio.run(main())
"""


def test_a_server_killed_between_writes_leaves_a_sound_file(path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline().strip() != "40":
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().split()]
    store = opened(path)
    for n in range(max([40, *said]) + 1):  # what was announced is there, and whole
        assert run(store.get("", f"resp_{n}")).body == b"%d" % n
    store.close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (total,) = db.execute("SELECT bytes FROM total").fetchone()
        sizes = "sum(512 + length(input) + length(body) + length(output))"
        assert db.execute(f"SELECT {sizes} FROM responses").fetchone() == (total,)


def test_a_user_without_a_home_has_no_default_file(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_file() == tmp_path / "truffula" / "responses.db"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
    with caplog.at_level("INFO"):
        assert default_file() is None
    assert "in memory" in caplog.text
