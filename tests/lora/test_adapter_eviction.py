"""Which idle adapter is evicted: a scan of adapters used once leaves those that were used again, and nothing stays for
ever.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pool_rig import Rig, rig

from truffula.lora.generations import ONCE_SHARE
from truffula.types import AdapterRef

ROOM = 8


def equal_adapters(made: Rig, count: int) -> list[AdapterRef]:
    """Adapters of one size; the budget holds ``ROOM`` of them, and more mapped ones than there are."""
    refs = [made.write(f"a{seed:03d}", seed, rank=1) for seed in range(count)]
    other = made.write("other", count, rank=1)
    made.resident(other)
    made.budget.limit = ROOM * made.pool.resident_bytes
    made.unload(other)
    return refs


def names(made: Rig) -> set[str]:
    return set(made.pool.resident_names(1000))


def use(made: Rig, ref: AdapterRef) -> None:
    made.clock.now += 1
    made.resident(ref)


def test_a_scan_evicts_none_of_those_that_were_used_again(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1 << 20) as made:
        refs = equal_adapters(made, 40)
        hot, scan = refs[: ROOM - int(ONCE_SHARE * ROOM) - 1], refs[ROOM:]
        for ref in (*hot, *hot):
            use(made, ref)
        for ref in scan:
            use(made, ref)
        assert names(made) >= {ref.name for ref in hot}


def test_adapters_of_yesterday_leave(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1 << 20) as made:
        refs = equal_adapters(made, 3 * ROOM)
        old, new = refs[:ROOM], refs[ROOM:]
        for ref in (*old, *old, *old):
            use(made, ref)
        for ref in new:
            use(made, ref)
            use(made, ref)
        assert names(made).isdisjoint(ref.name for ref in old)


def test_choices_of_one_request_are_one_use(tmp_path: Path) -> None:
    with rig(tmp_path, mapped=1 << 20) as made:
        refs = equal_adapters(made, 2 * ROOM)
        generation = made.loaded(refs[0])
        made.poll()
        leases = [made.pool.acquire(generation) for _ in range(4)]
        for lease in leases:
            assert lease is not None
            made.pool.release(lease)
        for ref in refs[1:]:
            use(made, ref)
        assert refs[0].name not in names(made)


@pytest.mark.parametrize("soon", [True, False])
def test_one_that_comes_back_soon_counts_as_used_again(tmp_path: Path, soon: bool) -> None:
    with rig(tmp_path, mapped=1 << 20) as made:
        refs = equal_adapters(made, 60)
        scan = iter(refs[1:])
        use(made, refs[0])
        for _ in range(ROOM + 1 if soon else 3 * ROOM):
            use(made, next(scan))
        assert refs[0].name not in names(made)
        use(made, refs[0])
        for ref in scan:
            use(made, ref)
        assert (refs[0].name in names(made)) == soon


class EvictionMachine(RuleBasedStateMachine):
    """Against the policy written down plainly: two lists, and what was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self._folder.name), mapped=1 << 20)
        self.refs = equal_adapters(self.rig, 20)
        self.uses: dict[str, int] = {}  # of those that are resident, the least recently used first
        self.dropped: list[str] = []
        self.after: str | None = None

    @rule(number=st.integers(0, 19))
    def use(self, number: int) -> None:
        name = self.refs[number].name
        use(self.rig, self.refs[number])
        before = self.uses.pop(name, None)
        if before is None:
            if len(self.uses) == ROOM:
                self._evict()
            before = int(name in self.dropped)
        self.uses[name] = before + 1

    def _evict(self) -> None:
        once = [name for name, uses in self.uses.items() if uses == 1]
        often = [name for name, uses in self.uses.items() if uses > 1]
        victim = (once if len(once) > ONCE_SHARE * ROOM or not often else often)[0]
        del self.uses[victim]
        self.after = victim

    @invariant()
    def the_same_are_resident(self) -> None:
        assert names(self.rig) == set(self.uses)
        if self.after is not None:  # it may be the one that comes back next
            self.dropped = [*[name for name in self.dropped if name != self.after], self.after][-ROOM:]
            self.after = None

    def teardown(self) -> None:
        self.rig.pool.close()
        self._folder.cleanup()


EvictionMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=40, deadline=None)
TestEvictionMachine = EvictionMachine.TestCase
