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

from truffula.engine.admission import Admission
from truffula.engine.blocks import BlockPool
from truffula.engine.grants import Grants, StepCapacity
from truffula.engine.limits import EngineLimits
from truffula.engine.lookahead import LookAhead
from truffula.engine.plan import ChunkResult, StepPlan
from truffula.engine.queues import Turns
from truffula.engine.roster import Roster
from truffula.engine.sequence import AdapterKey, Sequence
from truffula.errors import GenerationError, InsufficientMemory, TruffulaError
from truffula.lora.pool import AdapterPool
from truffula.types import EngineRequest, TokenEvent

MAX_REFUSALS = 8
"""Waiting adapters found not to fit in a step before it stops trying others: a bound on the cost of a full engine."""


LONG_STEPS = 2
"""A prompt that needs more steps than these to itself is a long one."""


class Scheduler:
    """Decides and keeps the books; computes nothing. One thread."""

    def __init__(self, limits: EngineLimits, blocks: BlockPool, adapters: AdapterPool, capacity: StepCapacity) -> None:
        self._limits = limits
        self._blocks = blocks
        self._adapters = adapters
        self._tokens = min(limits.step_tokens, capacity.tokens)
        self._rows = min(limits.step_logit_rows, capacity.rows)
        # Everybody running gets a token, and its row, each step: so no more may run than a step has of either.
        self._max_running = min(limits.max_running, capacity.sequences, self._tokens, self._rows)
        self._turns = Turns(quantum=max(limits.block_size, self._tokens // 2))
        self._gate: Sequence | None = None
        self.roster = Roster(limits, blocks, adapters)
        self._look_ahead = LookAhead(self.roster, adapters, limits.look_ahead, self._max_running)
        self._admission = Admission(self.roster, limits, blocks, adapters, capacity.segments)
        self._steps = 0
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
        grants = Grants(self._tokens, self._rows)
        self._grant_running(grants, now)
        self._share_rest(grants, now)
        granted = [(roster.running[serial], count) for serial, count in grants.count_of.items()]
        granted.sort(key=lambda item: _row_order(item[0]))
        self._steps += 1
        return StepPlan(self._steps, [sequence.chunk(count) for sequence, count in granted])

    def update(self, plan: StepPlan, results: Iterable[ChunkResult], now: float) -> None:
        """Book what a step computed: progress, scores, tokens, ends."""
        for chunk, result in zip(plan.chunks, results, strict=True):
            sequence = self.roster.live(chunk.serial)
            assert sequence is not None
            if not result.finite:
                self.roster.distrust(sequence)
                self.roster.fail(sequence, GenerationError("The model computed a NaN or infinite logit."), now)
                continue
            sequence.num_computed += chunk.count
            sequence.scores.extend(result.scores)
            if not result.tokens:
                self.roster.index_blocks(sequence, now)
                if sequence.behind == 0 and not sequence.samples:
                    self.roster.finish(sequence, "length", now)
                continue
            self.generated_tokens += 1
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            ends = sequence.append(result.tokens[0])
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

    def _grant_running(self, grants: Grants, now: float) -> None:
        for sequence in sorted(self.roster.running.values(), key=_age):
            if sequence.serial in self.roster.running and self._make_room(sequence, grants, now):
                grants.set(sequence.serial, 1, 1)

    def _make_room(self, sequence: Sequence, grants: Grants, now: float) -> bool:
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
        """The newest sequence of the adapter that runs most (at least so many). None when only one runs.

        Never the oldest of all: either its adapter runs a newer one as well, or all run one and others are newer.
        """
        running = self.roster.running
        if len(running) < 2:
            return None
        shares = self.roster.shares()
        candidates = [s for s in running.values() if shares[s.key] >= at_least]
        return max(candidates, key=lambda s: (shares[s.key], s.serial), default=None)

    def _too_big(self, sequence: Sequence) -> InsufficientMemory:
        return InsufficientMemory(
            f"{sequence.num_tokens} tokens and its adapter do not fit in memory though nothing else runs: "
            f"{self._blocks.num_used()} KV blocks are in use, {self._blocks.available()} are left. "
            "Raise --memory, or pin fewer adapters.",
            tokens=sequence.num_tokens, blocks_used=self._blocks.num_used(), blocks_left=self._blocks.available(),
        )  # fmt: skip

    # 5. Turns

    def _share_rest(self, grants: Grants, now: float) -> None:
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
        self, key: AdapterKey, allowance: int, behind: dict[AdapterKey, list[Sequence]], grants: Grants, now: float
    ) -> int:
        """One turn: first its running prompts, then at most one admission. Returns the tokens spent.

        A prompt that is several steps long leaves half to those of its adapter who come behind it.
        """
        spent, prompts = 0, behind.get(key, [])
        others = len(prompts) > 1 or self.roster.waiting.ready_head(key) is not None
        for sequence in prompts:
            most = min(allowance - spent, grants.tokens)
            if others and sequence.behind > LONG_STEPS * self._tokens:
                most = -(-most // 2)
            spent += self._extend(sequence, most, grants)
        allowance = min(allowance - spent, grants.tokens)
        if allowance <= 0 or not self._may_admit(grants):
            return spent
        first = self._admission.next_of(key)
        if first is None or self._gate not in (None, first):
            return spent
        count = self._try_admit(first, allowance, grants, now)
        if count:
            behind.setdefault(key, []).append(first)
        return spent + count

    def _extend(self, sequence: Sequence, allowance: int, grants: Grants) -> int:
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

    def _may_admit(self, grants: Grants) -> bool:
        if len(self.roster.running) >= self._max_running or grants.rows < 1:
            return False
        return self._gate is not None or not (grants.preempted or grants.refusals >= MAX_REFUSALS)

    def _try_admit(self, sequence: Sequence, allowance: int, grants: Grants, now: float) -> int:
        """Returns the tokens granted; 0 when it has to wait (or has ended)."""
        count = self._admission.admit(sequence, allowance, grants, now)
        alone = not self.roster.running
        if not count and alone and self.roster.live(sequence.serial) is not None:
            # The cached blocks it wanted may be what is in the way of its adapter or of its other blocks.
            count = self._admission.admit(sequence, allowance, grants, now, prefix=False)
            if not count and self.roster.live(sequence.serial) is not None:
                self.roster.fail(sequence, self._too_big(sequence), now)
        if not count and self.roster.live(sequence.serial) is not None:
            sequence.refused_steps += 1
            grants.refusals += 1
        return count

    def check(self) -> None:
        self.roster.check()
        assert len(self.roster.running) <= self._max_running


def _age(sequence: Sequence) -> int:
    return sequence.serial


def _row_order(sequence: Sequence) -> tuple[bool, int, int]:
    return sequence.lease is None, sequence.lease.slot if sequence.lease else 0, sequence.serial
