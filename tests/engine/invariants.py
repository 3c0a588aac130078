"""What holds for the books of an engine between any two calls. Each function raises AssertionError when it does not.

They read private fields: the books are what no caller may see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items

from truffula.engine.block_store import OWNER
from truffula.engine.blocks import BlockPool, BlockTable
from truffula.engine.budget import MemoryBudget
from truffula.engine.engine import Engine
from truffula.engine.prefix import NO_BLOCK, PrefixIndex
from truffula.engine.queues import WaitingQueues
from truffula.engine.running import RunningBatch
from truffula.engine.scheduler import Scheduler


def check_engine(engine: Engine) -> None:
    check_scheduler(engine._scheduler)
    check_budget(engine._budget)
    engine._adapters.check()


def check_budget(budget: MemoryBudget) -> None:
    """The sums are right."""
    assert all(used >= 0 for used in budget._used.values()), budget._used
    assert budget.total_used() <= budget.limit, (budget._used, budget.limit)
    assert all(budget.used(owner) <= limit for owner, limit in budget._limits.items()), (budget._used, budget._limits)


def check_scheduler(scheduler: Scheduler) -> None:
    """No sequence is lost; no block, slot or lease has no owner or two."""
    waiting, running = list(scheduler._waiting), list(scheduler._running)
    assert len(running) <= scheduler._limits.most_running
    assert not set(waiting) & set(running), "a sequence waits and runs"
    compiling = [s for sequences in scheduler._compiling.values() for s in sequences.values()]
    assert {s.request_id: s for s in [*waiting, *running, *compiling]} == scheduler._by_id, "a sequence is lost"
    assert len(scheduler._by_id) == len(waiting) + len(running) + len(compiling), "a sequence is in two places"
    assert all(scheduler._compiling.values()) and scheduler._compiling.keys() <= scheduler._grammars._pending.keys()
    for sequence in compiling:
        assert sequence.grammar is not None and sequence.matcher is None and sequence.seq_slot is None
    for sequence in [*waiting, *running]:
        assert (sequence.matcher is None) == (sequence.grammar is None), "a sequence without its matcher"
        assert sequence.matcher is None or sequence.num_wanted <= sequence.num_known, "planned before its mask is known"
    for sequence in waiting:
        assert not sequence.table.length and not sequence.leases and sequence.seq_slot is None
        assert sequence.num_computed == 0 and sequence.num_known == sequence.num_tokens, sequence.serial
    _check_waiting(scheduler._waiting)
    _check_running(scheduler._running)


def _check_waiting(waiting: WaitingQueues) -> None:
    assert waiting._count == sum(len(queue) for queue in waiting._queues.values())
    for key, queue in waiting._queues.items():
        assert queue and all(sequence.key == key for sequence in queue.values())
        assert list(queue) == sorted(queue), "a queue is out of order"
        assert waiting._unbound.get(key, 0) == sum(not sequence.ready for sequence in queue.values())
    heads = {key: next(iter(queue.values())) for key, queue in waiting._queues.items()}
    assert waiting._ready == {key: head for key, head in heads.items() if head.ready}
    assert waiting._loading.keys() <= waiting._unbound.keys() <= waiting._queues.keys()


def _check_running(batch: RunningBatch) -> None:
    running = batch._by_age
    assert [s.serial for s in running] == sorted(s.serial for s in running)
    assert set(running) == {s for s in batch._slots if s is not None}
    for sequence in running:
        assert sequence.seq_slot is not None and batch._slots[sequence.seq_slot] is sequence
        assert sequence.ready and sequence.loaded_leases.keys() == set(sequence.key), "it runs without an adapter"
        held = [(lease.generation, lease.slot) for lease in sequence.leases]
        assert [generation for generation, _ in held] == [one.generation for one in sequence.adapters]
        assert sequence.slots == tuple(
            (slot, one.weight) for (_, slot), one in zip(held, sequence.adapters, strict=True)
        )
        assert sequence.num_committed <= sequence.num_computed <= sequence.num_wanted
        assert sequence.num_computed <= sequence.table.capacity, "computed tokens without blocks"
        assert sequence.num_tokens - sequence.num_known <= len(batch._unfinished)
    later = [holding for holdings in batch._unfinished.values() for holding in holdings]
    check_blocks(batch._blocks, [one.table for one in (*running, *later)])
    holders = [*running, *later]
    leases = sum(len(holder.leases) for holder in holders)
    assert sum({s.generation: s.leases for s in batch._adapters.states()}.values()) == leases, "leases differ"
    slots = [holder.seq_slot for holder in holders if holder.seq_slot is not None]
    assert sorted(batch._free_slots + slots) == list(range(len(batch._slots))), "a slot is lost or owned twice"


def check_blocks(pool: BlockPool, tables: Items[BlockTable]) -> None:
    """No block or state row is lost, owned twice or miscounted. ``tables`` are all that hold some."""
    for g, group in enumerate(pool.store.groups):
        free, cached = {*group.free, *group.unused}, set(group.cached)
        used = {block for block, refs in enumerate(group.refs) if refs}
        assert len(free) == len(group.free) + len(group.unused), "a block is free twice"
        assert not (free & cached or free & used or cached & used), (free & cached, free & used, cached & used)
        assert free | cached | used == set(range(1, len(group.refs))), "a block is lost"
        assert all(block in group.nodes for block in cached), "a cached block is not indexed"
        assert not free & group.nodes.keys(), "a free block is indexed"
        assert all(node.attached and node.blocks[g] == block for block, node in group.nodes.items())
        stamps = list(group.cached.values())
        assert stamps == sorted(stamps), "the LRU is out of order"
        counts = Counter(block for table in tables for block in _held(table, g))
        assert all(counts.get(block, 0) == refs for block, refs in enumerate(group.refs)), "references differ"
    _check_index(pool._index)
    indexed = sum(block != NO_BLOCK for node in pool._index.root.below() for block in node.blocks)
    assert indexed == sum(len(group.nodes) for group in pool.store.groups), "an indexed block without its node"
    for table in tables:
        for view, ids, first in zip(table.views, table.ids, table.first, strict=True):
            assert (view == ids[: table.length]).all()
            assert (view[:first] == NO_BLOCK).all() and (view[first:] > 0).all()
    if pool.store.budget is not None:
        committed = [(len(group.refs) - 1 - len(group.unused)) * group.nbytes for group in pool.store.groups]
        assert pool.store.budget.used(OWNER) == sum(committed)


def _held(table: BlockTable, g: int) -> list[int]:
    if g < len(table.ids):
        return table.held(g)
    assert table.states is not None
    return table.states.held()


def _check_index(index: PrefixIndex) -> None:
    for node in index.root.below():
        assert node.attached
        assert node is index.root or node.children or any(block != NO_BLOCK for block in node.blocks), "an empty node"
        assert all(child.parent is node and child.key == key for key, child in node.children.items())
