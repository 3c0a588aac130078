"""Roster: every live sequence, where it stands and what it holds. The scheduler decides; here things change hands.

    waiting ──admit──► running ──finish──► gone (one final event)
       ▲                  │
       └────preempt───────┘      blocks and lease go back; tokens, scores and generation stay

A waiting sequence holds no blocks and no lease; once its generation is known it holds that (its image stays
obtainable).
"""

from __future__ import annotations

import heapq
from collections import Counter

from truffula.engine.blocks import BlockPool
from truffula.engine.limits import EngineLimits, check_request
from truffula.engine.prefix import Entry
from truffula.engine.queues import WaitingQueues
from truffula.engine.sequence import AdapterKey, Sequence
from truffula.errors import DeadlineExceeded, ErrorInfo, InvalidRequest, Overloaded, QueueTimeout, TruffulaError
from truffula.lora.leases import AdapterLease
from truffula.lora.pool import AdapterPool
from truffula.types import EngineRequest, FinishReason, RequestTimes, TokenEvent


class Roster:
    """Owns the sequences; asks the pools for blocks and leases. Events gather here until the engine takes them."""

    def __init__(self, limits: EngineLimits, blocks: BlockPool, adapters: AdapterPool) -> None:
        self._limits = limits
        self._blocks = blocks
        self._adapters = adapters
        self._serial = 0
        self._live: dict[int, Sequence] = {}
        self._by_id: dict[str, Sequence] = {}
        self._timers: list[tuple[float, int]] = []
        self.waiting = WaitingQueues()
        self.running: dict[int, Sequence] = {}
        self.events: list[TokenEvent] = []
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self.preemptions = 0
        self.prompt_tokens = 0
        self.prefix_hit_tokens = 0

    # Coming

    def add(self, request: EngineRequest, now: float) -> None:
        """Queue ``request``, or answer it at once with its one, final, event. Never raises for a bad request."""
        try:
            if request.request_id in self._by_id:
                raise InvalidRequest(f"A request with id {request.request_id!r} is running.", param="request_id")
            max_total = check_request(request, self._limits, self._blocks.capacity())
            if len(self.waiting) >= self._limits.max_waiting:
                raise Overloaded(
                    f"{len(self.waiting)} requests are waiting; the limit is {self._limits.max_waiting}. Try again "
                    "later.",
                    waiting=len(self.waiting), limit=self._limits.max_waiting,
                )  # fmt: skip
        except TruffulaError as error:
            self.events.append(
                TokenEvent(
                    request_id=request.request_id, finish_reason="error", error=error.info(),
                    prompt_tokens=len(request.prompt_ids), times=RequestTimes(),
                )
            )  # fmt: skip
            return
        self._serial += 1
        limits = self._limits
        sequence = Sequence(
            self._serial, request, max_total=max_total, eos=limits.eos_token_ids, vocab=limits.vocab_size,
            size=limits.block_size,
        )  # fmt: skip
        sequence.arrival = sequence.arrival or now
        ended = sequence.finished_before_start()
        if ended is not None:
            self.events.append(sequence.final_event(ended[0], now, stop=ended[1]))
            return
        self._live[sequence.serial] = sequence
        self._by_id[request.request_id] = sequence
        for deadline in (request.queue_deadline, request.deadline):
            if deadline is not None:
                heapq.heappush(self._timers, (deadline, sequence.serial))
        self.waiting.push(sequence)

    def named(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def live(self, serial: int) -> Sequence | None:
        return self._live.get(serial)

    def all(self) -> list[Sequence]:
        return list(self._live.values())

    def __len__(self) -> int:
        return len(self._live)

    def fix_generation(self, sequence: Sequence, generation: str, now: float) -> None:
        """Its adapter is loaded: from now on it means these bytes, whatever the name leads to later."""
        sequence.generation = generation
        self._adapters.hold(generation)
        self.waiting.fixed(sequence)
        if sequence.loading_since is not None:
            sequence.load_s += now - sequence.loading_since
            sequence.loading_since = None

    # Running

    def admit(
        self, sequence: Sequence, hits: list[Entry], blocks: list[int], lease: AdapterLease | None, now: float
    ) -> None:
        """Move to running. ``hits`` (references taken) and ``blocks`` are its own from here on; ``num_computed`` is
        set.
        """
        self.waiting.remove(sequence)
        self.running[sequence.serial] = sequence
        sequence.set_blocks([entry.block for entry in hits] + blocks)
        sequence.lease = lease
        sequence.seq_slot = self._free_slots.pop()
        sequence.restart = True
        sequence.num_registered = len(hits)
        if self._limits.prefix_cache:
            sequence.parent = hits[-1].serial if hits else sequence.open_chain().root
        sequence.refused_steps = 0
        if sequence.admitted_at is None:
            sequence.admitted_at = now
            sequence.cached_tokens = min(sequence.num_computed, sequence.num_prompt)
            self.prompt_tokens += sequence.num_prompt
            self.prefix_hit_tokens += sequence.cached_tokens

    def preempt(self, sequence: Sequence, now: float) -> None:
        """Take back its blocks and its lease; it waits again, before everybody younger of its adapter."""
        del self.running[sequence.serial]
        self._give_back(sequence, now)
        self.waiting.push(sequence)
        self.preemptions += 1

    def index_blocks(self, sequence: Sequence, now: float) -> None:
        """Offer its newly full and computed blocks to the prefix index."""
        full = sequence.num_computed // self._limits.block_size
        if sequence.parent is None or sequence.num_registered >= full:
            return
        chain = sequence.open_chain()
        for index in range(sequence.num_registered, full):
            own = sequence.blocks[index]
            entry = self._blocks.register(chain, index, sequence.parent, own, now)
            if entry is None:
                sequence.parent = None
                return
            if entry.block != own:
                sequence.swap_block(index, entry.block)
            sequence.parent = entry.serial
            sequence.num_registered = index + 1

    def shares(self) -> Counter[AdapterKey]:
        """Running sequences by adapter."""
        return Counter(sequence.key for sequence in self.running.values())

    # Going

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        *,
        error: ErrorInfo | None = None,
        event: TokenEvent | None = None,
    ) -> None:
        """End it: all it holds goes back, and its one final event (``event``, or one without a token) is queued."""
        self.events.append(event or sequence.final_event(reason, now, error=error))
        if self.running.pop(sequence.serial, None) is None:
            self.waiting.remove(sequence)
        self._give_back(sequence, now)
        if sequence.generation is not None:
            self._adapters.let_go(sequence.generation)
        del self._live[sequence.serial]
        del self._by_id[sequence.request.request_id]

    def fail(self, sequence: Sequence, error: TruffulaError, now: float) -> None:
        self.finish(sequence, "error", now, error=error.info())

    def distrust(self, sequence: Sequence) -> None:
        """Its KV may be poisoned: nobody else is to find these blocks in the prefix index."""
        self._blocks.forget(sequence.blocks)

    def expire(self, now: float) -> None:
        """End what is out of time: ``queue_timeout`` when it never ran, ``deadline_exceeded`` when it did.

        The time a sequence's adapter loads is not its wait for a place: a load has limits of its own.
        """
        while self._timers and self._timers[0][0] <= now:
            deadline, serial = heapq.heappop(self._timers)
            sequence = self._live.get(serial)
            if sequence is None:
                continue
            if deadline != sequence.request.deadline and sequence.admitted_at is None:
                assert sequence.request.queue_deadline is not None
                later = sequence.request.queue_deadline + self._load_time(sequence, now)
                if later > now:
                    heapq.heappush(self._timers, (later, serial))
                    continue
            waited = now - sequence.arrival
            if sequence.admitted_at is None:
                loading = sequence.loading_since is not None
                why = "while its adapter was loading" if loading else "for a free slot in the batch"
                self.fail(
                    sequence, QueueTimeout(f"Waited {waited:.3f} s {why}.", waited_s=waited, loading=loading), now
                )
            elif deadline == sequence.request.deadline:
                message = (
                    f"The request reached its time limit after {waited:.3f} s with {sequence.num_completion} "
                    "completion tokens."
                )
                self.fail(sequence, DeadlineExceeded(message, elapsed_s=waited), now)

    def _load_time(self, sequence: Sequence, now: float) -> float:
        """Seconds it waited for its adapter's load, or stood behind one who does."""
        since = sequence.loading_since
        if since is None and not sequence.ready:
            since = next(iter(self.waiting.of(sequence.key))).loading_since
        return sequence.load_s + (0.0 if since is None else now - max(since, sequence.arrival))

    def _give_back(self, sequence: Sequence, now: float) -> None:
        self._blocks.release(sequence.blocks, now)
        sequence.set_blocks([])
        sequence.num_computed = sequence.num_registered = 0
        sequence.parent = None
        if sequence.seq_slot is not None:
            self._free_slots.append(sequence.seq_slot)
            sequence.seq_slot = None
        if sequence.lease is not None:
            self._adapters.release(sequence.lease)
            sequence.lease = None

    def check(self) -> None:
        """Raise AssertionError when a sequence is lost, or holds what it must not, or somebody else holds what is its
        own.
        """
        waiting = {sequence.serial: sequence for sequence in self.waiting}
        assert not waiting.keys() & self.running.keys(), "a sequence waits and runs"
        assert {**waiting, **self.running} == self._live, "a sequence is lost"
        assert {s.request.request_id: s for s in self._live.values()} == self._by_id
        for sequence in waiting.values():
            assert not sequence.blocks and sequence.lease is None and sequence.num_computed == 0, sequence.serial
        for sequence in self.running.values():
            assert (sequence.lease is None) == (sequence.key is None), "a lease is missing"
            assert sequence.lease is None or sequence.lease.generation == sequence.generation
            assert sequence.num_computed <= sequence.num_wanted
            assert len(sequence.blocks) >= self._blocks.blocks_for(sequence.num_computed), (
                "computed tokens without blocks"
            )
            assert len(set(sequence.blocks)) == len(sequence.blocks)
        slots = [sequence.seq_slot for sequence in self.running.values()]
        assert len(set(slots)) == len(slots) and None not in slots, "running sequences share a slot"
        self.waiting.check()
        self._blocks.check([sequence.blocks for sequence in self.running.values()])
        leases = sum(sequence.lease is not None for sequence in self.running.values())
        assert sum({s.generation: s.leases for s in self._adapters.states()}.values()) == leases, "leases differ"
