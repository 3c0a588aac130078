"""Adapters of remote sources in the pool: checked once in a period, and each right by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_bases import llama_sites
from msgspec.structs import replace
from pool_rig import Rig, rig
from source_server import Source, source_server

from truffula.lora.sources import AdapterDirectory
from truffula.testing.adapters import write_tiny_adapter
from truffula.types import AdapterRef

CONFIG = "/a/adapter_config.json"


@pytest.fixture
def source() -> Iterator[Source]:
    with source_server() as made:
        yield made


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path, offline=False, adapter_cache=str(tmp_path / "cache"), adapter_cache_bytes=1 << 20) as made:
        yield made


def ref(source: Source, token: str | None = None, period: int = 0) -> AdapterRef:
    directory = AdapterDirectory(allow_source=(f"{source.url}/*",), allow_credentials=True)
    directory._salt = b"one server"
    found = directory.resolve(f"{source.url}/a", token=token)
    assert found is not None
    return replace(found, fingerprint=str(period))


def put(source: Source, made: Rig, seed: int = 0) -> None:
    source.put("a", write_tiny_adapter(made.folder / f"made{seed}", llama_sites(), seed=seed))


def test_a_hundred_requests_share_one_load(source: Source, made: Rig) -> None:
    put(source, made)
    assert {made.lookup(ref(source)).status for _ in range(100)} == {"loading"}
    made.poll()
    assert {made.lookup(ref(source)).status for _ in range(100)} == {"ready"}
    assert source.bodies().count(CONFIG) == 1 and made.pool.loads.completed == 1


def test_while_it_is_checked_requests_get_what_it_had(source: Source, made: Rig) -> None:
    put(source, made)
    first = made.resident(ref(source))
    assert made.lookup(ref(source, period=1)).generation == first
    made.poll(2)
    assert made.lookup(ref(source, period=1)).generation == first
    assert (made.pool.loads.completed, made.table.num_uploads, len(made.pool.loads)) == (1, 1, 0)
    put(source, made, seed=1)
    assert made.lookup(ref(source, period=2)).generation == first
    made.poll()
    changed = made.lookup(ref(source, period=2)).generation
    assert changed not in (first, None) and made.lookup(ref(source, period=2)).generation == changed


def test_what_the_source_no_longer_gives_is_no_longer_served(source: Source, made: Rig) -> None:
    put(source, made)
    lease = made.pool.retain(made.loaded(ref(source)))
    source.tokens["a"] = "another right"
    assert made.lookup(ref(source, period=1)).status == "ready"  # it is being checked
    made.poll()
    error = made.lookup(ref(source, period=1)).error
    assert error is not None and error.code == "adapter_not_found"
    assert [state.status for state in made.pool.states()] == ["failed", "retired"]  # a request that runs keeps it
    made.pool.release(lease)
    source.tokens.clear()
    made.clock.now += 11  # a failure expires
    made.poll()
    assert made.becomes_ready(ref(source, period=1))


def test_a_source_that_is_down_does_not_end_what_is_loaded(
    tmp_path: Path, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    for cached in (1 << 20, 0):
        with rig(tmp_path, offline=False, adapter_cache=str(tmp_path / "c"), adapter_cache_bytes=cached) as made:
            put(source, made)
            generation = made.resident(ref(source))
            source.status[CONFIG] = 503
            for _ in range(3):
                assert made.lookup(ref(source, period=1)).generation == generation
                made.poll()
            source.status.clear()
    # Without a cache the load fails, and is tried again once the failure has expired: said once in a period.
    with rig(tmp_path, offline=False, adapter_cache=str(tmp_path / "none"), adapter_cache_bytes=0) as made:
        generation = made.resident(ref(source))
        source.status[CONFIG] = 503
        caplog.clear()
        for period in (1, 1, 1, 2):
            assert made.lookup(ref(source, period=period)).generation == generation
            made.poll()
            made.clock.now += 11
            made.poll()
        assert made.pool.loads.failed == 4
        assert [record.getMessage().partition(") ")[2].partition(" (")[0] for record in caplog.records] == [
            "is served as it was, since it cannot be compared with its source"
        ] * 2


def test_each_credential_is_a_right_of_its_own(source: Source, made: Rig) -> None:
    put(source, made)
    source.tokens["a"] = "right"
    generation = made.resident(ref(source, "right"))
    for token in (None, "wrong"):
        assert made.lookup(ref(source, token)).status == "loading"
        made.poll()
        assert made.lookup(ref(source, token)).status == "failed"
    source.tokens["a"] = "other"
    assert made.loaded(ref(source, "other")) == generation and made.table.num_uploads == 1  # equal bytes, one slot
    assert made.lookup(ref(source, "right")).generation == generation  # proven in this period
    assert made.lookup(ref(source, "right", period=1)).status == "loading"  # and not yet in this one
    made.poll()
    assert made.lookup(ref(source, "right", period=1)).status == "failed"


def test_an_error_names_the_adapter_as_its_request_does(source: Source, made: Rig) -> None:
    """Two tenants' names of one source: neither learns the other's."""
    mine, theirs = (replace(ref(source), name=name) for name in ("mine", "theirs/secret"))
    for status, code in ((404, "adapter_not_found"), (503, "adapter_load_failed")):
        source.status[CONFIG] = status
        assert made.lookup(theirs).status == "loading"
        made.poll()
        errors = [made.lookup(one).error for one in (mine, theirs)]
        assert [error and error.code for error in errors] == [code, code]
        assert errors[0] is not None and errors[1] is not None
        assert "'mine'" in errors[0].message and "theirs" not in str(errors[0])
        assert errors[1].message == errors[0].message.replace("mine", "theirs/secret")
        made.clock.now += 11
        made.poll()
