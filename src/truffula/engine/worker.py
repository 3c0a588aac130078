"""The engine's process: ``python -m truffula.engine.worker --fd N``, started by ``engine/process.py``, by nobody else.

The descriptor is one end of a socket pair; all else, the configuration too, comes through it. The process ends when the
socket does, so it never outlives its parent; signals meant for the whole group (Ctrl-C, a service manager's SIGTERM) it
leaves to the parent, which drains and then says ``Stop``.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence

from truffula.engine import wire
from truffula.engine.build import build_engine
from truffula.engine.loop import FILES_LOOK_S, AdapterAnswer, EngineLoop, close_engine, engine_fault
from truffula.errors import GenerationError, TruffulaError, WireError
from truffula.kernels.freed import collecting_later, settle
from truffula.logs import setup_logs
from truffula.types import EngineStats, TokenEvent

BEAT_S = 0.4
EXIT_OK, EXIT_FAULT, EXIT_WIRE = 0, 70, 71


class Heart:
    """The thread that speaks while the main one is in a long step or load. A peer that is gone ends the process."""

    def __init__(self, channel: wire.Channel[wire.ToEngine]) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._starting = wire.Starting("start")
        self._stats: EngineStats | None = None
        self._step_since: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="truffula-heartbeat", daemon=True)
        self._thread.start()

    def starting(self, stage: str, done: int, total: int | None) -> None:
        """Progress of the start; a new stage is told at once."""
        with self._lock:
            news = stage != self._starting.stage
            self._starting = wire.Starting(stage, done, total)
        if news:
            self._beat()

    def step(self, since: float | None) -> None:
        """A step begins (monotonic time), or has ended (None)."""
        self._step_since = since

    def stats(self, stats: EngineStats, *, tell: bool = False) -> None:
        """The state after a step; ``tell`` says it now."""
        self._stats = stats
        if tell:
            self._beat()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        stats = self._stats
        frame = self._starting if stats is None else wire.Stats(stats, self._step_since)
        self._channel.send(frame)

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_S):
            try:
                self._beat()
            except wire.Disconnected:
                # The main thread may be in a step of minutes; nobody is left to want its end.
                os._exit(EXIT_OK)
            except Exception as error:  # noqa: BLE001  without a heart the engine would be killed as silent, no word why
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the process, the reason said to the parent and to stderr."""
        fault = engine_fault(error)
        try:
            self._channel.send(wire.Died(fault.info()))
        finally:  # whatever the channel says, which may be what fails
            os._exit(EXIT_FAULT)


class Worker:
    """Serves one engine over one channel until the parent stops or leaves."""

    def __init__(self, channel: wire.Channel[wire.ToEngine]) -> None:
        self._channel = channel
        self._heart = Heart(channel)

    def run(self) -> int:
        """Build as the first frame says, then serve. Returns the exit status."""
        try:
            frames = self._wait_for_start()
            if not frames:
                return EXIT_OK
            first = frames[0]
            if not isinstance(first, wire.Start):
                raise WireError(f"The first frame after Hello is {type(first).__name__}, not Start.")
            return self._serve(first, frames[1:])
        except wire.Disconnected:
            return EXIT_OK
        except WireError as error:
            return self._die(error, EXIT_WIRE)
        except TruffulaError as error:
            return self._die(error, EXIT_FAULT)
        except Exception as error:  # noqa: BLE001  the parent must learn of any end
            return self._die(engine_fault(error), EXIT_FAULT)
        finally:
            self._heart.stop()

    def _wait_for_start(self) -> list[wire.ToEngine]:
        while True:
            self._poll(None)
            frames = self._channel.receive()
            if frames is None or frames:
                return frames or []

    def _serve(self, start: wire.Start, frames: Sequence[wire.ToEngine]) -> int:
        if start.logs is not None:
            setup_logs(start.logs)
        engine, info = build_engine(
            start.config, self._heart.starting, start.first, lambda path: self._channel.send(wire.Located(str(path)))
        )
        loop = EngineLoop(engine)
        try:
            self._heart.stats(loop.stats(), tell=True)
            self._channel.send(wire.Ready(info))
            settle()  # while the parent takes that in
            if self._take(loop, frames):
                self._work(loop)
        finally:
            close_engine(loop)
        return EXIT_OK

    def _work(self, loop: EngineLoop) -> None:
        """Turns until Stop or the end of the socket."""
        busy = False
        while True:
            rest = loop.rest()
            if rest is None and busy:
                self._heart.stats(loop.stats(), tell=True)  # the numbers of an idle engine are right at once
            busy = rest is not None
            self._poll(FILES_LOOK_S if rest is None else rest)
            frames = self._channel.receive()
            if frames is None or not self._take(loop, frames):
                return
            self._heart.step(time.monotonic())
            turn = loop.turn()
            self._heart.step(None)
            self._heart.stats(loop.stats())
            if turn.events:
                loop.abort(self._tell(turn.events))
            for answer in turn.answers:
                self._channel.send(_reply(answer))

    def _tell(self, events: list[TokenEvent]) -> list[str]:
        """Send what a step gave; requests whose event no frame can carry fail, and are returned to be aborted."""
        try:
            self._channel.send(wire.Events(events))
        except WireError as error:
            if len(events) > 1:
                return [request_id for event in events for request_id in self._tell([event])]
            (event,) = events
            info = GenerationError(f"The answer can't be sent: {error.message}").info()
            self._channel.send(
                wire.Events([TokenEvent(request_id=event.request_id, finish_reason="error", error=info)])
            )
            return [event.request_id]
        return []

    def _take(self, loop: EngineLoop, frames: Sequence[wire.ToEngine]) -> bool:
        """Hand on what came; False on Stop."""
        for frame in frames:
            match frame:
                case wire.Submit(requests):
                    loop.submit(requests)
                case wire.Abort(request_ids):
                    loop.abort(request_ids)
                case wire.Adapter(ticket, command):
                    loop.command(ticket, command)
                case wire.Stop():
                    return False
                case _:
                    raise WireError(f"A {type(frame).__name__} frame is not expected here.")
        return True

    def _poll(self, timeout: float | None) -> None:
        """Wait until something can be received, or ``timeout`` seconds."""
        if timeout == 0:
            return
        waiter = select.poll()
        waiter.register(self._channel, select.POLLIN)
        waiter.poll(None if timeout is None else timeout * 1000)

    def _die(self, error: TruffulaError, status: int) -> int:
        """Tell the parent why, if it is still there."""
        try:
            self._channel.send(wire.Died(error.info()))
        except wire.Disconnected:
            return EXIT_OK
        return status


def _reply(answer: AdapterAnswer) -> wire.AdapterReply:
    error = None if answer.error is None else answer.error.info()
    return wire.AdapterReply(answer.ticket, list(answer.states), error)


def main() -> int:
    """Serve over the descriptor that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m truffula.engine.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the socket to the parent")
    fd = parser.parse_args().fd
    # Handlers, not SIG_IGN: that would be inherited by the loading worker, which must stay killable.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.set_inheritable(fd, False)
    channel = wire.Channel(socket.socket(fileno=fd), wire.engine_side())
    try:
        with collecting_later():
            return Worker(channel).run()
    finally:
        channel.close()


if __name__ == "__main__":
    sys.exit(main())
