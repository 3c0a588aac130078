"""BlockPool under any order of use: nothing lost, nothing owned twice, and a prefix hit never holds other tokens."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from truffula.engine.blocks import OWNER, BlockPool
from truffula.engine.budget import MemoryBudget
from truffula.engine.prefix import PrefixChain, namespace
from truffula.errors import ConfigError

SIZE = 2
BYTES = 10


def weak(data: bytes) -> bytes:
    """A digest of four values: collisions are the rule."""
    return bytes([hashlib.blake2b(data, digest_size=1).digest()[0] % 4])


class Holder:
    """What a sequence is to the pool: a chain of tokens and references on its blocks."""

    def __init__(self, root: bytes, tokens: list[int]) -> None:
        self.root = root
        self.tokens = tokens
        self.chain = PrefixChain(root, SIZE, weak)
        self.chain.extend(np.asarray(tokens, np.int32))
        self.blocks: list[int] = []
        self.parent: int | bytes | None = root
        self.registered = 0


class PoolMachine(RuleBasedStateMachine):
    """Content is modelled apart: what each block really holds, written by its owner before it is registered."""

    @initialize(num_blocks=st.integers(3, 12), limit=st.integers(2, 12))
    def begin(self, num_blocks, limit):
        self.budget = MemoryBudget(limit * BYTES)
        self.pool = BlockPool(num_blocks, SIZE, budget=self.budget, block_bytes=BYTES)
        self.holders: list[Holder] = []
        self.content: dict[int, tuple] = {}
        self.now = 0.0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8), tenant=st.sampled_from(["", "x"]))
    def come(self, tokens, tenant):
        holder = Holder(namespace(None, tenant), tokens)
        hits = self.pool.match(holder.chain, len(tokens) // SIZE)
        for index, entry in enumerate(hits):
            expected = (holder.root, *tokens[: (index + 1) * SIZE])
            assert self.content[entry.block] == expected, "a hit on a block that holds something else"
        self.pool.take([entry.block for entry in hits])
        holder.blocks = [entry.block for entry in hits]
        holder.registered = len(hits)
        holder.parent = hits[-1].serial if hits else holder.root
        before = self.pool.available(), self.pool.num_used()
        fresh = self.pool.allocate(-(-len(tokens) // SIZE) - len(hits))
        if fresh is None:
            assert self.pool.num_used() == before[1]
            self.pool.release(holder.blocks, self.now)
            return
        assert 0 not in fresh
        for index, block in enumerate(fresh, start=len(hits)):
            self.content[block] = (holder.root, *tokens[: (index + 1) * SIZE])
        holder.blocks += fresh
        self.holders.append(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def register_next(self, data):
        holder = data.draw(st.sampled_from(self.holders))
        index = holder.registered
        if holder.parent is None or index >= len(holder.chain):
            return
        entry = self.pool.register(holder.chain, index, holder.parent, holder.blocks[index], self.now)
        if entry is None:
            holder.parent = None
            return
        assert self.content[entry.block] == self.content[holder.blocks[index]]
        holder.blocks[index] = entry.block
        holder.parent = entry.serial
        holder.registered += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), poisoned=st.booleans())
    def go(self, data, poisoned):
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        if poisoned:
            self.pool.forget(holder.blocks)
            for other in self.holders:
                if set(other.blocks) & set(holder.blocks):
                    other.parent = None
        self.pool.release(holder.blocks, self.now)

    @rule(seconds=st.floats(0, 5))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(nbytes=st.integers(0, 40))
    def somebody_else_wants_memory(self, nbytes):
        if self.budget.reserve("else", nbytes):
            self.budget.release("else", nbytes)

    @invariant()
    def books_are_right(self):
        if hasattr(self, "pool"):
            self.pool.check([holder.blocks for holder in self.holders])
            self.budget.check()

    def teardown(self):
        if hasattr(self, "pool"):
            for holder in self.holders:
                self.pool.release(holder.blocks, self.now)
            self.pool.check([])
            assert self.pool.num_used() == 0
            assert self.budget.used(OWNER) == BYTES * self.pool.num_cached()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_chain_is_evicted_from_its_tail():
    pool = BlockPool(5, SIZE)
    chain = PrefixChain(b"", SIZE)
    chain.extend(np.asarray([1, 2, 3, 4, 5, 6, 7, 8], np.int32))
    blocks = pool.allocate(4)
    parent: int | bytes = b""
    for index, block in enumerate(blocks):
        parent = pool.register(chain, index, parent, block, 0.0).serial
    pool.release(blocks, 1.0)
    for left in (3, 2, 1, 0):
        pool.evict_oldest()
        assert len(pool.match(chain, 4)) == left


def test_equal_content_computed_twice_is_kept_once():
    pool = BlockPool(5, SIZE)
    chain = PrefixChain(b"", SIZE)
    chain.extend(np.asarray([1, 2], np.int32))
    (first,), (second,) = pool.allocate(1), pool.allocate(1)
    assert pool.register(chain, 0, b"", first, 0.0).block == first
    assert pool.register(chain, 0, b"", second, 0.0).block == first
    pool.check([[first], [first]])
    assert pool.num_free() == 3


def test_a_salt_cannot_imitate_a_generation():
    roots = [namespace("ab", "c"), namespace("a", "bc"), namespace(None, "abc"), namespace("abc", "")]
    assert len(set(roots)) == 4


def test_a_pool_of_only_scratch_is_refused():
    with pytest.raises(ConfigError):
        BlockPool(1, 16)
