"""Admission: a waiting sequence takes its adapter lease and its first blocks together, or neither."""

from __future__ import annotations

from itertools import islice

from truffula.engine.blocks import BlockPool
from truffula.engine.grants import Grants
from truffula.engine.limits import EngineLimits
from truffula.engine.roster import Roster
from truffula.engine.sequence import AdapterKey, Sequence
from truffula.errors import TruffulaError
from truffula.lora.leases import AdapterLease
from truffula.lora.pool import AdapterPool

OVERTAKERS = 16
"""How far behind the head of a queue to look for one that need not wait for a prompt in progress."""


class Admission:
    """Who of a queue is next, and whether there is room. ``segments``: adapters that one step can hold."""

    def __init__(
        self, roster: Roster, limits: EngineLimits, blocks: BlockPool, adapters: AdapterPool, segments: int
    ) -> None:
        self._roster = roster
        self._limits = limits
        self._blocks = blocks
        self._adapters = adapters
        self._segments = segments

    def next_of(self, key: AdapterKey) -> Sequence | None:
        """The first waiting sequence of ``key`` that may start; None when there is none.

        One whose next block a running prompt is about to compute waits for it and then finds it in the prefix cache: of
        eight choices of one long prompt, one computes it. Meanwhile those behind it may pass.
        """
        head = self._roster.waiting.ready_head(key)
        if head is None or not self._limits.prefix_cache:
            return head
        prompts = [s for s in self._roster.running.values() if s.behind > 1 and s.key == key and s.parent is not None]
        if not prompts:
            return head
        for sequence in islice(self._roster.waiting.of(key), OVERTAKERS):
            if sequence.ready and not self._is_being_computed(sequence, prompts):
                return sequence
        return None

    def _is_being_computed(self, sequence: Sequence, prompts: list[Sequence]) -> bool:
        limit = sequence.max_prefix_blocks()
        chain = sequence.open_chain()
        there = len(self._blocks.match(chain, limit))
        if there >= min(limit, len(chain)):
            return False
        missing = chain.block(there)
        size = self._limits.block_size
        return any(
            other.num_registered <= there < other.num_wanted // size and other.open_chain().block(there) == missing
            for other in prompts
        )

    def admit(self, sequence: Sequence, allowance: int, grants: Grants, now: float, *, prefix: bool = True) -> int:
        """Start ``sequence`` with up to ``allowance`` tokens; returns how many. 0: no room, and nothing was taken.

        An adapter that turns out not to be usable ends the sequence (0 as well). ``prefix`` False takes no cached
        block.
        """
        blocks = self._blocks
        limit = sequence.max_prefix_blocks() if prefix and self._limits.prefix_cache else 0
        hits = blocks.match(sequence.open_chain(), limit) if limit else []
        held = [entry.block for entry in hits]
        blocks.take(held)
        sequence.num_computed = len(hits) * self._limits.block_size
        count = sequence.fit_rows(min(allowance, sequence.behind), grants.rows)
        lease: AdapterLease | None = None
        fresh: list[int] | None = None
        if count and self._has_room(blocks.blocks_for(sequence.num_wanted) - len(hits)):
            try:
                lease = self._lease(sequence)
            except TruffulaError as error:
                self._undo(sequence, held, None, now)
                self._roster.fail(sequence, error, now)
                return 0
            if lease is not None or sequence.key is None:
                fresh = blocks.allocate(blocks.blocks_for(sequence.num_computed + count) - len(hits))
        if fresh is None:
            self._undo(sequence, held, lease, now)
            return 0
        self._roster.admit(sequence, hits, fresh, lease, now)
        grants.set(sequence.serial, count, max(1, sequence.rows(count)))
        return count

    def _undo(self, sequence: Sequence, held: list[int], lease: AdapterLease | None, now: float) -> None:
        sequence.num_computed = 0
        self._blocks.release(held, now)
        if lease is not None:
            self._adapters.release(lease)

    def _has_room(self, missing: int) -> bool:
        """Whether all its tokens fit beside those that the running ones have and will get next: nobody is admitted only
        to
        be preempted for tokens that were known. Alone, it may always try."""
        running = self._roster.running.values()
        promised = sum(max(0, self._blocks.blocks_for(s.num_tokens + 1) - len(s.blocks)) for s in running)
        return not running or self._blocks.could_have(missing + promised, lambda: self._adapters.leased_bytes)

    def _lease(self, sequence: Sequence) -> AdapterLease | None:
        if sequence.generation is None:
            return None
        in_use = {s.generation for s in self._roster.running.values() if s.generation is not None}
        if sequence.generation not in in_use and len(in_use) >= self._segments:
            return None
        return self._adapters.acquire(sequence.generation)
