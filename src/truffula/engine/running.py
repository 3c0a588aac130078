"""RunningBatch: the running sequences and what they hold: a slot of the executable, adapter leases and KV blocks."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import add, attrgetter

from truffula.engine.blocks import BlockPool, BlockTable
from truffula.engine.limits import EngineLimits
from truffula.engine.plan import Chunk
from truffula.engine.prefix import BlockKeys
from truffula.engine.sequence import Sequence, TurnKey
from truffula.errors import InsufficientMemory
from truffula.lora.pool import AdapterLease, AdapterPool

MAX_KEPT_BORDERS = 4
"""Snapshots that a prompt leaves for prompts that wait for it, its own two among them."""

_age = attrgetter("serial")


@dataclass(frozen=True)
class _Holding:
    """What a sequence held, until it is released."""

    table: BlockTable
    seq_slot: int | None
    leases: tuple[AdapterLease, ...]


class RunningBatch:
    """Part of the scheduler: the scheduler decides, the batch takes and releases slots, leases and blocks.

    What an unfinished step may read or write is not released: the holdings of a sequence that ends or is preempted stay
    until the last step that was planned with it is finished.
    """

    def __init__(self, limits: EngineLimits, blocks: BlockPool, adapters: AdapterPool) -> None:
        self._block_size = limits.block_size
        self._prefix_cache = limits.prefix_cache
        self._has_states = limits.num_states > 0
        self._blocks = blocks
        self._adapters = adapters
        self._by_age: list[Sequence] = []
        self._slots: list[Sequence | None] = [None] * limits.most_running
        self._free_slots = list(range(limits.most_running - 1, -1, -1))
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

    def count_by_key(self) -> Counter[TurnKey]:
        return Counter(sequence.key for sequence in self._by_age)

    def newest_of_largest(self, starved: Sequence | None = None) -> Sequence | None:
        """The newest sequence of the tenant that runs most for its weight, and there of the adapter that runs most.
        None when only one runs. It is never the oldest of all, so that every sequence ends.

        For one that is ``starved``, only one without weight, of an adapter that runs two, or of a tenant that runs two
        where its own runs none.
        """
        running, tenants = self.count_by_key(), Counter(sequence.key[0] for sequence in self._by_age)
        candidates = self._by_age[1:]
        if starved is not None:
            new = not tenants[starved.key[0]]
            candidates = [
                s for s in candidates if not s.weight or running[s.key] > 1 or (new and tenants[s.key[0]] > 1)
            ]
        return max(
            candidates,
            key=lambda s: (not s.weight, tenants[s.key[0]] / (s.weight or 1.0), running[s.key], s.serial),
            default=None,
        )

    # Admission

    def first_startable(self, candidates: list[Sequence]) -> Sequence | None:
        """The first of ``candidates``, which wait, that may start.

        One whose next block a running prompt is about to compute waits for it and then finds it in the prefix cache: of
        eight choices of one long prompt, one computes it. Meanwhile those behind it may pass.
        """
        if not self._prefix_cache:
            return candidates[0] if candidates else None
        return next((sequence for sequence in candidates if not self._computes_prefix_of(sequence)), None)

    def _computes_prefix_of(self, sequence: Sequence) -> bool:
        """Whether a running prompt is about to compute the next block that ``sequence`` lacks in the prefix cache."""
        prompts = [
            other
            for other in self._by_age
            if other.num_known - other.num_committed > 1
            and (other.adapter_key == sequence.adapter_key or other.acts_from or sequence.acts_from)
        ]
        if not prompts:
            return False
        limit, keys = sequence.max_prefix_blocks(), sequence.block_keys()
        found = self._blocks.match(keys, limit)
        if len(found) >= min(limit, len(keys)):
            return False
        if self._has_states:
            return any(self._leaves_snapshot(other, keys, len(found), limit) for other in prompts)
        return any(
            len(found) < min(other.num_wanted, other.num_known) // self._block_size
            and self._blocks.continues(other.table, other.block_keys(), found, keys[len(found)])
            for other in prompts
        )

    def _leaves_snapshot(self, prompt: Sequence, keys: BlockKeys, found: int, limit: int) -> bool:
        """Whether a running ``prompt`` is about to leave a snapshot behind a prefix of ``keys`` that is longer than the
        ``found`` blocks; it is made to where the two part, unless it is past that border."""
        common = min(prompt.block_keys().num_common(keys), limit, (prompt.num_wanted - 1) // self._block_size)
        border, kept = common * self._block_size, prompt.kept_borders
        if common > found and border > prompt.num_computed and len(kept) < MAX_KEPT_BORDERS:
            kept.add(border)
        left = [border // self._block_size for border in kept if border > prompt.num_committed]
        return any(found < length <= common for length in left)

    def admit(self, sequence: Sequence, allowance: int, rows: int, now: float) -> int:
        """Take a slot, leases on its adapters and the first blocks, and run; 0 and nothing taken if one is missing.

        Returns the tokens that a step computes of it first: up to ``allowance``, with up to ``rows`` rows of logits.
        Raises ``InsufficientMemory`` when it has no room although nothing else runs, and the pool's error when the
        adapter cannot be used.
        """
        count = self._admit(sequence, allowance, rows, now, prefix=self._prefix_cache)
        uploading = self._adapters.is_pending([one.generation for one in sequence.adapters])
        if count or self._by_age or self._unfinished or uploading:
            return count
        # The cached blocks it would use may take the room of its adapter or of its other blocks.
        count = self._admit(sequence, allowance, rows, now, prefix=False)
        if not count:
            raise self.too_large(sequence)
        return count

    def _admit(self, sequence: Sequence, allowance: int, rows: int, now: float, *, prefix: bool) -> int:
        blocks = self._blocks
        limit = sequence.max_prefix_blocks() if prefix else 0
        if limit:
            blocks.attach(sequence.table, blocks.match(sequence.block_keys(), limit))
        sequence.reset(max(sequence.table.capacity, sequence.num_given))
        count = sequence.fit(min(allowance, sequence.num_uncomputed), rows)
        leases: tuple[AdapterLease, ...] | None = None
        admitted = False
        try:
            if count and self._has_room(sequence):
                leases = self._adapters.acquire_all([one.generation for one in sequence.adapters])
                if leases is not None:
                    admitted = blocks.extend(sequence.table, sequence.num_computed + count)
        finally:
            if not admitted:
                sequence.reset(0)
                self._release(_Holding(sequence.table, None, leases or ()), now)
                sequence.table = blocks.new_table()
        if not admitted or leases is None:
            return 0
        insort(self._by_age, sequence, key=_age)
        sequence.seq_slot = self._free_slots.pop()
        self._slots[sequence.seq_slot] = sequence
        sequence.take_leases(leases)
        if self._has_states and self._prefix_cache:
            last = (sequence.num_tokens - 1) // self._block_size
            known = blocks.num_known(sequence.block_keys(), last)
            sequence.kept_borders = {known * self._block_size, last * self._block_size}
        return count

    def advance(self, sequence: Sequence, count: int, step: int) -> Chunk:
        """The chunk of its next ``count`` tokens, with the state rows that the step reads and writes."""
        if not self._has_states:
            return sequence.advance(count, step)
        borders = sequence.snapshot_borders(count) if self._prefix_cache else []
        start = sequence.num_computed
        return sequence.advance(count, step, self._blocks.begin_states(sequence.table, start, start + count, borders))

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether all its tokens fit beside those that the running sequences have and get next, so that none is
        preempted for tokens that were known. Alone, it may always try.
        """
        if not self._by_age:
            return True
        needed = self._blocks.growth(sequence.table, sequence.num_wanted)
        for other in self._by_age:
            if other.num_tokens + 1 > other.table.capacity:
                needed = list(map(add, needed, self._blocks.growth(other.table, other.num_tokens + 1)))
        return self._blocks.can_fit(needed, lambda: self._adapters.leased_bytes)

    def too_large(self, sequence: Sequence) -> InsufficientMemory:
        """The error of a sequence that has no room although nothing else runs."""
        used, left = self._blocks.num_used(), self._blocks.num_free() + self._blocks.num_cached()
        return InsufficientMemory(
            f"{sequence.num_tokens} tokens and its adapter do not fit in memory though nothing else runs: {used} KV "
            f"blocks are in use, {left} are left. Raise --memory, or pin fewer adapters.",
            tokens=sequence.num_tokens, blocks_used=used, blocks_left=left,
        )  # fmt: skip

    def remove(self, sequence: Sequence, now: float) -> None:
        """Take it out of the batch. It holds nothing from here on."""
        assert sequence.seq_slot is not None
        del self._by_age[bisect_left(self._by_age, sequence.serial, key=_age)]
        self._slots[sequence.seq_slot] = None
        holding = _Holding(sequence.table, sequence.seq_slot, sequence.leases)
        sequence.table = self._blocks.new_table()
        sequence.seq_slot = None
        sequence.take_leases(())
        sequence.reset(0)
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
        """Record that ``step`` has finished; release what waited for that."""
        for holding in self._unfinished.pop(step):
            self._release(holding, now)

    def _release(self, holding: _Holding, now: float) -> None:
        self._blocks.release(holding.table, now)
        if holding.seq_slot is not None:
            self._free_slots.append(holding.seq_slot)
        for lease in holding.leases:
            self._adapters.release(lease)

    def commit_blocks(self, sequence: Sequence, now: float) -> None:
        """Index its full and committed blocks, then free those behind a window."""
        blocks, table, committed = self._blocks, sequence.table, sequence.num_committed
        if self._prefix_cache:
            blocks.register(table, sequence.block_keys(), committed)
        blocks.free_behind(table, committed, now)
