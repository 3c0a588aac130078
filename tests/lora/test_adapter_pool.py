"""AdapterPool: generations, leases, one budget, one load for many waiters, failures that expire."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from lora_bases import judge, llama_sites, pairs
from pool_rig import Rig, cached, rig

from truffula.errors import AdapterLoadError, InsufficientMemory, KernelError
from truffula.lora.pool import MAX_NAMES
from truffula.testing.adapters import write_tiny_adapter
from truffula.types import AdapterRef


def size_of(folder: Path, r: Rig, ref_rank: int = 4) -> int:
    """Bytes the budget is charged for a tiny adapter of this rank."""
    generation = r.loaded(r.write("probe", seed=99, rank=ref_rank))
    nbytes = next(s.nbytes for s in r.pool.states() if s.generation == generation)
    r.pool.unload("probe")
    return nbytes


def test_many_waiters_are_one_load(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        assert [r.want(ref).status for _ in range(50)] == ["loading"] * 50
        r.poll()
        assert {r.want(ref).generation for _ in range(50)} == {judge(tmp_path / "a").generation}
        assert r.pool.loads == 1
        r.check()


def test_a_load_and_its_warnings_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with rig(tmp_path) as r, caplog.at_level("INFO", "truffula.lora.queue"):
        write_tiny_adapter(r.folder / "a", llama_sites(), alpha_pattern={"nowhere": 3})
        generation = r.loaded(r.ref("a"))
        r.poll(3)
        r.want(r.ref("broken"))
        r.poll(3)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert generation[:12] in lines[0] and "nowhere" in lines[1] and "adapter_not_found" in lines[2]


def test_a_lease_is_a_slot_with_the_adapters_own_tensors(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        generation = r.loaded(r.write("a", seed=7))
        lease = r.pool.acquire(generation)
        assert lease is not None and lease.generation == generation
        for mine, other in zip(
            pairs(r.table.images[lease.slot].sites()), pairs(judge(tmp_path / "a").sites), strict=True
        ):
            assert np.array_equal(mine.a, other.a) and np.array_equal(mine.b, other.b) and mine.scale == other.scale
        r.pool.release(lease)
        r.check()


def test_equal_bytes_under_two_names_share_a_generation(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        first, second = r.loaded(r.write("a")), r.loaded(r.write("b"))
        assert first == second and r.pool.resident == 1
        assert [s.name for s in r.pool.states()] == ["a", "b"]
        assert r.pool.unload("a")
        assert r.want(r.ref("b", "0/4")).generation == second
        assert r.pool.unload("b") and r.pool.resident == 0
        r.check()


def test_a_changed_folder_is_a_new_generation_and_running_ones_keep_theirs(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        old = r.loaded(r.write("a", seed=1))
        lease = r.pool.acquire(old)
        assert lease is not None
        new = r.loaded(r.write("a", seed=2))
        assert new != old
        assert {(s.generation, s.status) for s in r.pool.states()} == {(old, "retired"), (new, "resident")}
        assert r.budget.used("adapters") == sum(i.nbytes for i in r.table.images.values())
        assert r.table.images[lease.slot].generation == old
        r.pool.release(lease)  # the last lease of a retired generation
        assert [s.generation for s in r.pool.states()] == [new]
        r.check()


def test_a_touched_folder_of_the_same_bytes_keeps_its_generation(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write("a")
        assert r.loaded(r.ref("a", "then")) == r.loaded(r.ref("a", "later"))
        # A request that still carries the former fingerprint is served from the same load.
        assert r.want(r.ref("a", "then")).status == "ready" and r.pool.loads == 2
        r.check()


def test_idle_adapters_give_way_oldest_first_and_come_back(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = 2 * nbytes
        refs = [r.write(name, seed=n) for n, name in enumerate("abc")]
        generations = []
        for ref in refs:
            r.clock.now += 100
            generations.append(r.loaded(ref))
        r.poll()
        assert {i.generation for i in r.table.images.values()} == set(generations[1:])
        assert r.pool.evictions == 1
        r.clock.now += 100
        assert r.loaded(refs[0]) == generations[0]
        assert {i.generation for i in r.table.images.values()} == {generations[0], generations[2]}
        r.check()


def test_leased_and_pinned_adapters_stay(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = 2 * nbytes
        a, b, c = (r.write(name, seed=n) for n, name in enumerate("abc"))
        r.pool.pin(a)
        pinned = r.loaded(a)
        lease = r.pool.acquire(r.loaded(b))
        assert lease is not None
        third = r.loaded(c)  # read, but there is no room for it
        assert r.pool.acquire(third) is None
        assert {s.name: s.status for s in r.pool.states()} == {"a": "resident", "b": "resident", "c": "ready"}
        r.pool.release(lease)
        taken = r.pool.acquire(third)
        assert taken is not None and pinned in {i.generation for i in r.table.images.values()}
        r.check()


def test_a_pinned_adapter_stays_pinned_through_a_reload(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        first = r.write("a", seed=1)
        r.pool.pin(first)
        r.loaded(first)
        r.loaded(r.write("a", seed=2))
        assert [s.pinned for s in r.pool.states()] == [True]
        assert r.pool.oldest() is None
        r.pool.unload("a")
        assert r.pool.states() == []


def test_an_adapter_larger_than_the_budget_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = nbytes - 1
        ref = r.write("a")
        r.want(ref)
        r.poll()
        want = r.want(ref)
        assert want.error is not None and want.error.code == InsufficientMemory.code
        assert want.error.data == {"requested_bytes": nbytes, "limit_bytes": nbytes - 1}


def test_a_failed_load_tells_all_its_waiters_and_expires(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.ref("a")
        r.want(ref)
        r.poll()
        errors = {r.want(ref).error.message for _ in range(5)}  # type: ignore[union-attr]
        assert len(errors) == 1 and "does not exist" in errors.pop()
        assert [s.status for s in r.pool.states()] == ["failed"]
        r.write("a")
        assert r.want(ref).status == "failed"
        r.clock.now += 10.5
        assert r.loaded(ref)
        assert r.pool.failures == 1


def test_what_the_executable_refuses_fails_and_gives_its_bytes_back(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        r.table.refuse.add(judge(tmp_path / "a").generation)
        r.want(ref)
        r.poll()
        want = r.want(ref)
        assert want.error is not None and want.error.code == KernelError.code
        assert r.budget.used("adapters") == 0
        r.check()


def test_a_held_generation_outlives_eviction_and_its_source(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = nbytes
        old = r.loaded(r.write("a", seed=1))
        r.pool.hold(old)  # somebody was preempted
        r.write("a", seed=2)  # and meanwhile the folder changed
        r.clock.now += 100
        other = r.loaded(r.write("b", seed=3))
        lease = r.pool.acquire(other)
        assert lease is not None and r.pool.acquire(old) is None
        r.clock.now += 100
        r.poll()
        r.pool.release(lease)
        back = r.pool.acquire(old)
        assert back is not None and r.table.images[back.slot].generation == old
        r.pool.release(back)
        r.pool.let_go(old)
        r.check()


def test_what_nobody_holds_or_wants_is_forgotten_once_evicted(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        generation = r.loaded(r.write("a"))
        r.clock.now += 100
        assert r.pool.evict_oldest() > 0
        assert r.pool.states() == []
        with pytest.raises(AdapterLoadError, match="no longer loaded"):
            r.pool.acquire(generation)
        r.check()


def test_what_was_wanted_a_moment_ago_survives_eviction_within_the_spare_room(tmp_path: Path) -> None:
    with rig(tmp_path, spare=0) as none, rig(tmp_path) as some:
        for r, left in ((none, 0), (some, 1)):
            r.loaded(r.write("a"))
            r.pool.evict_oldest()
            assert len(r.pool.states()) == left
            r.check()
        some.clock.now += 10
        some.poll()
        assert some.pool.states() == []


def test_no_load_begins_while_spare_images_exceed_their_room(tmp_path: Path) -> None:
    with rig(tmp_path, spare=1) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = nbytes
        lease = r.pool.acquire(r.loaded(r.write("a", seed=1)))
        assert lease is not None
        waiting = r.loaded(r.write("b", seed=2))  # has no room: spare
        r.pool.hold(waiting)
        late = r.write("c", seed=3)
        assert r.want(late).status == "loading"
        r.poll(5)
        assert r.want(late).status == "loading" and r.pool.loads == 3  # the probe, a, b
        r.pool.release(lease)
        taken = r.pool.acquire(waiting)
        assert taken is not None
        r.poll(2)
        assert r.want(late).status == "ready"
        r.check()


def crowded(r: Rig) -> str:
    """Memory for one adapter, which is leased, and another that is spare and fills its room. Its generation."""
    r.budget.limit = size_of(r.folder, r)
    assert r.pool.acquire(r.loaded(r.write("a", seed=1))) is not None
    return r.loaded(r.write("b", seed=2))


def test_a_spare_image_that_nobody_came_for_holds_up_no_load(tmp_path: Path) -> None:
    with rig(tmp_path, spare=1) as r:
        crowded(r)
        late = r.write("c", seed=3)
        assert r.want(late).status == "loading"
        r.poll(3)  # without any time passing
        assert r.want(late).status == "ready"
        r.check()


def test_a_spare_image_that_is_let_go_of_holds_up_no_load(tmp_path: Path) -> None:
    with rig(tmp_path, spare=1) as r:
        held = crowded(r)
        r.pool.hold(held)
        late = r.write("c", seed=3)
        assert r.want(late).status == "loading"
        r.poll(3)
        assert r.want(late).status == "loading" and r.pool.acquire(held) is None
        r.pool.let_go(held)
        r.poll(3)
        assert r.want(late).status == "ready"
        r.check()


def test_a_finished_load_is_there_for_who_waited_though_others_wait_for_room(tmp_path: Path) -> None:
    with rig(tmp_path, spare=1) as r:
        crowded(r)
        refs = [r.write(f"x{n}", seed=10 + n) for n in range(20)]  # more than are begun at a time
        taken = []
        for _ in range(100):
            taken += [ref for ref in refs if ref not in taken and r.want(ref).status == "ready"]
            r.poll()
        assert taken == refs  # each was there for its asker, in order, and was read once
        assert r.pool.loads == 3 + len(refs)


def test_a_claimed_image_stays_until_disclaimed(tmp_path: Path) -> None:
    with rig(tmp_path, spare=1) as r:
        ref = r.ref("b", "2/4")
        r.pool.claim(ref)
        claimed = crowded(r)
        late = r.write("c", seed=3)
        r.want(late)
        r.clock.now += 100
        r.poll(5)
        assert r.want(late).status == "loading" and r.want(ref).generation == claimed
        r.pool.disclaim(ref)
        r.poll(5)
        assert r.want(late).status == "ready"
        r.check()


def test_a_claimed_adapter_outlives_its_eviction(tmp_path: Path) -> None:
    with rig(tmp_path, spare=0) as r:
        ref = r.write("a")
        r.pool.claim(ref)
        generation = r.loaded(ref)
        r.clock.now += 100
        assert r.pool.evict_oldest() > 0
        r.poll()
        assert r.want(ref).generation == generation
        r.pool.disclaim(ref)
        r.clock.now += 100
        r.poll()
        assert r.pool.states() == []


def test_a_pinned_adapter_that_never_fits_does_not_end_all_loading(tmp_path: Path) -> None:
    with rig(tmp_path, spare=1) as r:
        small, large = size_of(tmp_path, r, 1), size_of(tmp_path, r, 30)
        first, second, late = r.write("a", seed=1, rank=30), r.write("b", seed=2, rank=30), r.write("c", rank=1)
        r.budget.limit = large + small
        for ref in (first, second):
            r.pool.pin(ref)
            r.loaded(ref)
        r.clock.now += 100
        r.poll()
        assert [(s.name, s.status) for s in r.pool.states()] == [("a", "resident"), ("b", "ready")]
        assert r.want(late).status == "loading"
        r.poll(3)
        assert [(s.name, s.status) for s in r.pool.states()] == [("a", "resident"), ("c", "resident")]
        r.check()


def test_an_unload_while_loading_is_a_cancel(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        r.want(ref)
        assert r.pool.unload("a") and not r.pool.unload("a")
        r.poll(2)
        assert r.pool.states() == [] and r.pool.loads == 0
        assert r.want(ref).status == "loading"


def test_a_slow_source_does_not_hold_up_the_other_kind(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        refs = [r.ref(f"none/x{n}") for n in range(20)]
        for ref in refs:
            r.want(ref)
        assert r.pool._queue.in_flight == 8
        r.poll(30)
        assert {r.want(ref).status for ref in refs} == {"failed"}


@pytest.mark.slow
def test_a_thousand_loads_and_unloads_leave_nothing(tmp_path: Path) -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    def mappings() -> int:
        return sum("truffula-spool" in line for line in Path("/proc/self/maps").read_text().splitlines())

    with rig(tmp_path) as r:
        gc.collect()  # what earlier tests left to the collector must not close in our middle
        before = descriptors()
        for n in range(1000):
            r.write("a", seed=n % 7, rank=1 + n % 5)
            lease = r.pool.acquire(r.loaded(r.ref("a", str(n))))
            assert lease is not None
            r.pool.release(lease)
            r.pool.unload("a")
        assert descriptors() == before and mappings() == 0 and r.spooled() == []
        assert r.pool.states() == [] and r.budget.total_used() == 0


def test_names_of_one_key_are_bounded(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        generation = r.loaded(ref)
        for i in range(10 * MAX_NAMES):
            again = AdapterRef(name=f"a{i}", locator=ref.locator, fingerprint=ref.fingerprint)
            assert r.want(again).generation == generation
        assert len(r.pool.states()) == MAX_NAMES


def test_the_commit_of_a_load_is_logged_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "truffula.lora.queue")
    commit = "5" * 40
    with rig(tmp_path) as made:
        made.write("a")
        cached(tmp_path / "hub", "org/a", tmp_path / "a", commit)
        made.loaded(AdapterRef(name="org/a", kind="hub", locator="org/a"))
        (state,) = made.pool.states()
        assert state.commit == commit
        assert f"org/a@{commit}" in caplog.text
