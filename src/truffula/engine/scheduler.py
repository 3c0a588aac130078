"""Scheduler: what the next step computes. No phases: a sequence gets ``min(budget, tokens it has - tokens computed)``.

One call of ``schedule`` goes through five passes over one budget of tokens and one of logit rows:

1. out of time: such sequences end;
2. look-ahead: adapters of waiting requests begin to load; a loaded one fixes their generation;
3. rescue: an adapter that runs nothing and was passed over for long takes a place from the one that runs most;
4. everybody running is given one token, the oldest first: no stream ever stalls behind a prompt. For want of a block
   the newest sequence of the adapter that runs most is preempted, never the oldest of all: it goes on, so all end;
5. the rest of the budget goes to prompts, running ones and waiting ones, by turns of the adapters (``queues.Turns``).

See docs/decisions/0003-no-phases-one-token-budget.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from truffula.engine.blocks import BlockPool
from truffula.engine.limits import EngineLimits
from truffula.engine.plan import ChunkResult, StepPlan
from truffula.engine.lookahead import LookAhead
from truffula.engine.queues import Turns
from truffula.engine.roster import Roster
from truffula.engine.sequence import AdapterKey, Sequence
from truffula.errors import GenerationError, InsufficientMemory, TruffulaError
from truffula.lora.pool import AdapterLease, AdapterPool
from truffula.types import EngineRequest, TokenEvent

MAX_REFUSALS = 8
"""Waiting adapters found not to fit in a step before it stops trying others: a bound on the cost of a full engine."""


@dataclass(frozen=True)
class StepCapacity:
    """What one step of the executable can hold: T tokens, R logit rows, N sequences, G adapters."""

    tokens: int
    rows: int
    sequences: int
    segments: int


@dataclass
class _Grants:
    """What this step has given so far, and what is left. ``rows_of`` may be more than a sequence ends up needing."""

    tokens: int
    rows: int
    count_of: dict[int, int] = field(default_factory=dict)
    rows_of: dict[int, int] = field(default_factory=dict)
    preempted: bool = False
    refusals: int = 0

    def set(self, serial: int, count: int, rows: int) -> int:
        """Raise a sequence's grant to ``count`` tokens and ``rows`` rows; returns how many tokens that added."""
        added = count - self.count_of.get(serial, 0)
        self.tokens -= added
        self.rows -= rows - self.rows_of.get(serial, 0)
        self.count_of[serial], self.rows_of[serial] = count, rows
        return added

    def drop(self, serial: int) -> None:
        self.tokens += self.count_of.pop(serial, 0)
        self.rows += self.rows_of.pop(serial, 0)


class Scheduler:
    """Decides and keeps the books; computes nothing. One thread."""

    def __init__(self, limits: EngineLimits, blocks: BlockPool, adapters: AdapterPool, capacity: StepCapacity) -> None:
        self._limits = limits
        self._blocks = blocks
        self._adapters = adapters
        self._tokens = min(limits.step_tokens, capacity.tokens)
        self._rows = min(limits.step_logit_rows, capacity.rows)
        self._segments = capacity.segments
        # Everybody running gets a token, and its row, each step: so no more may run than a step has of either.
        self._max_running = min(limits.max_running, capacity.sequences, self._tokens, self._rows)
        self._turns = Turns(quantum=max(limits.block_size, self._tokens // 2))
        self._gate: Sequence | None = None
        self.roster = Roster(limits, blocks, adapters)
        self._look_ahead = LookAhead(self.roster, adapters, limits.look_ahead, self._max_running)
        self.generated_tokens = 0

    # What the engine asks

    def add(self, request: EngineRequest, now: float) -> None:
        self.roster.add(request, now)

    def abort(self, request_id: str, now: float) -> None:
        """End it now; nothing happens when it is unknown (it may have ended already)."""
        sequence = self.roster.named(request_id)
        if sequence is not None:
            self.roster.finish(sequence, "abort", now)

    def take_events(self) -> list[TokenEvent]:
        events, self.roster.events = self.roster.events, []
        return events

    def schedule(self, now: float) -> StepPlan:
        """The next step's plan; empty when nothing can run. Sequences that end on the way leave their event."""
        roster = self.roster
        roster.expire(now)
        self._look_ahead.look(now)
        self._rescue(now)
        grants = _Grants(self._tokens, self._rows)
        self._grant_running(grants, now)
        self._share_rest(grants, now)
        granted = [(roster.running[serial], count) for serial, count in grants.count_of.items()]
        granted.sort(key=lambda item: _row_order(item[0]))
        return StepPlan(tuple(sequence.chunk(count) for sequence, count in granted))

    def update(self, plan: StepPlan, results: Iterable[ChunkResult], now: float) -> None:
        """Book what a step computed: progress, scores, tokens, ends."""
        for chunk, result in zip(plan.chunks, results, strict=True):
            sequence = self.roster.live(chunk.serial)
            assert sequence is not None
            if not result.finite:
                self.roster.distrust(sequence)
                self.roster.fail(sequence, GenerationError("The model gave a NaN or an infinity for it."), now)
                continue
            sequence.num_computed += chunk.count
            sequence.scores.extend(result.scores)
            if result.token is None:
                self.roster.index_blocks(sequence, now)
                if sequence.behind == 0 and not sequence.samples:
                    self.roster.finish(sequence, "length", now)
                continue
            self.generated_tokens += 1
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            ends = sequence.append(result.token)
            self.roster.index_blocks(sequence, now)
            event = sequence.token_event(result, ends, now)
            if ends is None:
                self.roster.events.append(event)
            else:
                self.roster.finish(sequence, ends[0], now, event=event)

    def fail_step(self, plan: StepPlan, error: TruffulaError, now: float) -> None:
        """The step raised: its sequences end with ``error``, the others go on. Nothing it wrote was indexed."""
        for chunk in plan.chunks:
            sequence = self.roster.live(chunk.serial)
            assert sequence is not None
            self.roster.fail(sequence, error, now)

    def startable(self) -> bool:
        """Whether a step could do something: somebody runs, or waits for no load."""
        return bool(self.roster.running) or self.roster.waiting.num_ready() > 0

    # 3. Rescue

    def _rescue(self, now: float) -> None:
        """Who was refused for ``patience`` steps and runs nothing gets a place; after four times that, goes first."""
        self._gate = None
        roster, patience = self.roster, self._limits.patience
        late = [head for head in self._ready_heads() if head.refused_steps >= patience]
        if not late:
            return
        shares = roster.shares()
        starved = min((head for head in late if not shares[head.key]), key=_age, default=None)
        if starved is not None:
            victim = self._victim(at_least=2)
            if victim is not None:
                roster.preempt(victim, now)
                self._gate = starved
                return
        oldest = min(late, key=_age)
        if oldest.refused_steps >= 4 * patience:
            self._gate = oldest

    # 4. One token for everybody

    def _grant_running(self, grants: _Grants, now: float) -> None:
        for sequence in sorted(self.roster.running.values(), key=_age):
            if sequence.serial in self.roster.running and self._make_room(sequence, grants, now):
                grants.set(sequence.serial, 1, 1)

    def _make_room(self, sequence: Sequence, grants: _Grants, now: float) -> bool:
        """Have a block for its next token, preempting for it; False when it was itself the one to go."""
        while len(sequence.blocks) * self._limits.block_size <= sequence.num_computed:
            blocks = self._blocks.allocate(1)
            if blocks is not None:
                sequence.add_blocks(blocks)
                return True
            victim = self._victim()
            if victim is None:
                self.roster.fail(sequence, self._too_big(sequence), now)
                return False
            grants.drop(victim.serial)
            grants.preempted = True
            self.roster.preempt(victim, now)
            if victim is sequence:
                return False
        return True

    def _victim(self, at_least: int = 1) -> Sequence | None:
        """The newest sequence of the adapter that runs most (at least so many); never the oldest of all."""
        running = self.roster.running
        if len(running) < 2:
            return None
        shares, oldest = self.roster.shares(), min(running)
        candidates = [s for s in running.values() if s.serial != oldest and shares[s.key] >= at_least]
        return max(candidates, key=lambda s: (shares[s.key], s.serial), default=None)

    def _too_big(self, sequence: Sequence) -> InsufficientMemory:
        return InsufficientMemory(
            f"{sequence.num_tokens} tokens and its adapter do not fit in memory though nothing else runs: "
            f"{self._blocks.num_used()} KV blocks are in use, {self._blocks.available()} are left. "
            "Give the server more memory, or pin fewer adapters.",
            tokens=sequence.num_tokens, blocks_used=self._blocks.num_used(), blocks_left=self._blocks.available(),
        )  # fmt: skip

    # 5. Turns

    def _share_rest(self, grants: _Grants, now: float) -> None:
        behind: dict[AdapterKey, list[Sequence]] = {}
        for sequence in self.roster.running.values():
            if sequence.behind > grants.count_of[sequence.serial]:
                behind.setdefault(sequence.key, []).append(sequence)
        full = len(self.roster.running) >= self._max_running
        if full:
            for head in self._ready_heads():
                head.refused_steps += 1
        open_keys = self._turns.order(behind.keys() | (() if full else set(self.roster.waiting.ready())))
        while open_keys and grants.tokens > 0:
            still_open = []
            for key in open_keys:
                spent = self._serve(key, self._turns.begin(key), behind, grants, now)
                if spent:
                    # Who could not spend keeps its place: it is the first to be asked in the next step.
                    self._turns.end(key, spent)
                    still_open.append(key)
                if grants.tokens <= 0:
                    return
            open_keys = still_open

    def _ready_heads(self) -> list[Sequence]:
        waiting = self.roster.waiting
        return [head for key in waiting.ready() if (head := waiting.ready_head(key)) is not None]

    def _serve(
        self, key: AdapterKey, allowance: int, behind: dict[AdapterKey, list[Sequence]], grants: _Grants, now: float
    ) -> int:
        """One turn: first its running prompts, then at most one admission. Returns the tokens spent."""
        spent = 0
        for sequence in behind.get(key, ()):
            spent += self._extend(sequence, min(allowance - spent, grants.tokens), grants)
        head = self.roster.waiting.ready_head(key)
        allowance = min(allowance - spent, grants.tokens)
        if head is None or allowance <= 0 or not self._may_admit(head, grants):
            return spent
        count = self._try_admit(head, allowance, grants, now)
        if count:
            behind.setdefault(key, []).append(head)
        return spent + count

    def _extend(self, sequence: Sequence, allowance: int, grants: _Grants) -> int:
        have, rows = grants.count_of[sequence.serial], grants.rows_of[sequence.serial]
        count = have + min(allowance, sequence.behind - have)
        count = sequence.fit_rows(count, grants.rows + rows)
        if count <= have:
            return 0
        missing = self._blocks.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        if missing > 0:
            sequence.add_blocks(self._blocks.allocate(missing) or [])
            count = min(count, len(sequence.blocks) * self._limits.block_size - sequence.num_computed)
        return grants.set(sequence.serial, count, max(rows, sequence.rows(count)))

    # Admission

    def _may_admit(self, head: Sequence, grants: _Grants) -> bool:
        if len(self.roster.running) >= self._max_running:
            return False
        if self._gate is not None:
            return head is self._gate
        return not grants.preempted and grants.refusals < MAX_REFUSALS

    def _try_admit(self, sequence: Sequence, allowance: int, grants: _Grants, now: float) -> int:
        """Lease and first blocks together, or neither. Returns the tokens granted; 0 when it has to wait (or has
        ended).
        """
        if grants.rows < 1:
            return 0
        count = self._admit(sequence, allowance, grants, now, prefix=True)
        alone = not self.roster.running
        if not count and alone and self.roster.live(sequence.serial) is not None:
            # The cached blocks it wanted may be what is in the way of its adapter or of its other blocks.
            count = self._admit(sequence, allowance, grants, now, prefix=False)
            if not count and self.roster.live(sequence.serial) is not None:
                self.roster.fail(sequence, self._too_big(sequence), now)
        if not count and self.roster.live(sequence.serial) is not None:
            sequence.refused_steps += 1
            grants.refusals += 1
        return count

    def _admit(self, sequence: Sequence, allowance: int, grants: _Grants, now: float, *, prefix: bool) -> int:
        blocks, size = self._blocks, self._limits.block_size
        limit = sequence.max_prefix_blocks() if prefix and self._limits.prefix_cache else 0
        hits = blocks.match(sequence.open_chain(), limit) if limit else []
        sequence.num_computed = len(hits) * size
        count = sequence.fit_rows(min(allowance, sequence.behind), grants.rows)
        held = [entry.block for entry in hits]
        blocks.take(held)
        lease: AdapterLease | None = None
        fresh: list[int] | None = None
        if count and self._room_for(blocks.blocks_for(sequence.num_wanted) - len(hits)):
            try:
                lease = self._lease(sequence)
            except TruffulaError as error:
                self._undo(sequence, held, None, now)
                self.roster.fail(sequence, error, now)
                return 0
            if lease is not None or sequence.key is None:
                fresh = blocks.allocate(blocks.blocks_for(sequence.num_computed + count) - len(hits))
        if fresh is None:
            self._undo(sequence, held, lease, now)
            return 0
        self.roster.admit(sequence, hits, fresh, lease, now)
        grants.set(sequence.serial, count, max(1, sequence.rows(count)))
        return count

    def _undo(self, sequence: Sequence, held: list[int], lease: AdapterLease | None, now: float) -> None:
        sequence.num_computed = 0
        self._blocks.release(held, now)
        if lease is not None:
            self._adapters.release(lease)

    def _room_for(self, missing: int) -> bool:
        """Whether all its tokens would fit beside what those running have yet to fill: admission does not lead to
        preemption
        for tokens that are known already."""
        running = self.roster.running.values()
        promised = sum(max(0, self._blocks.blocks_for(s.num_tokens + 1) - len(s.blocks)) for s in running)
        return not running or self._blocks.available() - promised >= missing

    def _lease(self, sequence: Sequence) -> AdapterLease | None:
        if sequence.generation is None:
            return None
        in_use = {s.generation for s in self.roster.running.values() if s.generation is not None}
        if sequence.generation not in in_use and len(in_use) >= self._segments:
            return None
        return self._adapters.acquire(sequence.generation)

    def check(self) -> None:
        self.roster.check()
        assert len(self.roster.running) <= self._max_running


def _age(sequence: Sequence) -> int:
    return sequence.serial


def _row_order(sequence: Sequence) -> tuple[bool, int, int]:
    return sequence.lease is None, sequence.lease.slot if sequence.lease else 0, sequence.serial
