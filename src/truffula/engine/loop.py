"""``EngineLoop``: one turn of an engine's life, the same under each transport."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from truffula.engine.engine import Engine
from truffula.errors import AdapterLoadError, AdapterNotFound, EngineDied, TruffulaError, from_info
from truffula.types import AdapterCommand, AdapterState, EngineRequest, EngineStats, TokenEvent

LOAD_POLL_S = 0.005
"""How often an engine looks for finished adapter loads when it has nothing else to do."""


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
        self._loads: dict[int, str] = {}  # ticket of a load that has not ended, and the adapter's name
        self._looked_at = 0.0
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
            self._loads[ticket] = command.ref.name
            self._judge_loads(states)
        else:
            self._answers.append(AdapterAnswer(ticket, tuple(states)))

    def turn(self) -> Turn:
        """One step at most. Raises only when the engine itself is at fault; nothing more can be asked of it then."""
        events = [] if self._engine.idle() and not self._loads else self._engine.step()
        if self._loads and self._clock() - self._looked_at >= LOAD_POLL_S:
            self._judge_loads(self._engine.command(AdapterCommand(action="list")))
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

    def _judge_loads(self, states: Sequence[AdapterState]) -> None:
        self._looked_at = self._clock()
        for ticket, name in list(self._loads.items()):
            answer = load_outcome(ticket, name, states)
            if answer is not None:
                del self._loads[ticket]
                self._answers.append(answer)


def load_outcome(ticket: int, name: str, states: Sequence[AdapterState]) -> AdapterAnswer | None:
    """How the load of ``name`` stands: None while it goes on. Generations that only end (retired) don't count."""
    rows = [state for state in states if state.name == name and state.status != "retired"]
    if any(row.status == "loading" for row in rows):
        return None
    for row in rows:
        if row.status == "failed":
            error = (
                from_info(row.error) if row.error is not None else AdapterLoadError(f"Adapter {name!r} failed to load.")
            )
            return AdapterAnswer(ticket, error=error)
    if not rows:
        error = AdapterNotFound(f"Adapter {name!r} was unloaded while it was loading.", param="adapter")
        return AdapterAnswer(ticket, error=error)
    return AdapterAnswer(ticket, tuple(rows))


def engine_fault(error: BaseException) -> TruffulaError:
    """A fault of the engine's own as what its requests end with; the traceback goes to stderr, for the operator."""
    traceback.print_exception(error, file=sys.stderr)
    return EngineDied(f"The engine failed: {type(error).__name__}: {error}.", cause=type(error).__name__)


def close_engine(loop: EngineLoop) -> None:
    """Close an engine that may be broken; what that meets is shown and stops nobody."""
    try:
        loop.close()
    except Exception as error:  # noqa: BLE001  the end goes on
        traceback.print_exception(error, file=sys.stderr)
