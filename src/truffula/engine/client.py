"""``EngineClient``: the interface of an engine to the service; ``start_engine`` and ``connect`` make one.

Two transports implement it: ``engine/inline.py`` (the engine in this process, driven by the calling threads) and
``engine/process.py`` (a process of its own). Both keep the same promises, which one contract test checks
(``tests/transport``): every submitted request ends with exactly one final event, whatever happens to the engine, and no
method but ``adapters`` and ``control`` raises for what a request or an engine did. Importing this module imports no
array library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from truffula.config import EngineConfig
from truffula.errors import TruffulaError
from truffula.logs import LogSettings
from truffula.types import (
    AdapterCommand,
    AdapterState,
    EngineAction,
    EngineInfo,
    EngineRequest,
    EngineRestarts,
    EngineStats,
    Progress,
    TokenEvent,
    Vocabulary,
)

if TYPE_CHECKING:
    import asyncio

Transport = Literal["inline", "process"]
TRANSPORTS: tuple[Transport, ...] = ("inline", "process")


class EngineClient(Protocol):
    """A started engine. ``info`` stays while an engine that died is being restarted."""

    info: EngineInfo

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Give the engine, and every engine that replaces it, the tokens that grammars need. Never waits.

        Call it once, before the first request with a grammar: until then nothing of it is in memory.
        """

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Queue requests; never waits. An error of one, or of the engine, is its final event.

        Raises:
            InvalidRequest: A request id is in use; no request was queued.
        """

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests with finish reason ``abort``; ids that are not open are ignored. Never waits."""

    def wait(self, timeout: float | None) -> bool:
        """Whether ``events(0)`` has something to return; waits up to ``timeout`` seconds (None: without limit) for it.

        False when the time is up, and immediately when the client is closed.
        """

    def events(self, timeout: float | None) -> list[TokenEvent]:
        """All events since the last call; waits up to ``timeout`` seconds (None: without limit) for the first.

        Empty when the time is up, and immediately when the client is closed. One consumer at a time.
        """

    def listen(self, listener: Callable[[], None] | None, loop: asyncio.AbstractEventLoop | None = None) -> bool:
        """Whether ``listener`` is called from now on when events arrive and none were waiting: in the thread of
        ``loop``, without one in some thread.

        None ends that; it is called in the thread of the loop. False when the engine steps only inside ``events``: a
        thread must wait there then.
        """

    def adapters(self, command: AdapterCommand, timeout: float = 300) -> list[AdapterState]:
        """Execute a command; a load returns when the adapter is usable.

        Raises:
            TruffulaError: Why the command failed; ``AdapterLoadError`` after ``timeout`` seconds.
        """

    def control(self, action: EngineAction) -> None:
        """Execute an action. ``pause`` returns once no step is computed, ``drain`` once no request runs.

        Raises:
            TruffulaError: Why the action failed, such as a ``resume`` before a ``drain`` has ended.
        """

    def stats(self) -> EngineStats:
        """The latest heartbeat; never waits."""

    def alive(self) -> bool:
        """Whether the engine takes requests: started, heartbeat fresh, no step stuck."""

    def restarts(self) -> EngineRestarts:
        """How often an engine that died was started again, and why the last one died. Never waits."""

    def fatal_error(self) -> TruffulaError | None:
        """Why no engine will serve again although the client was not closed; None while one may."""

    def close(self) -> None:
        """End the engine; open requests end with ``shutting_down``. Idempotent."""


@dataclass(frozen=True)
class EngineHandle:
    """An engine that is starting."""

    client: Callable[[], EngineClient]
    """The engine, once it is ready. Raises ``TruffulaError``: why it cannot start. Call it once."""

    model_path: Callable[[], Path | None] = lambda: None
    """Where the model's files are, as soon as the engine has opened them; waits for that, never raises.

    None when the engine starts in ``client`` only, or has failed to start.
    """

    close: Callable[[], None] = lambda: None
    """Ends the start. Not after ``client``: close that then."""


def start_engine(
    config: EngineConfig, transport: Transport, progress: Progress | None = None, logs: LogSettings | None = None
) -> EngineHandle:
    """Start an engine. A process of its own starts immediately, an engine in this process in
    ``EngineHandle.client``.

    Args:
        progress: Called with (stage, done, total or None), in the thread that loads.
        logs: How an engine in a process of its own logs; None: warnings and errors, as plain lines.
    """
    if transport == "process":
        from truffula.engine.process import ProcessClient

        process = ProcessClient(config, progress, logs)
        return EngineHandle(process.wait_until_ready, process.model_path, process.close)
    from truffula.engine.inline import InlineClient

    return EngineHandle(partial(InlineClient, config, progress))


def connect(
    config: EngineConfig, transport: Transport, progress: Progress | None = None, logs: LogSettings | None = None
) -> EngineClient:
    """``start_engine``, and wait until the engine is ready.

    Raises:
        TruffulaError: Why it cannot start.
    """
    return start_engine(config, transport, progress, logs).client()
