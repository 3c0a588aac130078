"""The engine's process: ``python -m truffula.engine.worker N``, started by ``engine/process.py``.

The descriptor is one end of a socket pair; everything else, the configuration too, arrives through it. The process ends
when the socket does, so it never outlives its parent. Signals sent to the whole process group (Ctrl-C, a service
manager's SIGTERM) it ignores: the parent drains and then sends ``Stop``.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

from truffula.engine import wire
from truffula.engine.build import build_engine
from truffula.engine.engine import FILES_CHECK_S, Engine, close_engine, engine_error
from truffula.engine.journal import Reply, outcome
from truffula.errors import GenerationError, InvalidRequest, TruffulaError, WireError
from truffula.frames import Channel, Disconnected
from truffula.kernels.trim import defer_gc, trim_memory
from truffula.logs import setup_logs
from truffula.types import EngineStats, TokenEvent

HEARTBEAT_S = 0.4
STATS_S = 0.1
"""The least time between two collections of statistics while the engine is busy."""
INTAKE_BYTES = 64 << 10
"""Encoded requests that are taken in between two steps: 2 MB at once would delay every stream's next token."""
CHOICE_BYTES = 256
"""How many of these a choice of a prompt counts for."""
EXIT_OK, EXIT_ERROR, EXIT_WIRE = 0, 70, 71


class Heartbeat:
    """The thread that sends a heartbeat while the main thread is in a long step or load.

    The main thread sets ``stats`` (once the engine has started) and ``step_since``, the beginning of the step in
    progress (monotonic seconds). If the socket to the parent is closed, the thread ends the process.
    """

    def __init__(self, channel: Channel[wire.ToEngine]) -> None:
        self._channel = channel
        self._starting = wire.Starting("start")
        self.stats: EngineStats | None = None
        self.step_since: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="truffula-heartbeat", daemon=True)
        self._thread.start()

    def starting(self, stage: str, done: int, total: int | None) -> None:
        """Record the progress of the start; a new stage is sent immediately."""
        new = stage != self._starting.stage
        self._starting = wire.Starting(stage, done, total)
        if new:
            self.send()

    def send(self) -> None:
        """Send a heartbeat now."""
        stats = self.stats
        self._channel.send(self._starting if stats is None else wire.Stats(stats, self.step_since))

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            try:
                self.send()
            except Disconnected:
                os._exit(EXIT_OK)  # the main thread may be in a step of minutes whose result is not needed
            except Exception as error:  # noqa: BLE001
                # Without heartbeats the parent would kill this process as unresponsive, without the reason.
                try:
                    self._channel.send(wire.Died(engine_error(error).info()))
                finally:  # the channel may be what fails
                    os._exit(EXIT_ERROR)


class Worker:
    """Serves one engine over one channel until the parent sends ``Stop`` or closes the socket."""

    def __init__(self, channel: Channel[wire.ToEngine]) -> None:
        self._channel = channel
        self._heartbeat = Heartbeat(channel)
        self._replies: list[tuple[int, Reply]] = []  # of commands; those without a caller share ticket 0
        self._inbox: deque[wire.ToEngine | wire.RequestGroup] = deque()  # received and not yet passed to the engine

    def run(self) -> int:
        """Build the engine that the first frame describes, then serve it. Returns the exit status."""
        try:
            frames = self._wait_for_start()
            if not frames:
                return EXIT_OK
            first = frames[0]
            if not isinstance(first, wire.Start):
                raise WireError(f"The first frame is {type(first).__name__}, not Start.")
            return self._serve(first, frames[1:])
        except Disconnected:
            return EXIT_OK
        except Exception as error:  # noqa: BLE001  the parent must learn why the process ends
            reported = error if isinstance(error, TruffulaError) else engine_error(error)
            try:
                self._channel.send(wire.Died(reported.info()))
            except Disconnected:
                return EXIT_OK
            return EXIT_WIRE if isinstance(error, WireError) else EXIT_ERROR
        finally:
            self._heartbeat.stop()

    def _wait_for_start(self) -> list[wire.ToEngine]:
        frames: list[wire.ToEngine] | None = []
        while frames == []:
            select.select([self._channel], [], [])
            frames = self._channel.receive()
        return frames or []

    def _serve(self, start: wire.Start, frames: list[wire.ToEngine]) -> int:
        if start.logs is not None:
            setup_logs(start.logs)
        engine, info = build_engine(
            start.config, self._heartbeat.starting, start.first,
            lambda path: self._channel.send(wire.ModelPath(str(path))),
        )  # fmt: skip
        try:
            self._heartbeat.stats = engine.stats()
            self._heartbeat.send()
            self._channel.send(wire.Ready(info))
            trim_memory()  # while the parent handles Ready
            self._work(engine, frames)
        finally:
            close_engine(engine)
        return EXIT_OK

    def _work(self, engine: Engine, frames: list[wire.ToEngine] | None) -> None:
        """Step the engine until Stop or the end of the socket; ``frames`` have been received already."""
        busy = False
        stats_at = time.monotonic()
        while frames is not None and self._take_in(engine, frames):
            self._heartbeat.step_since = time.monotonic()
            events = engine.step()
            self._heartbeat.step_since = None
            for request_id in self._send_events(events):
                engine.abort(request_id)
            self._send_replies(engine)
            if time.monotonic() - stats_at >= STATS_S:
                stats_at = time.monotonic()
                self._heartbeat.stats = engine.stats()
            timeout = 0.0 if self._inbox else engine.poll_timeout()
            if timeout is None and busy:
                self._heartbeat.stats = engine.stats()
                self._heartbeat.send()  # an idle engine's numbers are exact
            busy = timeout is not None
            engine.wait(FILES_CHECK_S if timeout is None else min(timeout, FILES_CHECK_S), self._channel.fileno())
            frames = self._channel.receive()

    def _send_events(self, events: list[TokenEvent]) -> list[str]:
        """Send the events of a step. Returns the requests to abort: those whose event no frame can carry fail."""
        try:
            if events:
                self._channel.send(wire.Events(events))
        except WireError as error:
            if len(events) > 1:
                return [request_id for event in events for request_id in self._send_events([event])]
            (event,) = events
            self._fail([event.request_id], GenerationError(f"The answer can't be sent: {error.message}"))
            return [event.request_id]
        return []

    def _fail(self, request_ids: Sequence[str], error: TruffulaError) -> None:
        info = error.info()
        self._channel.send(
            wire.Events([TokenEvent(request_id=one, finish_reason="error", error=info) for one in request_ids])
        )

    def _take_in(self, engine: Engine, frames: Sequence[wire.ToEngine]) -> bool:
        """Pass the frames to the engine in order, requests up to ``INTAKE_BYTES``; False on Stop."""
        for frame in frames:
            if isinstance(frame, wire.Stop):
                return False
            self._inbox.extend(frame.groups if isinstance(frame, wire.Submit) else [frame])
        left = INTAKE_BYTES
        while self._inbox and left > 0:
            match self._inbox.popleft():
                case wire.RequestGroup() as group:
                    left -= len(group.body) + CHOICE_BYTES * len(group.choices)
                    self._submit(engine, group)
                case wire.SetVocabulary(vocabulary):
                    engine.set_vocabulary(vocabulary)
                case wire.Abort(request_ids):
                    for request_id in request_ids:
                        engine.abort(request_id)
                case wire.Adapter(ticket, command):
                    self._replies.append((ticket, engine.command(command)))
                case wire.Control(ticket, action):
                    self._replies.append((ticket, engine.control(action)))
                case wire.Start():
                    raise WireError("The Start frame was sent twice.")
        return True

    def _submit(self, engine: Engine, group: wire.RequestGroup) -> None:
        try:
            requests = wire.decode_group(group)
        except InvalidRequest as error:
            self._fail(group.request_ids, error)
            return
        for request in requests:
            engine.add(request)

    def _send_replies(self, engine: Engine) -> None:
        """Answer the commands that have ended, after statistics that show their effect."""
        done = [pending for pending in self._replies if pending[1].done()]
        if done:
            self._heartbeat.stats = engine.stats()
            self._heartbeat.send()
        for ticket, reply in done:
            self._replies.remove((ticket, reply))
            states, error = outcome(reply)
            self._channel.send(wire.AdapterReply(ticket, states, None if error is None else error.info()))


def main() -> int:
    """Serve over the descriptor that the command line names."""
    fd = int(sys.argv[1])
    # Handlers, not SIG_IGN: that would be inherited by the loading worker, which must stay killable.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.set_inheritable(fd, False)
    channel = wire.engine_channel(socket.socket(fileno=fd))
    try:
        with defer_gc():
            return Worker(channel).run()
    finally:
        channel.close()


if __name__ == "__main__":
    sys.exit(main())
