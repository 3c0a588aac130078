"""``EngineLoop``: what one iteration of an engine's loop does, the same in both transports."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from truffula.engine.engine import Engine
from truffula.engine.journal import Reply
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
"""How often an engine without other work checks for finished adapter loads."""
FILES_LOOK_S = 1.0
"""How often an engine checks the files that weights are mapped from, and an idle one its loading workers."""
ROOM_PATIENCE_S = 60.0
"""How long a load command waits for memory that running requests hold, once the adapter is read."""


@dataclass
class _Load:
    """A load command that is not answered yet; ``read_at``: when its adapter lacked nothing but memory."""

    reply: Reply
    ref: AdapterRef
    read_at: float | None = None


class EngineLoop:
    """Owns the engine: every call to it is made here, by one thread at a time."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._loads: list[_Load] = []
        self._looked_at = self._looked_at_files = 0.0

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        for request in requests:
            self._engine.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)

    def command(self, command: AdapterCommand) -> Reply:
        """Begin an adapter command. The reply gets its result or its ``TruffulaError`` here or in a later ``turn``."""
        reply: Reply = Future()
        try:
            states = self._engine.command(command)
        except TruffulaError as error:
            reply.set_exception(error)
            return reply
        if command.action == "load" and command.ref is not None:
            self._loads.append(_Load(reply, command.ref))
            self._engine.claim(command.ref)
            self._check_loads()
        else:
            reply.set_result(states)
        return reply

    def turn(self) -> list[TokenEvent]:
        """Make one step at most; returns the events since the last one.

        Raises only when the engine itself has failed; it cannot be used any more then.
        """
        if self._clock() - self._looked_at_files >= FILES_LOOK_S:
            self._engine.check_files()
            if self._engine.idle() and not self._loads:
                self._engine.tend()  # what steps do otherwise
            self._looked_at_files = self._clock()
        # Before the step: however long the last one took, a load is checked before its adapter can be evicted as idle.
        if self._loads and self._clock() - self._looked_at >= LOAD_POLL_S:
            self._check_loads()
        return [] if self._engine.idle() and not self._loads else self._engine.step()

    def rest(self) -> float | None:
        """Seconds until the next turn has something to do: 0 with work, None when only a new call can bring some."""
        if self._engine.has_work():
            return 0.0
        return None if self._engine.idle() and not self._loads else LOAD_POLL_S

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        self._engine.close()

    def _check_loads(self) -> None:
        self._looked_at = self._clock()
        for load in list(self._loads):
            states: list[AdapterState] = []
            failed: TruffulaError | None = None
            try:
                state = self._engine.settle(load.ref)
                if state is not None and state.status == "ready":
                    self._wait_for_memory(load, state)
                    continue
                states = loaded_states(load.ref, state)
                if not states:
                    continue
            except TruffulaError as error:
                failed = error
            self._loads.remove(load)
            self._engine.disclaim(load.ref)
            if failed is not None:
                load.reply.set_exception(failed)
            else:
                load.reply.set_result(states)

    def _wait_for_memory(self, load: _Load, state: AdapterState) -> None:
        """Raises ``InsufficientMemory`` when no request can release any more, or after ``ROOM_PATIENCE_S``."""
        load.read_at = self._looked_at if load.read_at is None else load.read_at
        waited = self._looked_at - load.read_at
        if self._engine.idle() or waited >= ROOM_PATIENCE_S:
            raise InsufficientMemory(
                f"Adapter {load.ref.name!r} takes {state.nbytes} bytes, and running or pinned adapters leave no room "
                f"(waited {waited:.0f} s). Unload other adapters, try again later, or raise --memory.",
                requested_bytes=state.nbytes,
            )


def loaded_states(ref: AdapterRef, state: AdapterState | None) -> list[AdapterState]:
    """``state`` of a load of ``ref`` that has succeeded; empty while it is loading. Raises why it failed."""
    if state is None:
        raise AdapterNotFound(f"Adapter {ref.name!r} was unloaded while it was loading.", param="adapter")
    if state.status == "loading":
        return []
    if state.status == "failed":
        unknown = AdapterLoadError(f"Adapter {ref.name!r} failed to load.")
        raise unknown if state.error is None else from_info(state.error)
    return [state]


def outcome(reply: Reply) -> tuple[list[AdapterState], TruffulaError | None]:
    """The states and the error of a reply that is there; one of them is empty."""
    error = reply.exception()
    if error is None:
        return reply.result(), None
    assert isinstance(error, TruffulaError), error
    return [], error


def engine_error(error: BaseException) -> TruffulaError:
    """What ended an engine, as the error of its open requests. An unexpected one prints its traceback to stderr."""
    if isinstance(error, CheckpointChanged):
        return error
    if isinstance(error, TruffulaError):  # one that the engine raises on purpose: its device is lost
        return EngineDied(f"The engine failed: {error.message}", cause=error.code)
    traceback.print_exception(error, file=sys.stderr)
    return EngineDied(f"The engine failed: {type(error).__name__}: {error}.", cause=type(error).__name__)


def close_engine(loop: EngineLoop) -> None:
    """Close an engine that may be broken; an exception of that is printed to stderr."""
    try:
        loop.close()
    except Exception as error:  # noqa: BLE001  the caller is ending the engine for another reason
        traceback.print_exception(error, file=sys.stderr)
