"""Engine: plan, submit, commit, step after step. Synchronous; knows nothing of text, HTTP or asyncio."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from truffula.engine.blocks import BlockPool
from truffula.engine.budget import MemoryBudget
from truffula.engine.limits import EngineLimits, StepCapacity
from truffula.engine.plan import StepPlan
from truffula.engine.runner import ModelRunner, SubmittedStep
from truffula.engine.scheduler import Scheduler
from truffula.errors import ConfigError, DeviceLost, GenerationError, ShuttingDown
from truffula.kernels.backend import Executable
from truffula.lora.pool import AdapterPool
from truffula.types import AdapterCommand, AdapterState, EngineRequest, EngineStats, TokenEvent
from truffula.weights.watch import FileWatch

__all__ = ["Engine", "EngineLimits"]

logger = logging.getLogger(__name__)


class Engine:
    """One model, its adapters, and the requests for tokens of them. One owner, one thread.

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
        groups = len(executable.inputs.block_tables)
        if groups != len(limits.kv_windows):
            raise ConfigError(
                f"kv_windows is {limits.kv_windows}; the executable has {groups} KV groups.", param="kv_windows"
            )
        self._blocks = BlockPool(
            limits.num_blocks, limits.kv_layout(executable.depth), budget=budget, prefix_cache=limits.prefix_cache
        )
        self._runner = ModelRunner(executable, limits.block_size, limits.max_model_len)
        runner = self._runner
        capacity = StepCapacity(runner.max_tokens, runner.max_rows, runner.max_seqs, runner.max_segments)
        self._scheduler = Scheduler(limits, self._blocks, adapters, capacity)
        self._submitted: deque[tuple[StepPlan, SubmittedStep]] = deque()
        self._steps = 0

    def add(self, request: EngineRequest) -> None:
        """Accept ``request``. A bad one is answered by a final error event of the next step, never by an exception."""
        self._scheduler.add(request, self._clock())

    def abort(self, request_id: str) -> None:
        """End a request: its final event comes with the next step. Its blocks and lease are released immediately, or,
        if an unfinished step computes it, with that step's result.
        """
        self._scheduler.abort(request_id, self._clock())

    def step(self) -> list[TokenEvent]:
        """Submit at most one step and take the result of at most one; the events of all that happened since the last
        call.

        ``executable.depth`` steps are unfinished at a time: with 2, a step is planned and submitted before the result
        of the one before is known. If a step fails, the requests that fail alone too end with ``generation_failed``.

        Raises:
            DeviceLost: The executable can compute nothing any more.
        """
        self._adapters.poll(self._clock(), idle=self._scheduler.is_idle())
        plan = self._scheduler.plan(self._clock())
        if plan.chunks:
            self._submit(plan)
        if self._submitted and (not plan.chunks or len(self._submitted) >= self._executable.depth):
            self._finish_oldest()
        return self._scheduler.take_events()

    def _submit(self, plan: StepPlan) -> None:
        self._steps += 1
        try:
            self._submitted.append((plan, self._runner.submit(plan)))
        except Exception as error:  # noqa: BLE001  whatever it is, it may concern one sequence alone
            self._retry(plan, error)

    def _finish_oldest(self) -> None:
        plan, step = self._submitted.popleft()
        try:
            results = step.result()
        except Exception as error:  # noqa: BLE001  as above
            self._discard_submitted()
            self._retry(plan, error)
        else:
            self._scheduler.commit(plan, results, self._clock())

    def _retry(self, plan: StepPlan, error: Exception) -> None:
        if isinstance(error, DeviceLost):
            raise error
        if len(plan.chunks) == 1:
            logger.error("step %d failed with one sequence, which ends", plan.step, exc_info=error)
        else:
            logger.warning(
                "step %d of %d sequences failed (%s); running it in halves", plan.step, len(plan.chunks), error
            )
        reason = GenerationError(f"The step that computed it failed: {type(error).__name__}: {error}")
        self._scheduler.retry(plan, reason, self._clock())

    def _discard_submitted(self) -> None:
        """Wait for all unfinished steps and ignore what they computed: they are planned again."""
        while self._submitted:
            plan, step = self._submitted.pop()
            with contextlib.suppress(Exception):
                step.result()
            self._scheduler.discard(plan, self._clock())

    def check_files(self) -> None:
        """Raises ``CheckpointChanged`` when a file that weights may be mapped from was written to."""
        if self._watch is not None:
            self._watch.check()

    def has_work(self) -> bool:
        """Whether ``step`` would do something now.

        False while every request waits for an adapter: ``poll_fds`` and ``poll_timeout`` tell when to call it then.
        """
        return self._scheduler.has_work()

    def idle(self) -> bool:
        """Whether no request is left and every event was taken."""
        return self._scheduler.is_idle()

    def command(self, command: AdapterCommand) -> Future[list[AdapterState]]:
        """Begin an adapter command. The future is done here, or in a later ``step`` for a load: see the pool."""
        return self._adapters.command(command, self._clock())

    def poll_fds(self) -> dict[int, int]:
        """File descriptors and events (``select.poll``) after which ``step`` has something to do."""
        return self._adapters.poll_fds()

    def poll_timeout(self) -> float | None:
        """Seconds until ``step`` has something to do without a call or an event on ``poll_fds``; None: never."""
        return 0.0 if self.has_work() else self._adapters.poll_timeout()

    def stats(self) -> EngineStats:
        """Where the engine stands. Costs the same however many requests wait."""
        blocks, adapters = self._blocks, self._adapters
        return EngineStats(
            monotonic=self._clock(),
            steps=self._steps,
            free_blocks=blocks.num_free(),
            cached_blocks=blocks.num_cached(),
            used_blocks=blocks.num_used(),
            num_blocks=blocks.num_blocks * blocks.layout.num_groups,
            kv_used_bytes=blocks.used_bytes(),
            kv_cached_bytes=blocks.cached_bytes(),
            adapter_loads=adapters.loads,
            adapter_loads_by_name=dict(adapters.loads_by_name),
            adapter_load_failures=adapters.failures,
            adapter_evictions=adapters.evictions,
            adapters_resident=adapters.resident,
            adapter_bytes=adapters.resident_bytes,
            budget_bytes=self._budget.limit,
            budget_used_bytes=self._budget.total_used(),
            **self._scheduler.counts(),
        )

    def check(self) -> None:
        """Raise AssertionError when any owner's books are wrong. For tests and for an idle engine."""
        self._scheduler.check()
        self._budget.check()
        self._adapters.check()

    def close(self) -> list[TokenEvent]:
        """End every request with ``shutting_down``, then free everything. Returns the last events. Idempotent."""
        self._scheduler.end_all(ShuttingDown("The engine was closed."), self._clock())
        self._discard_submitted()
        self._adapters.close()
        self._executable.close()
        if self._watch is not None:
            self._watch.close()
        return self._scheduler.take_events()
