"""MemoryBudget under any order of use: never above its limit, idle things go oldest first, others never."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from invariants import check_budget

from truffula.engine.budget import MemoryBudget


class Shelf:
    """A ``Reclaimer`` with entries, some of them idle."""

    def __init__(self, name: str, budget: MemoryBudget, evicted: list[float]) -> None:
        self.name = name
        self.budget = budget
        self.evicted = evicted
        self.idle: list[tuple[float, int]] = []
        self.busy: list[int] = []

    def oldest(self) -> float | None:
        return self.idle[0][0] if self.idle else None

    def evict_oldest(self) -> int:
        stamp, nbytes = self.idle.pop(0)
        self.evicted.append(stamp)
        self.budget.release(self.name, nbytes)
        return nbytes


class BudgetMachine(RuleBasedStateMachine):
    @initialize(limit=st.integers(0, 100), fixed=st.integers(0, 50), own=st.none() | st.integers(0, 120))
    def begin(self, limit, fixed, own):
        self.now = 0.0
        self.evicted: list[float] = []
        self.budget = MemoryBudget(limit)
        self.fixed = fixed if self.budget.reserve("weights", fixed) else 0
        self.shelves = [Shelf(name, self.budget, self.evicted) for name in ("kv", "adapters")]
        for shelf in self.shelves:
            self.budget.register_reclaimer(shelf.name, shelf)
        if own is not None:
            self.budget.set_limit("adapters", own)

    @rule(which=st.integers(0, 1), nbytes=st.integers(1, 60))
    def take(self, which, nbytes):
        shelf = self.shelves[which]
        del self.evicted[:]
        busy = self.fixed + sum(sum(s.busy) for s in self.shelves)
        own = [stamp for stamp, _ in shelf.idle]
        stamps = sorted(stamp for s in self.shelves for stamp, _ in s.idle)
        own_limit = self.budget.limit_of(shelf.name)
        took = self.budget.reserve(shelf.name, nbytes)
        fits = busy + nbytes <= self.budget.limit and sum(shelf.busy) + nbytes <= own_limit
        assert took == fits, "it fits exactly when what is in use leaves room"
        count = len(self.evicted)
        first = range(count + 1) if own_limit < self.budget.limit else [0]  # so many of its own, for its own limit
        orders = [own[:n] + [stamp for stamp in stamps if stamp not in own[:n]][: count - n] for n in first]
        assert self.evicted in orders, "idle entries were evicted out of order"
        if took:
            shelf.busy.append(nbytes)

    @rule(which=st.integers(0, 1), data=st.data())
    def rest(self, which, data):
        shelf = self.shelves[which]
        if shelf.busy:
            self.now += 1
            shelf.idle.append((self.now, shelf.busy.pop(data.draw(st.integers(0, len(shelf.busy) - 1)))))

    @rule(which=st.integers(0, 1))
    def drop(self, which):
        shelf = self.shelves[which]
        if shelf.busy:
            self.budget.release(shelf.name, shelf.busy.pop())

    @invariant()
    def sums_hold(self):
        if hasattr(self, "budget"):
            check_budget(self.budget)
            for shelf in self.shelves:
                assert self.budget.used(shelf.name) == sum(shelf.busy) + sum(n for _, n in shelf.idle)


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_a_release_of_more_than_was_reserved_is_our_mistake():
    budget = MemoryBudget(10)
    assert budget.reserve("kv", 4)
    with pytest.raises(ValueError, match="releases 5 of 4"):
        budget.release("kv", 5)


def test_what_can_never_fit_evicts_nothing():
    budget = MemoryBudget(10)
    shelf = Shelf("kv", budget, [])
    budget.register_reclaimer("kv", shelf)
    assert budget.reserve("kv", 6)
    shelf.idle.append((1.0, 6))
    assert not budget.reserve("adapters", 11)
    assert shelf.idle
