"""Engine: plans, submits and commits one step after another. Synchronous; it handles neither text nor HTTP.

Both transports drive it the same way: ``add``, ``abort``, ``command`` and ``control`` between steps, then ``wait`` for
``poll_timeout()`` seconds at most, then ``step``.
"""

from __future__ import annotations

import logging
import select
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from truffula.engine.blocks import BlockPool
from truffula.engine.budget import MemoryBudget
from truffula.engine.constraints import GrammarCompiler
from truffula.engine.limits import EngineLimits
from truffula.engine.plan import StepPlan
from truffula.engine.runner import ModelRunner, split_output
from truffula.engine.scheduler import Scheduler
from truffula.errors import (
    CheckpointChanged,
    DeviceLost,
    EngineDied,
    GenerationError,
    InvalidRequest,
    ShuttingDown,
    TruffulaError,
)
from truffula.kernels.backend import Executable, PendingStep
from truffula.kernels.inputs import Int32
from truffula.lora.generations import OWNER
from truffula.lora.pool import AdapterPool
from truffula.types import (
    MAX_STATS_NAMES,
    AdapterCommand,
    AdapterState,
    EngineAction,
    EngineRequest,
    EngineStats,
    TokenEvent,
    Vocabulary,
)
from truffula.weights.watch import FileWatch

logger = logging.getLogger(__name__)

FILES_CHECK_S = 1.0
"""How often the files that weights are mapped from are checked. An idle engine is stepped this often for it."""
DEADLINE_CHECK_S = 0.1
"""How often the deadlines of requests are checked while they all wait for adapters."""
COMPILE_POLL_S = 0.002
"""How often an engine without other work looks for compiled grammars."""


class Engine:
    """One model, its adapters and their requests. Used by one thread at a time.

    The engine owns ``executable``, ``adapters``, ``budget`` and ``watch`` (over the files that weights are mapped
    from); ``close`` closes them. ``clock`` gives monotonic seconds (the pool's and the requests' clock). Every
    request gets exactly one final event.
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
            limits.num_blocks,
            limits.kv_layout(executable.depth),
            budget=budget,
            num_states=limits.num_states,
            release_memory=self._release_memory,
            prefix_cache=limits.prefix_cache,
        )
        self._runner = ModelRunner(executable, limits)
        self._grammars = GrammarCompiler(limits.vocab_size, limits.eos_token_ids)
        self._scheduler = Scheduler(limits, self._blocks, adapters, self._grammars)
        self._submitted: deque[tuple[StepPlan, PendingStep]] = deque()
        self._steps = 0
        self._pauses: list[tuple[EngineAction, Future[list[AdapterState]]]] = []  # that are not in effect yet
        self._files_checked_at = float("-inf")

    def _release_memory(self, group: int, blocks: Int32) -> None:
        if group < len(self.limits.kv_windows):
            self._executable.release_kv(group, blocks)
        else:
            self._executable.release_states(blocks)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the tokens for the grammars of later requests; only the first call counts."""
        self._grammars.set_vocabulary(vocabulary)

    def add(self, request: EngineRequest) -> None:
        """Accept ``request``. A bad one is answered by a final error event of the next step, never by an exception."""
        self._scheduler.add(request, self._clock())

    def abort(self, request_id: str) -> None:
        """End a request: its final event comes with the next step. Its blocks and lease are released immediately, or,
        if an unfinished step computes it, with that step's result.
        """
        self._scheduler.abort(request_id, self._clock())

    def step(self) -> list[TokenEvent]:
        """Submit at most one step and take the result of at most one. Returns the events since the last call.

        Up to ``executable.depth`` steps are unfinished: with 2, a step is planned and submitted before the result of
        the one before is known. A step that fails is run again in halves; a request that fails alone ends with
        ``generation_failed``.

        Raises (the engine cannot be used after either):
            DeviceLost: The executable can compute nothing any more.
            CheckpointChanged: A file that weights may be mapped from was written to.
        """
        self._check_files()
        self._adapters.poll(self._clock(), idle=self.idle())
        plan = self._scheduler.plan(self._clock())
        if plan.chunks:
            self._submit(plan)
        if self._submitted and (not plan.chunks or len(self._submitted) >= self._executable.depth):
            self._finish_oldest()
        if self._pauses:
            self._answer_pauses()
        return self._scheduler.take_events()

    def _submit(self, plan: StepPlan) -> None:
        self._steps += 1
        try:
            self._submitted.append((plan, self._runner.submit(plan)))
        except Exception as error:  # noqa: BLE001  any error may concern one sequence alone
            self._retry(plan, error)

    def _finish_oldest(self) -> None:
        plan, step = self._submitted.popleft()
        try:
            results = split_output(plan.chunks, step.result())
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
            try:
                step.result()
            except Exception as error:
                logger.debug("step %d, which is discarded, failed", plan.step, exc_info=error)
            self._scheduler.discard(plan, self._clock())

    def _check_files(self) -> None:
        now = self._clock()
        if self._watch is not None and now - self._files_checked_at >= FILES_CHECK_S:
            self._watch.check()
            self._files_checked_at = now

    def idle(self) -> bool:
        """Whether no request is left and every event was taken."""
        return self._scheduler.is_idle()

    def command(self, command: AdapterCommand) -> Future[list[AdapterState]]:
        """Begin an adapter command. The future is done on return, or in a later ``step`` for a load: see the pool."""
        return self._adapters.command(command, self._clock())

    def control(self, action: EngineAction) -> Future[list[AdapterState]]:
        """Begin an action; its future, of an empty list, is done on return, or in a later ``step`` for ``pause`` and
        ``drain``. A paused engine still ends requests that are out of time, and loads adapters.
        """
        done: Future[list[AdapterState]] = Future()
        if action == "pause" or action == "drain":
            self._scheduler.pause(drain=action == "drain")
            self._pauses.append((action, done))
            return done
        if action == "resume":
            self._scheduler.resume()
            self._fail_pauses(InvalidRequest("The engine was resumed before it was paused or drained."))
        else:
            self._blocks.reset_index()
        done.set_result([])
        return done

    def _answer_pauses(self) -> None:
        for action, done in list(self._pauses):
            if self._scheduler.has_stopped(drained=action == "drain"):
                self._pauses.remove((action, done))
                done.set_result([])

    def _fail_pauses(self, error: TruffulaError) -> None:
        for _, done in self._pauses:
            done.set_exception(error)
        self._pauses.clear()

    def poll_timeout(self) -> float | None:
        """Seconds to ``wait`` at most before the next ``step``: 0 when there is work now, None when only a call or a
        loading worker can bring some.
        """
        timeout = 0.0 if self._scheduler.has_work() else self._adapters.poll_timeout()
        if self._grammars.is_compiling():
            return COMPILE_POLL_S if timeout is None else min(timeout, COMPILE_POLL_S)
        if self.idle():
            return timeout
        return DEADLINE_CHECK_S if timeout is None else min(timeout, DEADLINE_CHECK_S)

    def is_loading(self) -> bool:
        """Whether a loading worker is reading an adapter."""
        return bool(self._adapters.poll_fds())

    def wait(self, timeout: float | None, fd: int) -> None:
        """Wait until ``fd`` can be read, a loading worker has something, or ``timeout`` seconds have passed."""
        if timeout == 0:
            return
        waiter = select.poll()
        waiter.register(fd, select.POLLIN)
        for other, events in self._adapters.poll_fds().items():
            waiter.register(other, events)
        waiter.poll(None if timeout is None else timeout * 1000)

    def stats(self) -> EngineStats:
        """Current counts and totals. Costs the same however many requests wait."""
        blocks, adapters = self._blocks, self._adapters
        loading = dict.fromkeys(adapters.loads.names() + self._scheduler.unbound_names())
        return EngineStats(
            monotonic=self._clock(),
            paused=self._scheduler.is_paused(),
            steps=self._steps,
            free_blocks=blocks.num_free(),
            cached_blocks=blocks.num_cached(),
            used_blocks=blocks.num_used(),
            num_blocks=blocks.num_blocks * blocks.layout.num_groups,
            kv_used_bytes=blocks.used_bytes(),
            kv_cached_bytes=blocks.cached_bytes(),
            adapter_loads=adapters.loads.completed,
            adapter_loads_by_name=dict(adapters.loads.completed_by_name),
            adapter_load_failures=adapters.loads.failed,
            adapter_evictions=adapters.evictions,
            adapters_resident=adapters.resident,
            resident_names=adapters.resident_names(MAX_STATS_NAMES),
            loading_names=list(loading)[:MAX_STATS_NAMES],
            adapter_bytes=adapters.resident_bytes,
            adapter_limit_bytes=self._budget.limit_of(OWNER),
            budget_bytes=self._budget.limit,
            budget_used_bytes=self._budget.total_used(),
            **self._scheduler.counts(),
        )

    def close(self) -> list[TokenEvent]:
        """End every request with ``shutting_down``, then free everything. Returns the last events. Idempotent."""
        self._scheduler.end_all(ShuttingDown("The engine was closed."), self._clock())
        self._discard_submitted()
        self._fail_pauses(ShuttingDown("The engine was closed."))
        self._grammars.close()
        self._runner.close()
        self._adapters.close()
        self._executable.close()
        if self._watch is not None:
            self._watch.close()
        return self._scheduler.take_events()


def engine_error(error: BaseException) -> TruffulaError:
    """What ended an engine, as the error of its open requests. An unexpected one prints its traceback to stderr."""
    if isinstance(error, CheckpointChanged):
        return error
    if isinstance(error, TruffulaError):  # one that the engine raises on purpose: its device is lost
        return EngineDied(f"The engine failed: {error.message}", cause=error.code)
    traceback.print_exception(error, file=sys.stderr)
    return EngineDied(f"The engine failed: {type(error).__name__}: {error}.", cause=type(error).__name__)


def close_engine(engine: Engine) -> None:
    """Close an engine that may be broken; an exception of that is printed to stderr."""
    try:
        engine.close()
    except Exception as error:  # noqa: BLE001  the caller is ending the engine for another reason
        traceback.print_exception(error, file=sys.stderr)
