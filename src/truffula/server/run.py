"""``run_server``: one process that loads, serves and drains, on a port that ``launch`` has taken.

The port answers 503 while the model loads. The first SIGTERM or SIGINT stops accepting and
lets running requests end within ``drain_timeout_s``; the second ends the process at once. With a ``drain_delay_s``, the
port stays open for that long first and answers 503, so that load balancers and clients turn to another server. An
engine that may not be restarted ends the server with its error, so that the process's supervisor sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from truffula.config import Resolved
from truffula.engine.client import Opening
from truffula.errors import internal_error
from truffula.server.connections import (
    ACCEPT_BURST,
    AcceptErrors,
    Connections,
    GuardedProtocol,
    most_connections,
)
from truffula.server.errors import Unhealthy, dialect_of, render
from truffula.server.launch import QUEUED
from truffula.server.middleware import send_reply
from truffula.server.started import Started, start
from truffula.service import AsyncService

LOOK_S = 1.0
"""Seconds between looks at whether the engine is lost for good."""
log = logging.getLogger(__name__)


class Gate:
    """The application while it loads: 503 to all, then the real one. A failed load ends the server with its error."""

    def __init__(self, load: Callable[[], Started], on_failure: Callable[[], None]) -> None:
        self._load = load
        self._on_failure = on_failure
        self.loop: asyncio.AbstractEventLoop | None = None
        self._app: ASGIApp | None = None
        self.started: Started | None = None
        self.failure: BaseException | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = Unhealthy("The model is loading.", retry_after_s=5)
            await send_reply(send, *render(error, dialect_of(scope["path"])))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(AcceptErrors())
        ended = asyncio.Event()
        serving = asyncio.ensure_future(self._serve(ended))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        ended.set()
        if self._app is None:
            serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await send({"type": "lifespan.shutdown.complete"})

    async def _serve(self, ended: asyncio.Event) -> None:
        try:
            self.started = await self._loaded()
            app = self.started.app
            async with app.router.lifespan_context(app):
                self._app = app
                self.started.announce()
                await self._watch(self.started.service, ended)
                await ended.wait()
        except Exception as error:  # noqa: BLE001  (``run_server`` raises it)
            self.failure = error
            self._on_failure()

    async def _watch(self, service: AsyncService, ended: asyncio.Event) -> None:
        """Wait until the server is told to end; end it when the engine is lost for good."""
        while not ended.is_set():
            lost = service.lost()
            if lost is not None:
                log.error("exiting with status 1: %s", lost.message)
                self.failure = lost
                self._on_failure()
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), LOOK_S)

    async def _loaded(self) -> Started:
        """Loads in a thread of its own, which a server that is told to end does not wait for."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Started] = loop.create_future()

        def answer(found: Started | None, failure: Exception | None) -> None:
            if done.done():
                return
            if failure is not None:
                done.set_exception(failure)
            elif found is not None:
                done.set_result(found)

        def work() -> None:
            found: Started | None = None
            failure: Exception | None = None
            try:
                found = self._load()
            except BaseException as error:  # noqa: BLE001  (handed to the loop, which raises it)
                failure = error if isinstance(error, Exception) else internal_error(error)  # such as a Rust panic
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended, nobody is left to tell
                loop.call_soon_threadsafe(answer, found, failure)

        threading.Thread(target=work, name="truffula-load", daemon=True).start()
        return await done


class DrainingServer(uvicorn.Server):
    """Uvicorn, which drains the service on the first signal and leaves at once on the second."""

    gate: Gate
    drain_delay_s: float
    drain_timeout_s: float
    connections: Connections
    _drain: asyncio.Future[bool] | None = None
    _signalled = False  # not ``should_exit``, which is also set when the engine is given up

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            log.warning("second signal: exiting immediately")
            os._exit(128 + sig)
        self._signalled = self.should_exit = True  # before the line below: whoever reads it may send the second signal
        log.info("received %s: draining for at most %g s", signal.Signals(sig).name, self.drain_timeout_s)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(QUEUED)  # asyncio has set the number it accepts at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.gate.started is not None:
            delay = self.drain_delay_s if self._signalled else 0.0
            self._drain = asyncio.ensure_future(self.gate.started.service.drain(delay + self.drain_timeout_s))
            await asyncio.sleep(delay)
        for server in self.servers:
            server.close()
        await super().shutdown(sockets)
        if self._drain is not None and not self._drain.done():
            self._drain.cancel()


def make_server(resolved: Resolved, listening: socket.socket, opening: Opening | None = None) -> DrainingServer:
    """The server that will load ``resolved`` behind ``listening`` when it runs. ``opening`` as for ``start``."""
    config = resolved.server
    port = listening.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host

    def stop() -> None:
        server.should_exit = True

    connections = Connections(most_connections(config), config.body_timeout_s)
    gate = Gate(lambda: start(resolved, f"http://{host}:{port}", opening), stop)
    settings = uvicorn.Config(
        connections.watching(gate),
        backlog=ACCEPT_BURST,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(config.drain_timeout_s) + 5,
    )
    settings.load()
    settings.http_protocol_class = partial(  # type: ignore[assignment]
        GuardedProtocol, connections, settings.http_protocol_class
    )
    server = DrainingServer(settings)
    server.gate, server.connections = gate, connections
    server.drain_delay_s, server.drain_timeout_s = config.drain_delay_s, config.drain_timeout_s
    return server


def run_server(resolved: Resolved, listening: socket.socket, opening: Opening | None = None) -> None:
    """Serves ``listening``, which it closes, until a signal; returns after a clean drain. ``opening`` as for ``start``.

    Raises:
        TruffulaError: What kept the engine from starting, or why it was given up.
    """
    server = make_server(resolved, listening, opening)
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    if server.gate.failure is not None:
        raise server.gate.failure
    log.info("drained; goodbye")
