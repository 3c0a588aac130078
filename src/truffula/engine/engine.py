"""Engine: schedule, run, book, one step at a time. Synchronous; knows nothing of text, HTTP or asyncio."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from truffula.engine.blocks import BlockPool
from truffula.engine.budget import MemoryBudget
from truffula.engine.grants import StepCapacity
from truffula.engine.limits import EngineLimits
from truffula.engine.runner import ModelRunner
from truffula.engine.scheduler import Scheduler
from truffula.errors import AdapterNotFound, GenerationError, ShuttingDown
from truffula.kernels.backend import Executable
from truffula.lora.pool import AdapterPool
from truffula.types import AdapterCommand, AdapterRef, AdapterState, EngineRequest, EngineStats, TokenEvent
from truffula.weights.watch import FileWatch

__all__ = ["Engine", "EngineLimits"]

logger = logging.getLogger(__name__)


class Engine:
    """One model, its adapters, and everybody who waits for tokens of them. One owner, one thread.

    ``executable``, ``adapters``, ``budget`` and ``watch`` (over the files that weights are mapped from) are the
    engine's from here on; ``close`` closes them. ``clock`` gives monotonic seconds (the pool's and the requests'
    clock). Every request added is answered by exactly one final event.
    """

    def __init__(
        self,
        executable: Executable,
        limits: EngineLimits,
        adapters: AdapterPool,
        budget: MemoryBudget,
        *,
        watch: FileWatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._executable = executable
        self._adapters = adapters
        self._budget = budget
        self._watch = watch
        self._clock = clock
        self._blocks = BlockPool(
            limits.num_blocks, limits.block_size, budget=budget, block_bytes=limits.kv_block_bytes,
            prefix_cache=limits.prefix_cache,
        )  # fmt: skip
        self._runner = ModelRunner(executable, limits.block_size, limits.max_model_len)
        runner = self._runner
        capacity = StepCapacity(runner.max_tokens, runner.max_rows, runner.max_seqs, runner.max_segments)
        self._scheduler = Scheduler(limits, self._blocks, adapters, capacity)
        self._steps = 0

    def add(self, request: EngineRequest) -> None:
        """Accept ``request``. A bad one is answered by a final error event of the next step, never by an exception."""
        self._scheduler.add(request, self._clock())

    def abort(self, request_id: str) -> None:
        """End a request: its blocks and lease are free when this returns, its final event comes with the next step."""
        self._scheduler.abort(request_id, self._clock())

    def step(self) -> list[TokenEvent]:
        """At most one forward pass; the events of everything that happened since the last one.

        A fault of the forward pass ends the requests in it with ``generation_failed``; the engine goes on.
        """
        now = self._clock()
        self._adapters.poll(now)
        plan = self._scheduler.schedule(now)
        if plan.chunks:
            self._steps += 1
            try:
                results = self._runner.run(plan)
            except Exception as error:
                logger.exception("step %d failed with %d sequences", self._steps, len(plan.chunks))
                failure = GenerationError(f"The step that computed it failed: {type(error).__name__}: {error}")
                self._scheduler.fail_step(plan, failure, self._clock())
            else:
                self._scheduler.update(plan, results, self._clock())
        return self._scheduler.take_events()

    def check_files(self) -> None:
        """Raises ``CheckpointChanged`` when a file that weights may be mapped from was written to."""
        if self._watch is not None:
            self._watch.check()

    def tend(self) -> None:
        """What an idle engine does now and then: loads that nobody waits for are taken in, idle workers ended."""
        self._adapters.poll(self._clock())

    def has_work(self) -> bool:
        """Whether ``step`` would do something at once.

        False while everything waits for adapters to load: then call ``step`` every few milliseconds, or as soon as the
        loader has news; loads and deadlines are noticed there.
        """
        return bool(self._scheduler.roster.events) or self._scheduler.startable()

    def idle(self) -> bool:
        """Whether no request is left and every event was taken."""
        return not len(self._scheduler.roster) and not self._scheduler.roster.events

    def command(self, command: AdapterCommand) -> list[AdapterState]:
        """Carry out an adapter command without waiting; the states of what it concerns (``list``: all).

        After ``load`` call ``claim``, then ``settle`` until the state is resident or failed, then ``disclaim``. Raises
        ``AdapterNotFound`` when there is nothing to unload.
        """
        ref = command.ref
        if command.action == "load" and ref is not None:
            if command.pinned:
                self._adapters.pin(ref)
            self._adapters.retry(ref)
            self._adapters.want(ref, self._clock())
        elif command.action == "unload" and ref is not None and not self._adapters.unload(ref.name):
            raise AdapterNotFound(f"Adapter {ref.name!r} is not loaded.", param="adapter")
        states = self._adapters.states()
        return states if ref is None or command.action == "list" else [s for s in states if s.name == ref.name]

    def claim(self, ref: AdapterRef) -> None:
        """Keep what is loaded of a place, though it has no memory yet, until ``disclaim``."""
        self._adapters.claim(ref)

    def disclaim(self, ref: AdapterRef) -> None:
        """End one ``claim``."""
        self._adapters.disclaim(ref)

    def settle(self, ref: AdapterRef) -> AdapterState | None:
        """Give a loaded adapter its memory as soon as that is free. Where it stands; None when nothing is known of it.

        Raises ``InsufficientMemory`` when it never fits, and what the executable says against it.
        """
        self._adapters.settle(ref)
        return self._adapters.state(ref)

    def stats(self) -> EngineStats:
        roster, blocks, adapters = self._scheduler.roster, self._blocks, self._adapters
        return EngineStats(
            monotonic=self._clock(),
            steps=self._steps,
            running=len(roster.running),
            waiting=len(roster.waiting),
            waiting_for_adapter=sum(s.loading_since is not None for s in roster.waiting),
            free_blocks=blocks.num_free(),
            cached_blocks=blocks.num_cached(),
            used_blocks=blocks.num_used(),
            num_blocks=blocks.num_blocks,
            preemptions=roster.preemptions,
            prompt_tokens=roster.prompt_tokens,
            prefix_hit_tokens=roster.prefix_hit_tokens,
            generated_tokens=self._scheduler.generated_tokens,
            adapter_loads=adapters.loads,
            adapter_loads_by_name=dict(adapters.loads_by_name),
            adapter_load_failures=adapters.failures,
            adapter_evictions=adapters.evictions,
            adapters_resident=adapters.resident,
            adapter_bytes=adapters.resident_bytes,
            budget_bytes=self._budget.limit,
            budget_used_bytes=self._budget.total_used(),
        )

    def check(self) -> None:
        """Raise AssertionError when any owner's books are wrong. For tests and for an idle engine."""
        self._scheduler.check()
        self._budget.check()
        self._adapters.check()

    def close(self) -> list[TokenEvent]:
        """End every request with ``shutting_down``, then free everything. Returns the last events. Idempotent."""
        now = self._clock()
        for sequence in self._scheduler.roster.all():
            self._scheduler.roster.fail(sequence, ShuttingDown("The engine was closed."), now)
        self._adapters.close()
        self._executable.close()
        if self._watch is not None:
            self._watch.close()
        return self._scheduler.take_events()
