"""Scheduler: plans steps and records their results. There are no phases: a sequence gets
``min(budget, tokens it has - tokens computed)``, whether they are a prompt, a drawn token, or computed again.

    waiting ───admit──► running ──_finish──► gone (one final event)
       ▲                   │
       └─────_preempt──────┘      blocks, slot and lease are released; tokens, scores and generation stay

``plan`` makes five passes over one budget of tokens and one of logit rows:

1. sequences that are out of time end, and those whose grammar is compiled enter the queues;
2. adapters of waiting requests are prefetched; a loaded one is bound to its requests;
3. if an adapter runs nothing and was refused for long, a sequence of the adapter that runs most is preempted;
4. each running sequence gets one token, the oldest first: no stream stalls behind a prompt. If a block is missing, the
   newest sequence of the adapter that runs most is preempted, never the oldest of all, so every sequence ends. One
   that has grown too long for its rotary tables (longrope) is preempted, and computed again with others;
5. the rest of the budget goes to prompts, running and waiting, by deficit round robin over adapters.

``plan`` may be called while earlier steps are unfinished; ``commit`` takes their results in order. What an ended
sequence held is released once the last step that was planned with it has finished. A preemption, and steps that are run
again after a failure (``retry``), are planned only when no step is unfinished; until then ``plan`` is empty.
See docs/decisions/0003-no-phases-one-token-budget.md.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from operator import attrgetter
from typing import Literal

from truffula.engine.blocks import BlockPool
from truffula.engine.constraints import GrammarCompiler
from truffula.engine.limits import EngineLimits, check_request
from truffula.engine.plan import ChunkResult, StepPlan
from truffula.engine.queues import WaitingQueues
from truffula.engine.running import RunningBatch
from truffula.engine.sequence import AdapterKey, Sequence
from truffula.engine.step_budget import DeficitRoundRobin, StepBudget, reserved_rows
from truffula.errors import ErrorInfo, InvalidRequest, TruffulaError
from truffula.lora.pool import AdapterPool
from truffula.types import MAX_STATS_NAMES, EngineRequest, FinishReason, RequestTimes, TokenEvent

MAX_REFUSALS = 8
"""Admissions that may be refused in a step before no more are tried: bounds the cost of a full engine."""
MOST_ADMITTED = 1 << 14
"""Tokens of admitted sequences after which a step admits no more: the keys of their blocks are made and looked up."""
LONG_STEPS = 2
"""A prompt that fills more steps than these is long: it leaves half of its adapter's turn to the prompts behind it."""

_age = attrgetter("serial")
_row_order = attrgetter("row_order")


class _ResultsNeeded(Exception):
    """No step can be planned before the unfinished ones have finished: they may use what is to be released."""


class Scheduler:
    """Owns the sequences and their queues; takes blocks and leases from the pools. Used by one thread."""

    def __init__(
        self, limits: EngineLimits, blocks: BlockPool, adapters: AdapterPool, grammars: GrammarCompiler
    ) -> None:
        self._limits = limits
        self._blocks = blocks
        self._adapters = adapters
        self._grammars = grammars
        self._compiling: dict[str, dict[int, Sequence]] = {}  # by key of the grammar and serial
        self._round_robin = DeficitRoundRobin(quantum=max(limits.block_size, limits.step_tokens // 2))
        self._waiting = WaitingQueues(limits, adapters, lambda: blocks.longest(limits.max_model_len))
        self._running = RunningBatch(limits, blocks, adapters)
        self._by_id: dict[str, Sequence] = {}
        self._timeouts: list[tuple[float, int, str]] = []  # a heap of time, serial and request id
        self._last_serial = 0
        self._reserved_for: Sequence | None = None  # the only one that may be admitted
        self._paused: Literal["", "admission", "all"] = ""  # what is not planned
        self._last_step = 0
        self._retries: list[list[tuple[Sequence, int]]] = []  # parts of failed steps to run alone, the next one last
        self._events: list[TokenEvent] = []
        self._counts = dict.fromkeys(("preemptions", "prompt_tokens", "prefix_hit_tokens", "generated_tokens"), 0)

    # Called by the engine

    def add(self, request: EngineRequest, now: float) -> None:
        """Queue ``request``. An invalid one gets a final error event; nothing is raised."""
        try:
            if request.request_id in self._by_id:
                raise InvalidRequest(f"A request with id {request.request_id!r} is running.", param="request_id")
            longest = self._blocks.longest(self._limits.max_model_len)
            max_total = check_request(request, self._limits, longest, self._num_waiting())
            sequence = Sequence(self._last_serial + 1, request, max_total, self._limits, self._blocks.new_table())
            compiling = sequence.grammar is not None and self._grammars.start(sequence.grammar)
        except TruffulaError as error:
            self._events.append(
                TokenEvent(
                    request_id=request.request_id, finish_reason="error", error=error.info(),
                    prompt_tokens=len(request.prompt_ids), times=RequestTimes(),
                )
            )  # fmt: skip
            return
        self._last_serial += 1
        sequence.arrival = sequence.arrival or now
        self._by_id[request.request_id] = sequence
        self._schedule_timeout(sequence, now)
        if sequence.grammar is not None and compiling:
            self._compiling.setdefault(sequence.grammar.key, {})[sequence.serial] = sequence
        else:
            self._enqueue(sequence, now)

    def _enqueue(self, sequence: Sequence, now: float) -> None:
        """Put a new sequence, whose grammar is compiled, into its queue; one with nothing to compute ends."""
        if sequence.grammar is not None:
            sequence.bind_grammar(self._grammars)
        self._waiting.push(sequence)
        ended = sequence.ended_before_start()
        if sequence.grammar_error is not None:
            self._fail(sequence, sequence.grammar_error, now)
        elif ended is not None:
            self._finish(sequence, sequence.final_event(ended[0], now, stop=ended[1]), now)

    def _enqueue_compiled(self, now: float) -> None:
        for key, error in self._grammars.take_finished():
            if error is None:
                for sequence in self._compiling.pop(key, {}).values():
                    self._enqueue(sequence, now)
            else:
                for sequence in list(self._compiling.get(key, {}).values()):
                    self._fail(sequence, error, now)

    def abort(self, request_id: str, now: float) -> None:
        """End it now; an unknown id is ignored (it may have ended already)."""
        if request_id in self._by_id:
            self._end(self._by_id[request_id], "abort", now)

    def end_all(self, error: TruffulaError, now: float) -> None:
        """End every sequence with ``error``."""
        for sequence in list(self._by_id.values()):
            self._fail(sequence, error, now)

    def take_events(self) -> list[TokenEvent]:
        events, self._events = self._events, []
        return events

    def pause(self, *, drain: bool) -> None:
        """Plan nothing until ``resume``; ``drain``: continue what runs, but admit nothing."""
        self._paused = "admission" if drain else "all"

    def resume(self) -> None:
        self._paused = ""

    def is_paused(self) -> bool:
        return self._paused != ""

    def has_stopped(self, *, drained: bool) -> bool:
        """Whether no step is unfinished; ``drained``: and nothing runs."""
        return not (self._running.num_unfinished or (drained and len(self._running)))

    def has_work(self) -> bool:
        """Whether there are events to take, results to wait for, or sequences that may run and wait for nothing."""
        runnable = self._paused != "all" and (len(self._running) or (not self._paused and self._waiting.num_ready()))
        return bool(self._events or self._running.num_unfinished or runnable)

    def is_idle(self) -> bool:
        """Whether no sequence is left, no step is unfinished and every event was taken."""
        return not (self._by_id or self._events or self._running.num_unfinished)

    def _num_waiting(self) -> int:
        return len(self._waiting) + sum(map(len, self._compiling.values()))

    def counts(self) -> dict[str, int]:
        """Numbers of sequences now, and of events and tokens since the start, by their names in ``EngineStats``."""
        return {
            "running": len(self._running),
            "waiting": self._num_waiting(),
            "waiting_for_adapter": self._waiting.num_loading(),
            **self._counts,
        }

    def unbound_names(self) -> list[str]:
        """Names of the adapters that waiting sequences need and that are not bound to them yet."""
        return self._waiting.unbound_names(MAX_STATS_NAMES)

    # A step

    def plan(self, now: float) -> StepPlan:
        """The next step; empty when nothing can run, or when that depends on the results of unfinished steps."""
        self._expire(now)
        if self._grammars.is_compiling():
            self._enqueue_compiled(now)
        for sequence, error in self._waiting.prefetch_adapters(now):
            self._end(sequence, "length" if error is None else "error", now, error)
        if self._paused == "all":
            return self._make_plan({})
        if self._retries:
            return self._make_plan(self._next_retry())
        budget = StepBudget(self._limits.step_tokens, self._limits.step_logit_rows)
        try:
            self._prevent_starvation(now)
            self._grant_running(budget, now)
            self._grant_prompts(budget, now)
        except _ResultsNeeded:
            budget.counts.clear()
        return self._make_plan(budget.counts)

    def _make_plan(self, counts: dict[Sequence, int]) -> StepPlan:
        step = self._last_step + 1
        advance = self._running.advance
        chunks = [advance(sequence, counts[sequence], step) for sequence in sorted(counts, key=_row_order)]
        if chunks:
            self._last_step = step
            self._running.begin_step(step)
        return StepPlan(step, chunks)

    def commit(self, plan: StepPlan, results: Iterable[ChunkResult], now: float) -> None:
        """Record the results of the oldest unfinished step, of sequences that have not ended since it was planned."""
        self._running.end_step(plan.step, now)
        at, generated = self._running.at, 0
        for chunk, result in zip(plan.chunks, results, strict=True):
            sequence = at(chunk.seq_slot)
            if sequence is None:
                continue
            if not result.finite:
                # Its KV may be wrong: no other sequence may find these blocks.
                self._blocks.forget(sequence.table)
                self._fail(sequence, sequence.non_finite_error(), now)
                continue
            event = sequence.commit(chunk, result, now)
            if sequence.grammar_error is not None:
                self._fail_grammar(sequence, sequence.grammar_error, now)
                continue
            if sequence.num_committed >= sequence.table.due:
                self._running.commit_blocks(sequence, now)
            if chunk.spans:
                self._blocks.commit_states(sequence.table, sequence.num_committed, sequence.kept_borders, now)
            if event is None:
                continue
            generated += len(event.token_ids)
            if event.finish_reason is None:
                self._events.append(event)
            else:
                self._finish(sequence, event, now)
        self._counts["generated_tokens"] += generated

    def discard(self, plan: StepPlan, now: float) -> None:
        """Undo ``plan``, the newest one that is unfinished: it failed, or follows one that did."""
        for chunk in plan.chunks:
            sequence = self._running.at(chunk.seq_slot)
            if sequence is not None:
                sequence.undo(chunk)
                self._blocks.undo_states(sequence.table)
        self._running.end_step(plan.step, now)

    def retry(self, plan: StepPlan, error: TruffulaError, now: float) -> None:
        """Discard ``plan``, which failed, and run it again in halves, until only what fails alone ends with ``error``.

        The halves run one at a time, before anything else.
        """
        sequences = [self._running.at(chunk.seq_slot) for chunk in plan.chunks]
        self.discard(plan, now)
        if len(sequences) == 1 and sequences[0] is not None:
            self._fail(sequences[0], error, now)
            return
        parts = [(s, chunk.count) for s, chunk in zip(sequences, plan.chunks, strict=True) if s is not None]
        middle = len(parts) // 2
        self._retries += [parts[middle:], parts[:middle]]

    def _next_retry(self) -> dict[Sequence, int]:
        while self._retries and not self._running.num_unfinished:
            counts = {sequence: count for sequence, count in self._retries.pop() if sequence.seq_slot is not None}
            if counts:
                return counts
        return {}

    # 1. Deadlines

    def _expire(self, now: float) -> None:
        """End sequences that are out of time: ``queue_timeout`` if it never ran, ``deadline_exceeded`` if it did."""
        while self._timeouts and self._timeouts[0][0] <= now:
            _, serial, request_id = heapq.heappop(self._timeouts)
            sequence = self._by_id.get(request_id)
            if sequence is None or sequence.serial != serial:
                continue
            if self._timeout(sequence, now) > now:
                self._schedule_timeout(sequence, now)
            else:
                self._fail(sequence, sequence.timeout_error(now, loading=self._waiting.is_loading(sequence)), now)

    def _timeout(self, sequence: Sequence, now: float) -> float:
        """When it is out of time. While its adapter loads it does not count as waiting: a load has its own limits."""
        request = sequence.request
        timeout = math.inf if request.deadline is None else request.deadline
        if request.queue_deadline is not None and sequence.admitted_at is None:
            timeout = min(timeout, request.queue_deadline + self._waiting.load_time(sequence, now))
        return timeout

    def _schedule_timeout(self, sequence: Sequence, now: float) -> None:
        timeout = self._timeout(sequence, now)
        if timeout < math.inf:
            heapq.heappush(self._timeouts, (timeout, sequence.serial, sequence.request_id))

    # 3. Starvation

    def _prevent_starvation(self, now: float) -> None:
        """Preempt a sequence for an adapter that runs nothing and was refused ``patience`` times. A sequence that was
        refused four times as often is admitted before all others.
        """
        self._reserved_for = None
        patience = self._limits.patience
        late = [head for head in self._waiting.ready_heads() if head.refused_steps >= patience]
        if self._paused or not late:
            return
        running = self._running.count_by_key()
        starved = min((head for head in late if not running[head.key]), key=_age, default=None)
        victim = None if starved is None else self._running.newest_of_largest(at_least=2)
        if victim is not None:
            if self._running.num_unfinished:
                raise _ResultsNeeded
            self._preempt(victim, now)
            self._reserved_for = starved
        elif min(late, key=_age).refused_steps >= 4 * patience:
            self._reserved_for = min(late, key=_age)

    # 4. One token for each running sequence

    def _grant_running(self, budget: StepBudget, now: float) -> None:
        for sequence in self._running:
            if sequence.seq_slot is None or sequence.num_computed >= sequence.num_wanted:
                continue
            if sequence.needs_other_rope:
                if self._running.num_unfinished:
                    raise _ResultsNeeded
                self._preempt(sequence, now)
                continue
            if sequence.num_computed >= sequence.table.capacity and not self._add_block(sequence, budget, now):
                continue
            budget.counts[sequence] = 1  # as ``grant`` does: one token needs one row at most
            budget.tokens -= 1
            budget.rows -= 1

    def _add_block(self, sequence: Sequence, budget: StepBudget, now: float) -> bool:
        """Get a block for its next token, by preemption if none is left; False when it is preempted itself or ends."""
        while True:
            if self._blocks.extend(sequence.table, sequence.num_computed + 1):
                return True
            if self._running.num_unfinished:
                raise _ResultsNeeded
            victim = self._running.newest_of_largest()
            if victim is None:
                self._fail(sequence, self._running.too_large(sequence), now)
                return False
            budget.revoke(victim)
            budget.preempted = True
            self._preempt(victim, now)
            if victim is sequence:
                return False

    # 5. Prompts

    def _grant_prompts(self, budget: StepBudget, now: float) -> None:
        prompts: dict[AdapterKey, list[Sequence]] = {}
        for sequence in self._running:
            if sequence.num_wanted - sequence.num_computed > 1:
                prompts.setdefault(sequence.key, []).append(sequence)
        keys = dict.fromkeys(prompts)
        if len(self._running) >= self._limits.most_running:
            for head in self._waiting.ready_heads():
                head.refused_steps += 1
        else:
            keys.update((head.key, None) for head in self._waiting.ready_heads())
        turns = self._round_robin.order(keys) if keys else []
        while turns and budget.tokens > 0:
            next_turns = []
            for key in turns:
                spent = self._take_turn(key, prompts.setdefault(key, []), budget, now)
                if spent:
                    self._round_robin.end_turn(key, spent)
                    next_turns.append(key)
                if budget.tokens <= 0:
                    return
            turns = next_turns

    def _take_turn(self, key: AdapterKey, prompts: list[Sequence], budget: StepBudget, now: float) -> int:
        """One turn: first its running prompts, then at most one admission. Returns the tokens spent."""
        allowance = self._round_robin.begin_turn(key)
        spent = 0
        others = len(prompts) > 1 or self._waiting.ready_head(key) is not None
        for sequence in prompts:
            most = min(allowance - spent, budget.tokens)
            if others and sequence.num_uncomputed > LONG_STEPS * self._limits.step_tokens:
                most = -(-most // 2)
            spent += self._extend(sequence, most, budget)
        allowance = min(allowance - spent, budget.tokens)
        if allowance <= 0 or not self._may_admit(budget):
            return spent
        waiting = self._running.first_startable(self._waiting.candidates(key))
        if waiting is None or self._reserved_for not in (None, waiting):
            return spent
        count = self._try_admit(waiting, allowance, budget, now)
        if count:
            prompts.append(waiting)
        return spent + count

    def _extend(self, sequence: Sequence, allowance: int, budget: StepBudget) -> int:
        """Raise its grant by up to ``allowance`` tokens; returns by how many."""
        have = budget.counts.get(sequence, 0)
        count = have + min(allowance, sequence.num_uncomputed - have)
        count = sequence.fit(count, budget.rows + reserved_rows(sequence, have))
        if count <= have:
            return 0
        if not self._blocks.extend(sequence.table, sequence.num_computed + count):
            count = min(count, sequence.table.capacity - sequence.num_computed)
        return budget.grant(sequence, count) if count > have else 0

    def _may_admit(self, budget: StepBudget) -> bool:
        if self._paused:
            return False
        if len(self._running) >= self._limits.most_running or not self._running.has_free_slot() or budget.rows < 1:
            return False
        if budget.admitted >= MOST_ADMITTED:
            return False
        return self._reserved_for is not None or not (budget.preempted or budget.refusals >= MAX_REFUSALS)

    def _try_admit(self, sequence: Sequence, allowance: int, budget: StepBudget, now: float) -> int:
        """Admit it if possible. Returns the tokens granted; 0 when it must wait or has failed."""
        try:
            count = self._running.admit(sequence, allowance, budget.rows, now)
        except TruffulaError as error:
            self._fail(sequence, error, now)
            return 0
        if not count:
            sequence.refused_steps += 1
            budget.refusals += 1
            return 0
        self._waiting.remove(sequence)
        budget.admitted += sequence.num_tokens
        sequence.refused_steps = 0
        if sequence.admitted_at is None:
            sequence.admitted_at = now
            sequence.cached_tokens = max(0, min(sequence.num_computed, sequence.num_prompt) - sequence.num_virtual)
            self._counts["prompt_tokens"] += sequence.prompt_tokens
            self._counts["prefix_hit_tokens"] += sequence.cached_tokens
        return budget.grant(sequence, count)

    # Ends

    def _preempt(self, sequence: Sequence, now: float) -> None:
        """Release what it holds; it waits again, before all younger sequences of its adapter."""
        assert not self._running.num_unfinished, "an unfinished step may use what a preempted sequence holds"
        self._running.remove(sequence, now)
        self._waiting.push(sequence)
        self._counts["preemptions"] += 1

    def _fail(self, sequence: Sequence, error: TruffulaError, now: float) -> None:
        self._end(sequence, "error", now, error.info())

    def _fail_grammar(self, sequence: Sequence, error: TruffulaError, now: float) -> None:
        assert sequence.grammar is not None and sequence.matcher is not None
        self._grammars.drop_failed(sequence.grammar, sequence.matcher)
        self._fail(sequence, error, now)

    def _end(self, sequence: Sequence, reason: FinishReason, now: float, error: ErrorInfo | None = None) -> None:
        """End it with an event that has no token."""
        sequence.load_s = self._waiting.load_time(sequence, now)
        self._finish(sequence, sequence.final_event(reason, now, error=error), now)

    def _finish(self, sequence: Sequence, event: TokenEvent, now: float) -> None:
        """Release all it holds; ``event`` is its one final event."""
        self._events.append(event)
        if sequence.seq_slot is not None:
            self._running.remove(sequence, now)
        elif sequence.grammar is not None and sequence.matcher is None:
            self._remove_compiling(sequence, sequence.grammar.key)
        else:
            self._waiting.remove(sequence)
        for lease in sequence.loaded_leases.values():
            self._adapters.release(lease)
        del self._by_id[sequence.request_id]

    def _remove_compiling(self, sequence: Sequence, key: str) -> None:
        del self._compiling[key][sequence.serial]
        if not self._compiling[key]:
            del self._compiling[key]
