"""RunningBatch: the running sequences and what they hold: a slot of the executable, an adapter lease and KV blocks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from truffula.engine.blocks import BlockPool
from truffula.engine.limits import EngineLimits
from truffula.engine.sequence import AdapterKey, BlockTables, Sequence
from truffula.lora.pool import AdapterLease, AdapterPool

_age = attrgetter("serial")


@dataclass(frozen=True)
class _Holding:
    """What is to be released."""

    blocks: list[int]
    seq_slot: int | None = None
    lease: AdapterLease | None = None


class RunningBatch:
    """Part of the scheduler: the scheduler decides, the batch takes and releases slots, leases and blocks.

    What an unfinished step may read or write is not released: the holdings of a sequence that ends or is preempted stay
    until the last step that was planned with it is finished.
    """

    def __init__(
        self, limits: EngineLimits, num_slots: int, max_adapters: int, blocks: BlockPool, adapters: AdapterPool
    ) -> None:
        self._block_size = limits.block_size
        self._prefix_cache = limits.prefix_cache
        self._max_adapters = max_adapters
        self._blocks = blocks
        self._adapters = adapters
        self._by_age: list[Sequence] = []
        self._slots: list[Sequence | None] = [None] * num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._unfinished: dict[int, list[_Holding]] = {}  # by step: what to release when it is finished

    def __len__(self) -> int:
        return len(self._by_age)

    def __iter__(self) -> Iterator[Sequence]:
        """The sequences that run now, the oldest first; some may be removed during the iteration."""
        return iter(tuple(self._by_age))

    def at(self, seq_slot: int) -> Sequence | None:
        """The sequence in a slot; None when the one that was planned with it has ended."""
        return self._slots[seq_slot]

    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def count_by_key(self) -> Counter[AdapterKey]:
        return Counter(sequence.key for sequence in self._by_age)

    def newest_of_largest(self, at_least: int = 1) -> Sequence | None:
        """The newest sequence of the adapter that runs most, and at least so many. None when only one runs.

        It is never the oldest of all: either its adapter runs a newer one as well, or all run one and others are newer.
        """
        if len(self._by_age) < 2:
            return None
        running = self.count_by_key()
        candidates = [sequence for sequence in self._by_age if running[sequence.key] >= at_least]
        return max(candidates, key=lambda sequence: (running[sequence.key], sequence.serial), default=None)

    # Admission

    def computes_prefix_of(self, sequence: Sequence) -> bool:
        """Whether a running prompt is about to compute the next block that ``sequence`` lacks in the prefix cache."""
        prompts = [
            other
            for other in self._by_age
            if other.key == sequence.key and other.num_known - other.num_committed > 1 and other.parent is not None
        ]
        if not prompts:
            return False
        limit, chain, size = sequence.max_prefix_blocks(), sequence.prefix_chain(), self._block_size
        found = len(self._blocks.match(chain, limit))
        if found >= min(limit, len(chain)):
            return False
        missing = chain.block(found)
        return any(
            other.num_indexed <= found < min(other.num_wanted, other.num_known) // size
            and other.prefix_chain().block(found) == missing
            for other in prompts
        )

    def admit(self, sequence: Sequence, allowance: int, rows: int, now: float, *, prefix: bool = True) -> int:
        """Take a slot, an adapter lease and the first blocks together, and run; 0 and nothing taken if one is missing.

        Returns the tokens that a step computes of it first: up to ``allowance``, with up to ``rows`` rows of logits.
        ``prefix`` False uses no cached block. Raises what the pool says when the adapter cannot be used.
        """
        blocks = self._blocks
        limit = sequence.max_prefix_blocks() if prefix and self._prefix_cache else 0
        hits = blocks.match(sequence.prefix_chain(), limit) if limit else []
        held = [entry.block for entry in hits]
        blocks.take(held)
        sequence.begin(len(hits) * self._block_size)
        count = sequence.fit_rows(min(allowance, sequence.num_uncomputed), rows)
        lease: AdapterLease | None = None
        fresh: list[int] | None = None
        try:
            if count and self._has_room(blocks.blocks_for(sequence.num_wanted) - len(hits)):
                lease = self._acquire(sequence.generation)
                if lease is not None or sequence.key is None:
                    fresh = blocks.allocate(blocks.blocks_for(sequence.num_computed + count) - len(hits))
        finally:
            if fresh is None:
                sequence.begin(0)
                self._release(_Holding(held, None, lease), now)
        if fresh is None:
            return 0
        insort(self._by_age, sequence, key=_age)
        sequence.seq_slot = self._free_slots.pop()
        self._slots[sequence.seq_slot] = sequence
        sequence.tables.append(held + fresh)
        sequence.lease = lease
        sequence.row_order = (lease is None, lease.slot if lease else 0, sequence.serial)
        if self._prefix_cache:
            sequence.parent = hits[-1].serial if hits else sequence.prefix_chain().root
        return count

    def _has_room(self, missing: int) -> bool:
        """Whether all its tokens fit beside those that the running sequences have and get next, so that none is
        preempted for tokens that were known. Alone, it may always try.
        """
        running = self._by_age
        promised = sum(max(0, self._blocks.blocks_for(s.num_tokens + 1) - len(s.tables.blocks)) for s in running)
        return not running or self._blocks.could_have(missing + promised, lambda: self._adapters.leased_bytes)

    def _acquire(self, generation: str | None) -> AdapterLease | None:
        if generation is None:
            return None
        running = {sequence.generation for sequence in self._by_age if sequence.generation is not None}
        if generation not in running and len(running) >= self._max_adapters:
            return None
        return self._adapters.acquire(generation)

    def waits_for_upload(self, sequence: Sequence) -> bool:
        """Whether ``admit`` gave nothing because its adapter is being taken in: not for want of memory."""
        return sequence.generation is not None and self._adapters.is_pending(sequence.generation)

    def remove(self, sequence: Sequence, now: float) -> None:
        """End its running. It holds nothing from here on."""
        assert sequence.seq_slot is not None
        del self._by_age[bisect_left(self._by_age, sequence.serial, key=_age)]
        self._slots[sequence.seq_slot] = None
        holding = _Holding(sequence.tables.blocks, sequence.seq_slot, sequence.lease)
        sequence.tables = BlockTables(self._block_size)
        sequence.seq_slot = sequence.lease = None
        sequence.begin(0)
        if sequence.last_step in self._unfinished:
            self._unfinished[sequence.last_step].append(holding)
        else:
            self._release(holding, now)

    # Steps

    @property
    def num_unfinished(self) -> int:
        """Steps that were planned and are not finished."""
        return len(self._unfinished)

    def begin_step(self, step: int) -> None:
        self._unfinished[step] = []

    def end_step(self, step: int, now: float) -> None:
        """Release what only waited for the end of ``step``."""
        for holding in self._unfinished.pop(step):
            self._release(holding, now)

    def _release(self, holding: _Holding, now: float) -> None:
        self._blocks.release(holding.blocks, now)
        if holding.seq_slot is not None:
            self._free_slots.append(holding.seq_slot)
        if holding.lease is not None:
            self._adapters.release(holding.lease)

    def index_blocks(self, sequence: Sequence, now: float) -> None:
        """Offer its full and committed blocks to the prefix index."""
        chain = sequence.prefix_chain()
        for index in range(sequence.num_indexed, sequence.num_committed // self._block_size):
            own = sequence.tables.blocks[index]
            assert sequence.parent is not None
            if sequence.last_step in self._unfinished:
                # That step reads the block: if one of equal content replaces it, its last reference is this one.
                self._blocks.take([own])
                self._unfinished[sequence.last_step].append(_Holding([own]))
            entry = self._blocks.register(chain, index, sequence.parent, own, now)
            if entry is None:
                sequence.parent = None
                return
            if entry.block != own:
                sequence.tables.replace(index, entry.block)
            sequence.parent = entry.serial
            sequence.num_indexed = index + 1

    def check(self) -> None:
        """Raise AssertionError when a block, slot or lease has no owner or two, or a sequence's numbers disagree."""
        running = self._by_age
        assert running == sorted(running, key=_age) and set(running) == {s for s in self._slots if s is not None}
        for sequence in running:
            assert sequence.seq_slot is not None and self._slots[sequence.seq_slot] is sequence
            assert (sequence.lease is None) == (sequence.key is None), "a lease is missing"
            assert sequence.lease is None or sequence.lease.generation == sequence.generation
            assert sequence.num_committed <= sequence.num_computed <= sequence.num_wanted
            assert sequence.num_computed <= sequence.tables.capacity, "computed tokens without blocks"
            assert len(set(sequence.tables.blocks)) == len(sequence.tables.blocks)
            assert sequence.num_tokens - sequence.num_known <= len(self._unfinished)
        later = [holding for holdings in self._unfinished.values() for holding in holdings]
        self._blocks.check([*(sequence.tables.blocks for sequence in running), *(held.blocks for held in later)])
        holders: list[Sequence | _Holding] = [*running, *later]
        leases = sum(holder.lease is not None for holder in holders)
        assert sum({s.generation: s.leases for s in self._adapters.states()}.values()) == leases, "leases differ"
        slots = [holder.seq_slot for holder in holders if holder.seq_slot is not None]
        assert sorted(self._free_slots + slots) == list(range(len(self._slots))), "a slot is lost or owned twice"
