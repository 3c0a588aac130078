"""BlockPool under any order of use: nothing is lost or owned twice, and a prefix hit never holds other tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from invariants import check_blocks, check_budget

from truffula.engine.block_store import OWNER
from truffula.engine.blocks import BlockPool
from truffula.engine.budget import MemoryBudget
from truffula.engine.kv_layout import KvLayout
from truffula.engine.prefix import BlockKeys, BoundAdapter

SIZE = 2
WINDOWS = st.sampled_from([(None,), (None, 1), (None, 4), (None, 3, 6), (2,), (5,), (3, 7)])


def layout_of(windows, chunk=3):
    return KvLayout(SIZE, chunk, windows, tuple(10 + g for g in range(len(windows))))


class Holder:
    """What a sequence is to the pool: tokens, of which some are computed, and a table."""

    def __init__(self, pool, salt, tokens):
        self.salt, self.tokens, self.computed = salt, tokens, 0
        self.keys = BlockKeys(salt, (), SIZE)
        self.keys.extend(np.asarray(tokens, np.int32))
        self.table = pool.new_table()


class PoolMachine(RuleBasedStateMachine):
    """Content is modelled apart: what each block of each group really holds, as its owner wrote it."""

    @initialize(num_blocks=st.integers(3, 12), limit=st.integers(2, 20), windows=WINDOWS)
    def begin(self, num_blocks, limit, windows):
        self.layout = layout_of(windows)
        self.budget = MemoryBudget(limit * sum(self.layout.block_bytes))
        self.pool = BlockPool(num_blocks, self.layout, budget=self.budget, release_memory=self.lose)
        self.holders: list[Holder] = []
        self.content: dict[tuple[int, int], tuple] = {}
        self.now = 0.0

    def lose(self, group, blocks):
        """The memory of these blocks is returned: what they held is lost."""
        assert blocks.tolist() == sorted(set(blocks.tolist()))
        for block in blocks.tolist():
            self.content.pop((group, block), None)

    def prefix(self, holder, index):
        return (holder.salt, *holder.tokens[: (index + 1) * SIZE])

    def require_window(self, holder):
        """Every block that the next query reads is there and holds its tokens."""
        for g in range(self.layout.num_groups):
            first = self.layout.first_block(g, holder.computed)
            assert holder.table.first[g] <= first
            for index in range(first, holder.computed // SIZE):
                assert self.content[g, int(holder.table.ids[g][index])] == self.prefix(holder, index)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), tenant=st.sampled_from(["", "x"]))
    def admit(self, tokens, tenant):
        holder = Holder(self.pool, tenant, tokens)
        path = self.pool.match(holder.keys, (len(tokens) - 1) // SIZE)
        self.pool.attach(holder.table, path)
        holder.computed = len(path) * SIZE
        self.require_window(holder)
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), count=st.integers(1, 3))
    def compute(self, data, count):
        holder = data.draw(st.sampled_from(self.holders))
        stop = min(len(holder.tokens), holder.computed + count)
        before = self.pool.num_used(), holder.table.length
        could = self.pool.can_fit(self.pool.growth(holder.table, stop), lambda: 0)
        if not self.pool.extend(holder.table, stop):
            assert not could, "blocks were promised"
            assert before == (self.pool.num_used(), holder.table.length)
            return
        self.require_window(holder)
        for g in range(self.layout.num_groups):
            held = holder.table.num_held()[g]
            assert held <= self.layout.peak_blocks(len(holder.tokens))[g], "more blocks than the layout counts with"
            for index in range(holder.computed // SIZE, -(-stop // SIZE)):
                block = int(holder.table.ids[g][index])
                self.content[g, block] = self.prefix(holder, index)
        holder.computed = stop
        self.pool.register(holder.table, holder.keys, stop)
        check_blocks(self.pool, [holder.table for holder in self.holders])
        self.pool.free_behind(holder.table, stop, self.now)
        self.require_window(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), poisoned=st.booleans())
    def release(self, data, poisoned):
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        if poisoned:
            self.pool.forget(holder.table)
            if holder.table.num_indexed:  # else equal tokens that are found are another holder's
                assert not self.pool.match(holder.keys, len(holder.tokens)), "what was forgotten is found"
        self.pool.release(holder.table, self.now)

    @rule(seconds=st.floats(0, 5))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(nbytes=st.integers(0, 40))
    def another_owner_reserves(self, nbytes):
        if self.budget.reserve("else", nbytes):
            self.budget.release("else", nbytes)

    @invariant()
    def books_are_right(self):
        if hasattr(self, "pool"):
            check_blocks(self.pool, [holder.table for holder in self.holders])
            check_budget(self.budget)

    def teardown(self):
        if hasattr(self, "pool"):
            for holder in self.holders:
                self.pool.release(holder.table, self.now)
            check_blocks(self.pool, [])
            assert self.pool.num_used() == self.pool.used_bytes() == 0
            assert self.budget.used(OWNER) or not self.content, "bytes that hold something are not counted"
            while self.pool.store.oldest() is not None:
                self.pool.store.evict_oldest()
            check_blocks(self.pool, [])
            assert self.budget.total_used() == 0


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def run(pool, tokens, chunk=3, salt="", generation=None, now=0.0, adapter_from=0):
    """A sequence that is computed to its end; its table, still held, and how many tokens the cache gave it."""
    keys = BlockKeys(salt, () if generation is None else (BoundAdapter(generation, acts_from=adapter_from),), SIZE)
    keys.extend(np.asarray(tokens, np.int32))
    table = pool.new_table()
    path = pool.match(keys, (len(tokens) - 1) // SIZE)
    pool.attach(table, path)
    hit = done = len(path) * SIZE
    while done < len(tokens):
        done = min(len(tokens), done + chunk)
        assert pool.extend(table, done)
        pool.register(table, keys, done)
        pool.free_behind(table, done, now)
    return table, hit


@pytest.mark.parametrize("windows", [(None,), (None, 4), (4,)])
def test_a_prefix_is_evicted_from_its_end(windows):
    pool = BlockPool(9, layout_of(windows))
    table, _ = run(pool, range(12), chunk=2)
    pool.release(table, 1.0)
    keys = BlockKeys("", (), SIZE)
    keys.extend(np.arange(12, dtype=np.int32))
    hits = [len(pool.match(keys, 6))]
    while pool.store.oldest() is not None:
        pool.store.evict_oldest()
        hits.append(len(pool.match(keys, 6)))
    assert hits[0] == 6 and hits == sorted(hits, reverse=True) and hits[-1] == 0


def test_equal_content_computed_twice_is_cached_once():
    pool = BlockPool(9, layout_of((None, 4)))
    tables = [pool.new_table(), pool.new_table()]
    keys = BlockKeys("", (), SIZE)
    keys.extend(np.asarray([1, 2, 3, 4], np.int32))
    for done in (2, 4):
        for table in tables:
            assert pool.extend(table, done)
            pool.register(table, keys, done)
            check_blocks(pool, tables)
    for table in tables:
        pool.release(table, 0.0)
    check_blocks(pool, [])
    assert pool.num_cached() == 4 and len(pool.match(keys, 2)) == 2


@settings(max_examples=100, deadline=None, derandomize=True)
@given(WINDOWS, st.integers(1, 30), st.integers(0, 29), st.integers(1, 3))
def test_with_room_for_all_a_hit_is_as_long_as_the_common_prefix(windows, length, common, chunk):
    """Blocks behind a window stay cached while there is room, so another continuation finds the whole prefix."""
    pool = BlockPool(200, layout_of(windows))
    first, _ = run(pool, range(length), chunk)
    common = min(common, length - 1)
    _, hit = run(pool, [*range(common), *range(100, 104)], chunk)
    assert hit == common // SIZE * SIZE
    pool.release(first, 1.0)
    _, hit = run(pool, [*range(common), *range(200, 204)], chunk)
    assert hit == common // SIZE * SIZE


def test_a_hit_needs_the_blocks_of_the_window_only():
    pool = BlockPool(100, layout_of((None, 4)))
    table, _ = run(pool, range(40))
    pool.release(table, 1.0)
    for _ in range(16):  # those behind the window were released first
        pool.store.evict_oldest()
    table, hit = run(pool, [*range(40), 7])
    assert hit == 40
    assert table.num_held() == [21, 2]


def test_a_key_names_salt_and_the_generation_that_acts_in_the_block():
    pool = BlockPool(100, layout_of((None,)))
    run(pool, range(8), generation="ab", salt="c")
    assert run(pool, range(9), generation="ab", salt="c")[1] == 8
    for other in ({"generation": "a", "salt": "bc"}, {"salt": "abc"}, {"generation": "abc"}, {}):
        assert run(pool, range(9), **other)[1] == 0


def test_blocks_before_the_position_from_which_an_adapter_acts_are_the_bases():
    pool = BlockPool(100, layout_of((None,)))
    run(pool, range(9))
    assert run(pool, range(9), generation="a", adapter_from=5)[1] == 4
    assert run(pool, range(9), generation="a", adapter_from=5)[1] == 8
    assert run(pool, range(9), generation="b", adapter_from=6)[1] == 6


@settings(max_examples=200, deadline=None)
@given(WINDOWS, st.integers(1, 9), st.integers(1, 60), st.integers(0, 900), st.integers(1, 40))
def test_the_longest_that_fits_fits_and_one_block_more_does_not(windows, chunk, most, nbytes, num_blocks):
    layout = layout_of(windows, chunk)
    longest = layout.longest(most, nbytes=nbytes, num_blocks=num_blocks)

    def fits(tokens):
        peaks = layout.peak_blocks(tokens)
        return layout.nbytes(peaks) <= nbytes and max(peaks) <= num_blocks

    assert longest <= most and fits(longest)
    assert longest == most or not fits(longest + 1)
