"""``EngineLoop``: one turn of an engine's life, the same under each transport."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from truffula.engine.engine import Engine
from truffula.errors import (
    AdapterLoadError,
    AdapterNotFound,
    CheckpointChanged,
    EngineDied,
    InsufficientMemory,
    TruffulaError,
    from_info,
)
from truffula.types import AdapterCommand, AdapterRef, AdapterState, EngineRequest, EngineStats, TokenEvent

LOAD_POLL_S = 0.005
"""How often an engine looks for finished adapter loads when it has nothing else to do."""


FILES_LOOK_S = 1.0
"""How often the files that weights are mapped from are looked at, and adapters tended, while idle too."""
ROOM_PATIENCE_S = 60.0
"""How long a load command waits for memory that running requests hold, once the adapter is read."""


@dataclass
class _Load:
    """A load command that is not answered yet; ``read_at``: when its adapter was there but for memory."""

    ticket: int
    ref: AdapterRef
    read_at: float | None = None


@dataclass(frozen=True)
class AdapterAnswer:
    """The end of an adapter command: states, or why not."""

    ticket: int
    states: tuple[AdapterState, ...] = ()
    error: TruffulaError | None = None


@dataclass(frozen=True)
class Turn:
    """What one turn gave."""

    events: list[TokenEvent]
    answers: list[AdapterAnswer]


class EngineLoop:
    """Owns the engine: everything that reaches it goes through here, in one thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        # Not by ticket: after an engine's death its pinned adapters are asked for again, all under one.
        self._loads: list[_Load] = []
        self._looked_at = self._looked_at_files = 0.0
        self._answers: list[AdapterAnswer] = []

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        for request in requests:
            self._engine.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)

    def command(self, ticket: int, command: AdapterCommand) -> None:
        """Begin an adapter command; a later ``turn`` answers it under ``ticket``."""
        try:
            states = self._engine.command(command)
        except TruffulaError as error:
            self._answers.append(AdapterAnswer(ticket, error=error))
            return
        if command.action == "load" and command.ref is not None:
            self._loads.append(_Load(ticket, command.ref))
            self._engine.claim(command.ref)
            self._judge_loads()
        else:
            self._answers.append(AdapterAnswer(ticket, tuple(states)))

    def turn(self) -> Turn:
        """One step at most. Raises only when the engine itself is at fault; nothing more can be asked of it then."""
        if self._clock() - self._looked_at_files >= FILES_LOOK_S:
            self._engine.check_files()
            if self._engine.idle() and not self._loads:
                self._engine.tend()  # what steps do otherwise
            self._looked_at_files = self._clock()
        # Before the step: however long the last one took, what a load waits for was looked at when idle things go.
        if self._loads and self._clock() - self._looked_at >= LOAD_POLL_S:
            self._judge_loads()
        events = [] if self._engine.idle() and not self._loads else self._engine.step()
        answers, self._answers = self._answers, []
        return Turn(events, answers)

    def rest(self) -> float | None:
        """Seconds until the next turn is worth it: 0 with work, None when only something new can bring some."""
        if self._engine.has_work() or self._answers:
            return 0.0
        return None if self._engine.idle() and not self._loads else LOAD_POLL_S

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        self._engine.close()

    def _judge_loads(self) -> None:
        self._looked_at = self._clock()
        for load in list(self._loads):
            try:
                state = self._engine.settle(load.ref)
                if state is not None and state.status == "ready":
                    self._wait_for_room(load, state)
                    continue
                answer = load_outcome(load.ticket, load.ref, state)
            except TruffulaError as error:
                answer = AdapterAnswer(load.ticket, error=error)
            if answer is not None:
                self._loads.remove(load)
                self._engine.disclaim(load.ref)
                self._answers.append(answer)

    def _wait_for_room(self, load: _Load, state: AdapterState) -> None:
        """Raises ``InsufficientMemory`` when nothing is left to wait for, or after ``ROOM_PATIENCE_S``."""
        load.read_at = self._looked_at if load.read_at is None else load.read_at
        waited = self._looked_at - load.read_at
        if self._engine.idle() or waited >= ROOM_PATIENCE_S:
            raise InsufficientMemory(
                f"Adapter {load.ref.name!r} takes {state.nbytes} bytes, and running or pinned adapters leave no room "
                f"(waited {waited:.0f} s). Unload other adapters, try again later, or raise --memory.",
                requested_bytes=state.nbytes,
            )


def load_outcome(ticket: int, ref: AdapterRef, state: AdapterState | None) -> AdapterAnswer | None:
    """How the load of ``ref`` stands, which is in ``state``: None while it goes on."""
    if state is None:
        what = f"Adapter {ref.name!r} was unloaded while it was loading."
        return AdapterAnswer(ticket, error=AdapterNotFound(what, param="adapter"))
    if state.status == "loading":
        return None
    if state.status == "failed":
        lost = AdapterLoadError(f"Adapter {ref.name!r} failed to load.")
        return AdapterAnswer(ticket, error=lost if state.error is None else from_info(state.error))
    return AdapterAnswer(ticket, (state,))


def engine_fault(error: BaseException) -> TruffulaError:
    """What ended an engine as what its requests end with; a fault of its own shows its traceback on stderr."""
    if isinstance(error, CheckpointChanged):
        return error
    traceback.print_exception(error, file=sys.stderr)
    return EngineDied(f"The engine failed: {type(error).__name__}: {error}.", cause=type(error).__name__)


def close_engine(loop: EngineLoop) -> None:
    """Close an engine that may be broken; what that meets is shown and stops nobody."""
    try:
        loop.close()
    except Exception as error:  # noqa: BLE001  the end goes on
        traceback.print_exception(error, file=sys.stderr)
