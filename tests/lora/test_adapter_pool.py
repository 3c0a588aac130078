"""AdapterPool: generations, leases, one budget, one load for many waiters, failures that expire."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from lora_bases import llama_sites, pairs, validate
from msgspec.structs import replace
from pool_rig import Rig, cached, rig

from truffula.errors import AdapterLoadError, InsufficientMemory, KernelError, ShuttingDown
from truffula.lora.pool import MAX_NAMES, RETRY_POLL_S, ROOM_TIMEOUT_S, AdapterStatus
from truffula.testing.adapters import write_tiny_adapter
from truffula.types import AdapterRef, Credential


def size_of(folder: Path, r: Rig, ref_rank: int = 4) -> int:
    """Bytes the budget is charged for a tiny adapter of this rank."""
    generation = r.resident(r.write("probe", seed=99, rank=ref_rank))
    nbytes = next(s.nbytes for s in r.pool.states() if s.generation == generation)
    r.pool.evict_oldest()
    r.unload(r.ref("probe"))
    return nbytes


def test_many_waiters_are_one_load(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        assert [r.lookup(ref).status for _ in range(50)] == ["loading"] * 50
        r.poll()
        assert {r.lookup(ref).generation for _ in range(50)} == {validate(tmp_path / "a").generation}
        assert r.pool.loads.completed == 1
        r.check()


def test_a_load_and_its_warnings_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with rig(tmp_path) as r, caplog.at_level("INFO", "truffula.lora.loads"):
        write_tiny_adapter(r.folder / "a", llama_sites(), alpha_pattern={"nowhere": 3})
        generation = r.loaded(r.ref("a"))
        r.poll(3)
        r.lookup(r.ref("broken"))
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
            pairs(r.table.images[lease.slot].sites()), pairs(validate(tmp_path / "a").sites), strict=True
        ):
            assert np.array_equal(mine.a, other.a) and np.array_equal(mine.b, other.b) and mine.scale == other.scale
        r.pool.release(lease)
        r.check()


def test_equal_bytes_under_two_names_share_a_generation(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        first, second = r.resident(r.write("a")), r.resident(r.write("b"))
        assert first == second and r.pool.resident == 1
        assert [s.name for s in r.pool.states()] == ["a", "b"]
        assert r.unload(r.ref("a"))
        assert r.lookup(r.ref("b", "0/4")).generation == second
        assert r.unload(r.ref("b")) and r.pool.resident == 0
        r.check()


def test_a_changed_folder_is_a_new_generation_and_running_ones_keep_theirs(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        old = r.loaded(r.write("a", seed=1))
        lease = r.pool.acquire(old)
        assert lease is not None
        new = r.resident(r.write("a", seed=2))
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
        assert r.lookup(r.ref("a", "then")).status == "ready" and r.pool.loads.completed == 2
        r.check()


def test_idle_adapters_give_way_oldest_first_and_come_back(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = 2 * nbytes
        refs = [r.write(name, seed=n) for n, name in enumerate("abc")]
        generations = []
        for ref in refs:
            r.clock.now += 100
            generations.append(r.resident(ref))
        r.poll()
        assert {i.generation for i in r.table.images.values()} == set(generations[1:])
        assert r.pool.evictions == 2  # the probe of its size too
        r.clock.now += 100
        assert r.resident(refs[0]) == generations[0]
        assert {i.generation for i in r.table.images.values()} == {generations[0], generations[2]}
        r.check()


def test_leased_and_pinned_adapters_stay(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = 2 * nbytes
        a, b, c = (r.write(name, seed=n) for n, name in enumerate("abc"))
        assert r.load(a, pinned=True).error is None
        pinned = r.loaded(a)
        lease = r.pool.acquire(r.loaded(b))
        assert lease is not None
        third = r.loaded(c)  # read, but there is no room for it
        assert r.pool.acquire(third) is None and not r.pool.is_pending([third])
        assert {s.name: s.status for s in r.pool.states()} == {"a": "resident", "b": "resident", "c": "ready"}
        r.pool.release(lease)
        taken = r.pool.acquire(third)
        assert taken is not None and pinned in {i.generation for i in r.table.images.values()}
        r.check()


def test_a_pinned_adapter_stays_pinned_through_a_reload(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.load(r.write("a", seed=1), pinned=True)
        r.loaded(r.write("a", seed=2))
        r.poll()
        assert [(s.pinned, s.status) for s in r.pool.states()] == [(True, "resident")]
        assert r.pool.oldest() is None
        r.unload(r.ref("a"))
        assert r.pool.states() == []


def test_a_pin_is_of_a_name_and_ends_with_it(tmp_path: Path) -> None:
    """Two names of one folder, of which one is pinned: the other may be unloaded, or mean another folder."""
    with rig(tmp_path) as r:
        mine, other = r.write("a", seed=1), replace(r.write("a", seed=1), name="other")
        r.load(mine, pinned=True)
        r.loaded(other)
        r.unload(other)
        assert [(s.name, s.pinned) for s in r.pool.states()] == [("a", True)]
        r.loaded(replace(other, fingerprint="again"))  # its bytes are read again, by the other name
        r.load(replace(r.write("b", seed=2), name="other"))
        assert [(s.name, s.pinned) for s in r.pool.states()] == [("a", True), ("other", False)]
        r.load(other, pinned=True)
        r.unload(mine)
        assert [(s.name, s.pinned) for s in r.pool.states()] == [("other", True)]
        r.unload(other)
        assert r.pool.states() == []


def test_a_pin_ends_and_a_name_moves_to_another_source(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        a, b = r.write("a", seed=1), r.write("b", seed=2)
        r.load(a, pinned=True)
        assert r.pool.oldest() is None
        r.command("unpin", a).result(0)
        assert r.pool.oldest() is not None and not any(state.pinned for state in r.pool.states())
        r.load(replace(a, name="other"))
        moved = replace(b, name="a")
        r.load(moved)
        assert sorted((s.name, s.generation) for s in r.pool.states()) == [
            ("a", r.loaded(moved)), ("other", r.loaded(replace(a, name="other"))),
        ]  # fmt: skip
        lease = r.pool.retain(r.loaded(moved))
        r.load(a)
        assert {s.status for s in r.pool.states() if s.generation == lease.generation} == {"retired"}
        r.pool.release(lease)
        assert lease.generation not in {s.generation for s in r.pool.states()}
        r.check()


def test_an_adapter_larger_than_the_budget_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = nbytes - 1
        ref = r.write("a")
        answer = r.load(ref)
        for error in (answer.error, r.lookup(ref).error):
            assert error is not None and error.code == InsufficientMemory.code
            assert error.data == {"requested_bytes": nbytes, "limit_bytes": nbytes - 1}
        assert r.pool.resident == 0


def test_a_failed_load_tells_all_its_waiters_and_expires(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.ref("a")
        r.lookup(ref)
        r.poll()
        errors = {r.lookup(ref).error.message for _ in range(5)}  # type: ignore[union-attr]
        assert len(errors) == 1 and "does not exist" in errors.pop()
        assert [s.status for s in r.pool.states()] == ["failed"]
        r.write("a")
        assert r.lookup(ref).status == "failed"
        r.clock.now += 10.5
        assert r.loaded(ref)
        assert r.pool.loads.failed == 1


def test_what_the_executable_refuses_fails_and_gives_its_bytes_back(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        r.table.refuse.add(validate(tmp_path / "a").generation)
        generation = r.loaded(ref)
        with pytest.raises(KernelError):
            r.pool.acquire(generation)
        status = r.lookup(ref)
        assert status.error is not None and status.error.code == KernelError.code
        assert r.budget.used("adapters") == 0
        r.check()


def test_a_held_generation_outlives_eviction_and_its_source(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = nbytes
        old = r.loaded(r.write("a", seed=1))
        kept = r.pool.retain(old)  # its sequence was preempted
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
        r.pool.release(kept)
        r.check()


def test_an_adapter_without_a_lease_is_forgotten_once_evicted(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        generation = r.resident(r.write("a"))
        assert r.pool.evict_oldest() > 0
        assert r.pool.states() == []
        with pytest.raises(AdapterLoadError, match="no longer loaded"):
            r.pool.acquire(generation)
        r.check()


def test_an_image_without_a_lease_or_a_lookup_is_dropped(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        r.loaded(ref)
        r.poll()
        assert r.lookup(ref).status == "ready"
        r.poll(3)
        assert r.pool.states() == [] and r.lookup(ref).status == "loading"


def test_no_load_begins_while_images_without_a_slot_exceed_their_room(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1) as r:
        nbytes = size_of(tmp_path, r)
        r.budget.limit = nbytes
        lease = r.pool.acquire(r.loaded(r.write("a", seed=1)))
        assert lease is not None
        waiting = r.loaded(r.write("b", seed=2))  # has no room
        kept = r.pool.retain(waiting)
        late = r.write("c", seed=3)
        assert r.lookup(late).status == "loading"
        r.poll(5)
        assert r.lookup(late).status == "loading" and r.pool.loads.completed == 3  # the probe, a, b
        r.pool.release(lease)
        taken = r.pool.acquire(waiting)
        assert taken is not None
        assert r.becomes_ready(late)
        r.pool.release(kept)
        r.check()


def crowded(r: Rig) -> str:
    """Memory for one adapter, which is leased, and another that is mapped and fills its room. Its generation."""
    r.budget.limit = size_of(r.folder, r)
    assert r.pool.acquire(r.loaded(r.write("a", seed=1))) is not None
    return r.loaded(r.write("b", seed=2))


def test_an_image_without_a_lease_delays_no_load(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1) as r:
        crowded(r)
        late = r.write("c", seed=3)
        assert r.lookup(late).status == "loading"
        assert r.becomes_ready(late)
        r.check()


def test_an_image_whose_lease_was_released_delays_no_load(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1) as r:
        generation = crowded(r)
        kept = r.pool.retain(generation)
        late = r.write("c", seed=3)
        assert r.lookup(late).status == "loading"
        r.poll(3)
        assert r.lookup(late).status == "loading" and r.pool.acquire(generation) is None
        r.pool.release(kept)
        assert r.becomes_ready(late)
        r.check()


def test_waiting_adapters_take_free_memory_before_they_delay_loads(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1) as r:
        r.budget.limit = 3 * size_of(tmp_path, r)
        refs = [r.write(name, seed=n) for n, name in enumerate("abcd")]
        kept = []
        for ref in refs:
            assert r.becomes_ready(ref)
            kept.append(r.pool.retain(r.loaded(ref)))  # its request waits for a slot in the batch
        assert r.pool.resident == 3
        late = r.write("e", seed=9)
        r.lookup(late)
        r.poll(5)
        assert r.pool.poll_timeout() == RETRY_POLL_S and r.lookup(late).status == "loading"
        for lease in kept:
            r.pool.release(lease)
        assert r.becomes_ready(late)
        r.check()


def test_a_finished_load_is_there_for_its_waiter_though_others_wait_for_room(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1) as r:
        crowded(r)
        refs = [r.write(f"x{n}", seed=10 + n) for n in range(20)]  # more than are begun at a time
        taken = []
        for _ in range(100):
            taken += [ref for ref in refs if ref not in taken and r.lookup(ref).status == "ready"]
            r.poll()
        assert taken == refs  # each was there for its waiter, in order, and was read once
        assert r.pool.loads.completed == 3 + len(refs)


def test_what_a_load_command_waits_for_stays_loaded(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1) as r:
        ref, late = r.ref("b", "2/4"), r.write("c", seed=3)
        crowded(r)
        command = r.command("load", ref)
        r.lookup(late)
        r.clock.now += 10
        r.poll(5)
        assert not command.done() and r.lookup(late).status == "loading"
        assert {s.name: s.status for s in r.pool.states()}["b"] == "ready"
        r.clock.now += ROOM_TIMEOUT_S
        r.poll(5)
        error = command.exception()
        assert isinstance(error, InsufficientMemory) and r.becomes_ready(late)


def test_a_pinned_adapter_that_never_fits_does_not_end_all_loading(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1) as r:
        small, large = size_of(tmp_path, r, 1), size_of(tmp_path, r, 30)
        first, second, late = r.write("a", seed=1, rank=30), r.write("b", seed=2, rank=30), r.write("c", rank=1)
        r.budget.limit = large + small
        assert r.load(first, pinned=True).error is None
        assert r.load(second, pinned=True).error is not None
        r.poll(3)
        assert [(s.name, s.status) for s in r.pool.states()] == [("a", "resident"), ("b", "ready")]
        assert r.lookup(late).status == "loading"
        assert r.becomes_ready(late)
        assert [(s.name, s.status) for s in r.pool.states()] == [("a", "resident"), ("c", "ready")]
        r.check()


def test_at_most_one_adapter_is_uploaded_between_two_polls(tmp_path: Path) -> None:
    """Mapping and giving to the executable happen between two steps: other streams wait for them."""
    with rig(tmp_path) as r:
        refs = [r.write(name, seed=n) for n, name in enumerate("abcd")]
        for ref in refs:
            r.lookup(ref)
        loaded: list[str] = []
        for turn in range(1, 5):
            r.poll()
            loaded = [g for ref in refs if (g := r.lookup(ref).generation) is not None]
            assert len(loaded) == turn
        for generation in loaded:
            r.pool.retain(generation)  # as waiting sequences do
        for turn, generation in enumerate(loaded, 1):
            lease = r.pool.acquire(generation)
            others = [r.pool.acquire(other) for other in loaded if other not in loaded[:turn]]
            assert lease is not None and others == [None] * (4 - turn)
            assert all(r.pool.is_pending([other]) for other in loaded[turn:])
            assert r.table.num_uploads == turn
            r.poll()


def test_an_upload_that_has_not_ended_is_waited_for(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        generation = r.loaded(ref)
        r.table.slow = True
        command = r.command("load", ref)
        for _ in range(3):
            assert r.pool.acquire(generation) is None and r.pool.is_pending([generation])
            assert [s.status for s in r.pool.states()] == ["uploading"] and not command.done()
            assert r.pool.oldest() is None and r.pool.leased_bytes == r.pool.resident_bytes > 0
            assert r.pool.poll_timeout() == RETRY_POLL_S
            r.poll()
        r.table.finish()
        r.poll()
        assert command.result()[0].status == "resident" and r.pool.leased_bytes == 0
        lease = r.pool.acquire(generation)
        assert lease is not None and not r.pool.is_pending([generation])


def test_an_adapter_that_is_unloaded_during_its_upload_is_dropped_after_it(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        r.table.slow = True
        assert r.pool.acquire(r.loaded(ref)) is None
        assert r.unload(ref)
        r.poll()
        assert r.pool.resident == 1 and [s.status for s in r.pool.states()] == ["retired"]
        r.table.finish()
        r.poll()
        assert r.pool.states() == []


def test_a_load_command_of_a_changed_source_that_fails_has_the_error(tmp_path: Path) -> None:
    """The former generation is still resident; that is not what was asked for."""
    with rig(tmp_path) as r:
        assert r.load(r.write("a", seed=1)).error is None
        path = tmp_path / "a" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        answer = r.load(r.ref("a", "broken"))
        assert answer.error is not None and answer.error.code == "adapter_invalid"


def test_closing_ends_commands(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        command = r.command("load", r.write("a"))
        r.pool.close()
        assert isinstance(command.exception(), ShuttingDown)


def test_an_unload_while_loading_is_a_cancel(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        r.lookup(ref)
        assert r.unload(ref) and not r.unload(ref)
        r.poll(2)
        assert r.pool.states() == [] and r.pool.loads.completed == 0
        assert r.lookup(ref).status == "loading"


@pytest.mark.slow
def test_a_thousand_loads_and_unloads_leave_nothing(tmp_path: Path) -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    def mappings() -> int:
        return sum("truffula-staging" in line for line in Path("/proc/self/maps").read_text().splitlines())

    with rig(tmp_path) as r:
        gc.collect()  # what earlier tests left to the collector must not close in our middle
        before = descriptors(), mappings()  # an engine of an earlier test may live
        for n in range(1000):
            r.write("a", seed=n % 7, rank=1 + n % 5)
            lease = r.pool.acquire(r.loaded(r.ref("a", str(n))))
            assert lease is not None
            r.pool.release(lease)
            r.unload(r.ref("a"))
            r.poll()
        assert (descriptors(), mappings()) == before and r.staged() == []
        assert r.pool.states() == [] and r.budget.total_used() == 0


def test_names_of_one_key_are_bounded(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        ref = r.write("a")
        generation = r.loaded(ref)
        for i in range(10 * MAX_NAMES):
            again = AdapterRef(name=f"a{i}", locator=ref.locator, fingerprint=ref.fingerprint)
            assert r.lookup(again).generation == generation
        assert len(r.pool.states()) == MAX_NAMES


def test_the_commit_of_a_load_is_logged_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "truffula.lora.loads")
    commit = "5" * 40
    with rig(tmp_path) as made:
        made.write("a")
        cached(tmp_path / "hub", "org/a", tmp_path / "a", commit)
        made.loaded(AdapterRef(name="org/a", kind="hub", locator="org/a"))
        (state,) = made.pool.states()
        assert state.commit == commit
        assert f"org/a@{commit}" in caplog.text


def test_a_generation_is_found_while_it_is_held_and_only_for_its_own_source(tmp_path: Path) -> None:
    """Also one that is retired, while a sequence has a lease; another source's never is."""
    with rig(tmp_path) as it:
        a, b = it.write("a"), it.write("b", seed=1)
        old, other = it.loaded(a), it.loaded(b)
        lease = it.pool.retain(old)
        new = it.loaded(it.write("a", seed=2))
        now = it.ref("a", "2/4")
        for wanted, found in ((old, old), (old[:12], old), (new, new)):
            assert it.lookup(replace(now, wanted=wanted)) == AdapterStatus("ready", found)
            assert it.pool.is_loaded(replace(now, wanted=wanted))
        for ref, wanted, present in ((now, other, new), (b, old, other), (now, "0" * 12, new)):
            status = it.lookup(replace(ref, wanted=wanted))
            assert status.status == "failed" and status.error is not None
            assert status.error.code == "generation_mismatch" and status.error.data["present"] == present
        proven = replace(now, kind="http", credential=Credential("id", "token"), wanted=old)
        assert it.lookup(proven).status == "loading", "a client's right is proven before anything is served"
        it.pool.release(lease)
        assert it.lookup(replace(now, wanted=old)).status == "failed"
        back = it.write("a")
        again = replace(back, fingerprint="again", wanted=old)
        assert it.lookup(again).status == "loading" and it.loaded(again) == old
        assert it.lookup(replace(again, wanted=new)).status == "failed"
        refused = it.load(again).error
        assert refused is not None and refused.code == "invalid_request"
