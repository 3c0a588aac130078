"""``run_server``: one process that loads, serves and drains, on a port that ``server/launch.py`` has bound.

The port answers 503 while the model loads. The first SIGTERM or SIGINT stops accepting and lets running requests end
within ``drain_timeout_s``; the second ends the process immediately. With a ``drain_delay_s``, the port stays open for
that long first and answers 503, so that load balancers and clients turn to another server. An engine that is not
restarted any more ends the server with its error, so that the process's supervisor sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from truffula.config import ServerConfig
from truffula.engine.client import EngineHandle
from truffula.errors import ConfigError, InvalidRequest, internal_error
from truffula.kernels.trim import trim_memory
from truffula.lora.sources import AdapterDirectory
from truffula.metrics import Metrics
from truffula.option import format_size
from truffula.params import SamplingParams
from truffula.server.adapters import prepare_adapters
from truffula.server.app import create_app
from truffula.server.connections import (
    ACCEPT_BURST,
    AcceptErrors,
    Connections,
    GuardedProtocol,
    most_connections,
)
from truffula.server.errors import Unhealthy, dialect_of_request, render
from truffula.server.http1 import Http1
from truffula.server.router_metrics import RouterMetrics
from truffula.server.vllm_metrics import VllmMetrics
from truffula.service.aio import AsyncService
from truffula.service.core import Service, ServiceLimits
from truffula.service.files import load_texts, texts_of, without_tokenizer
from truffula.service.workers import TextWorkers
from truffula.settings import Resolved
from truffula.text.chat_template import read_template
from truffula.text.ends import describe
from truffula.text.process import Setup
from truffula.types import EngineInfo

BACKLOG = 2048
"""Connections that the kernel queues until they are accepted."""
MAX_PROMPT_SCORES = 2**17
"""Of one prompt. All streams wait while the scores of a prompt are decoded: 40 ms at this number."""
FULL_COLLECTIONS = 1000
"""A collection of all objects, during which every stream waits, comes with so many of the younger ones."""
SWITCH_INTERVAL_S = 0.001
"""How long a thread that works on a text may keep the event loop from running; Python's default is 5 ms."""
ENGINE_CHECK_S = 1.0
"""Seconds between checks whether the engine may still serve."""
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class App:
    """The application of a loaded model; ``announce`` writes the start log, once requests are answered."""

    service: AsyncService
    asgi: Starlette
    announce: Callable[[], None]


def load_app(resolved: Resolved, url: str, handle: EngineHandle, directory: AdapterDirectory) -> App:
    """The application over the engine that is starting. The tokenizer is loaded while the engine loads the weights.

    Raises:
        TruffulaError: What keeps the engine from starting, or a file that cannot be used. The engine is closed then.
    """
    config = resolved.server
    with ExitStack() as undo:
        undo.callback(handle.close)
        templates = None
        if config.chat_template is not None:
            templates = {"default": read_template(config.chat_template)}
        path = handle.model_path()
        texts = None if path is None else load_texts(path)
        undo.pop_all()
    client = handle.client()
    with ExitStack() as undo:
        undo.callback(client.close)
        limits = ServiceLimits(
            max_choices=max(config.max_n, config.max_best_of),
            base_names=tuple(name for name in (client.info.model, config.served_model_name) if name),
            max_prompt_scores=MAX_PROMPT_SCORES,
        )
        texts = texts_of(client.info, texts)
        known = texts.chat_templates(templates)
        workers = TextWorkers(
            Setup(
                info=client.info,
                texts_path=None if texts.path is None else str(texts.path),
                texts_digest=texts.digest,
                templates=known.sources,
                special_tokens=known.special_tokens,
                replaced_templates=templates is not None,
                memory_bytes=config.text_memory_bytes,
            )
        )
        undo.callback(workers.close)
        core = Service(
            client.info,
            texts=texts,
            directory=directory,
            limits=limits,
            templates=templates,
            render=workers.render_at_start,
            tool_format=config.tool_format,
            reasoning_format=config.reasoning_format,
        )
        service = AsyncService(client, core, workers=workers)
        metrics = Metrics(
            service.known_stats,
            restarts=service.restarts,
            max_adapters=config.metrics_adapters,
            named=config.adapters,
        )
        if config.lorax_metrics:
            router = RouterMetrics(metrics.registry, service.known_stats, service.info)
            metrics.on_request.append(router.request_ended)
        if config.vllm_metrics:
            model = config.served_model_name or service.info.model
            metrics.registry.register(VllmMetrics(service.known_stats, service.info, model))
        defaults = sampling_defaults(core.generation_config if config.generation_defaults else {})
        asgi = create_app(service, config, directory, metrics, defaults=defaults)
        warnings = directory.warnings()  # here, as it looks at every folder: ``announce`` is called on the event loop
        undo.pop_all()
    trim_memory()  # before requests wait for this process
    return App(service, asgi, lambda: announce(resolved, service.info, directory, url, warnings))


def sampling_defaults(written: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says of sampling."""
    found = {name: written[name] for name in SAMPLING_FIELDS if written.get(name) is not None}
    try:
        SamplingParams(**found)
    except InvalidRequest as error:
        raise ConfigError(f"generation_config.json: {error.message}", param="generation_defaults") from error
    return found


def announce(
    resolved: Resolved, info: EngineInfo, directory: AdapterDirectory, url: str, warnings: Sequence[str] = ()
) -> None:
    """The facts an operator looks for in the first lines of a log."""
    log.info("model %s (%s), %s weights, %s", info.model, info.model_type, format_size(info.weight_bytes), info.tying)
    why = info.dtype_reason
    log.info("backend %s on %s, compute in %s (%s)", info.backend, info.device, info.dtype, why)
    if info.int8_note:
        log.info("%s", info.int8_note)
    log.info(
        "KV cache for %d tokens (blocks of %d); at most %d tokens per sequence, %d sequences per batch",
        info.kv_tokens,
        info.block_size,
        info.max_model_len,
        info.max_running,
    )
    log.info("end tokens: %s", describe(info.end_tokens) or "none, answers end at stop strings or max_tokens only")
    for warning in without_tokenizer(info.no_tokenizer):
        log.warning("%s", warning)
    names = directory.names()
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    log.info("adapters: %s%s", ", ".join(names[:10]) or "none", more)
    for text in warnings:
        log.warning("%s", text)
    if resolved.server.host not in ("127.0.0.1", "localhost", "::1") and not resolved.server.keyed:
        log.warning(
            "listening on more than this machine without --api-key: everyone who can reach the port can use the server"
        )
    log.info("ready at %s (prefix cache %s)", url, "on" if resolved.engine.prefix_cache else "off")


class LoadingApp:
    """The ASGI application: 503 while the model loads, then ``App``. A failed load ends the server with its error."""

    def __init__(self, load: Callable[[], App], on_failure: Callable[[], None]) -> None:
        self.load = load
        self._on_failure = on_failure
        self.loop: asyncio.AbstractEventLoop
        self._serving: asyncio.Future[None]
        self._ended = asyncio.Event()
        self._asgi: ASGIApp | None = None  # of ``app``, while it takes requests
        self.app: App | None = None
        self.error: BaseException | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._asgi is not None:
            await self._asgi(scope, receive, send)
        elif scope["type"] == "http":
            error = Unhealthy("The model is loading.", retry_after_s=5)
            await render(error, dialect_of_request(scope))(scope, receive, send)

    def start(self) -> None:
        """Load and serve in a task of the running loop."""
        self.loop = asyncio.get_running_loop()
        self._serving = asyncio.ensure_future(self._serve())

    async def stop(self) -> None:
        """Close the service, or stop waiting for the load."""
        self._ended.set()
        if self._asgi is None:
            self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)

    def reload_keys(self) -> None:
        """Read the file of API keys again."""
        if self.app is not None:
            self.app.asgi.state.keys.reload()

    async def _serve(self) -> None:
        try:
            self.app = await self._loaded()
            service = self.app.service
            await service.start()
            prepared = asyncio.ensure_future(prepare_adapters(self.app.asgi.state.truffula))
            try:
                self._asgi = self.app.asgi
                self.app.announce()
                await self._watch(service)
                await self._ended.wait()
            finally:
                prepared.cancel()
                await self.app.asgi.state.responses.close()
                await service.close()
        except Exception as error:  # noqa: BLE001  (``run_server`` raises it)
            self.error = error
            self._on_failure()

    async def _watch(self, service: AsyncService) -> None:
        """Wait until the server is to end; end it when the engine is not restarted any more."""
        while not self._ended.is_set():
            lost = service.fatal_error()
            if lost is not None:
                log.error("exiting with status 1: %s", lost.message)
                self.error = lost
                self._on_failure()
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), ENGINE_CHECK_S)

    async def _loaded(self) -> App:
        """Load in a daemon thread, for which a server that is to end does not wait."""
        done: Future[App] = Future()
        done.set_running_or_notify_cancel()  # a cancelled wait leaves the thread its future

        def work() -> None:
            try:
                done.set_result(self.load())
            except Exception as error:  # noqa: BLE001  (the loop raises it)
                done.set_exception(error)
            except BaseException as error:  # noqa: BLE001  (such as a Rust panic)
                done.set_exception(internal_error(error))

        threading.Thread(target=work, name="truffula-load", daemon=True).start()
        return await asyncio.wrap_future(done)


class DrainingServer(uvicorn.Server):
    """Uvicorn, which drains the service on the first signal and ends the process on the second."""

    def __init__(
        self, settings: uvicorn.Config, config: ServerConfig, loading: LoadingApp, connections: Connections
    ) -> None:
        super().__init__(settings)
        self.loading, self.connections = loading, connections
        self._delay_s, self._timeout_s = config.drain_delay_s, config.drain_timeout_s
        self._drain: asyncio.Future[bool] | None = None
        self._signalled = False  # not ``should_exit``, which is also set when the engine is given up

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            log.warning("second signal: exiting immediately")
            os._exit(128 + sig)
        self._signalled = self.should_exit = True  # before it is logged: a reader may send the second signal then
        log.info("received %s: draining for at most %g s", signal.Signals(sig).name, self._timeout_s)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(AcceptErrors())
        self.loading.start()
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(BACKLOG)  # asyncio has set it to the number of connections that it accepts in one go

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.loading.app is not None:
            self.loading.app.asgi.state.truffula.shadows.close()
            delay = self._delay_s if self._signalled else 0.0
            self._drain = asyncio.ensure_future(self.loading.app.service.drain(delay + self._timeout_s))
            await asyncio.sleep(delay)
        for server in self.servers:
            server.close()
        await super().shutdown(sockets)
        await self.loading.stop()
        if self._drain is not None and not self._drain.done():
            self._drain.cancel()


def make_server(
    resolved: Resolved, listening: socket.socket, handle: EngineHandle, directory: AdapterDirectory
) -> DrainingServer:
    """The server of ``resolved`` on the port of ``listening``: it waits for the engine of ``handle`` when it runs."""
    config = resolved.server
    port = listening.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host

    def stop() -> None:
        server.should_exit = True

    connections = Connections(most_connections(config), config.body_timeout_s, config.send_timeout_s)
    loading = LoadingApp(lambda: load_app(resolved, f"http://{host}:{port}", handle, directory), stop)
    settings = uvicorn.Config(
        connections.watching(loading),
        backlog=ACCEPT_BURST,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,
        ws="none",  # otherwise a library that happens to be installed takes connections over
        timeout_graceful_shutdown=int(config.drain_timeout_s) + 5,
    )
    settings.load()
    settings.http_protocol_class = partial(GuardedProtocol, connections, Http1)  # type: ignore[assignment]
    server = DrainingServer(settings, config, loading, connections)
    return server


def run_server(resolved: Resolved, listening: socket.socket, handle: EngineHandle, directory: AdapterDirectory) -> None:
    """Serve ``listening``, which is closed then, until a signal; returns after a clean drain.

    Raises:
        TruffulaError: What kept the engine from starting, or why it is not restarted any more.
    """
    server = make_server(resolved, listening, handle, directory)
    if resolved.server.api_keys_file is not None:
        signal.signal(signal.SIGHUP, lambda *_: server.loading.reload_keys())
    gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTIONS)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    if server.loading.error is not None:
        raise server.loading.error
    log.info("drained; goodbye")
