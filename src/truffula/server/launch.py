"""``launch``: the first steps of ``truffula serve``. It binds the port, starts the engine's process, which loads the
model, and only then imports the HTTP stack (``server/serve.py``): both take about as long, and neither needs the other.

While the imports of this file run, nothing else does, so they are few.
"""

from __future__ import annotations

import errno
import logging
import resource
import socket

from truffula.config import ServerConfig
from truffula.engine.client import EngineHandle, Transport, start_engine
from truffula.errors import ConfigError
from truffula.kernels.trim import defer_gc
from truffula.logs import LogSettings, setup_logs
from truffula.lora.registry import AdapterRegistry
from truffula.lora.sources import AdapterDirectory
from truffula.option import format_size
from truffula.settings import Resolved

log = logging.getLogger(__name__)


def launch(resolved: Resolved) -> None:
    """Serves until a signal; returns after a clean drain.

    Raises:
        ConfigError: The port is in use, or an option is wrong, before anything was loaded.
        TruffulaError: What kept the engine from starting, or why it was given up.
    """
    setup_logs(log_settings(resolved.server))
    with defer_gc(), bind(resolved.server) as listening:
        directory = adapter_directory(resolved)  # report a mistake in the options before loading gigabytes
        host = f"[{resolved.server.host}]" if ":" in resolved.server.host else resolved.server.host
        log.info("Listening on %s:%d; loading %s", host, listening.getsockname()[1], resolved.engine.model)
        raise_file_limit()  # before there is an engine: it inherits the limit, and maps a file per adapter in memory
        handle = start_server_engine(resolved)
        from truffula.server.serve import run_server

        run_server(resolved, listening, handle, directory)


def raise_file_limit() -> None:
    """Raise the limit of open files to the most that the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # a system whose real limit is below the one it names
            log.info("the limit of %d open files could not be raised to %d: %s", soft, hard, error)


def start_server_engine(resolved: Resolved) -> EngineHandle:
    """Start the engine in the configured transport, its progress in the log."""
    transport: Transport = resolved.server.transport  # type: ignore[assignment]  # a choice of the option
    return start_engine(resolved.engine, transport, _Progress(), log_settings(resolved.server))


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket. Raises ``ConfigError`` that names a port in use, or an address that is not this machine's."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off for each connection; without, an answer's body is
    # sent 40 ms after its head.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((config.host, config.port))
        made.listen()  # ``serve`` sets the length of the queue
    except OSError as error:
        made.close()
        where = f"{config.host}:{config.port}"
        texts = {
            errno.EADDRINUSE: ("port", f"Port {config.port} of {config.host} is in use; choose another with --port."),
            errno.EACCES: ("port", f"Listening on {where} is not permitted; choose a port above 1023."),
        }
        param, text = texts.get(error.errno or 0, ("host", f"Cannot listen on {where}: {error.strerror or error}."))
        raise ConfigError(text, param=param) from error
    return made


def log_settings(config: ServerConfig) -> LogSettings:
    return LogSettings(format=config.log_format, level=config.log_level)


def adapter_directory(resolved: Resolved) -> AdapterDirectory:
    """What clients may name, from the options."""
    config = resolved.server
    names = (resolved.engine.model, config.served_model_name)
    return AdapterDirectory(
        adapters=config.adapters,
        adapter_dir=config.adapter_dir,
        allow_local=config.allow_local,
        allow_hub=config.allow_hub,
        default_source=config.adapter_source,
        allow_source=config.allow_sources,
        allow_credentials=config.allow_client_credentials,
        recheck_s=config.adapter_recheck_s,
        base_names=tuple(name for name in names if name),
        registry=AdapterRegistry(None if config.state_dir is None else config.state_dir / "adapters.db"),
    )


class _Progress:
    """Logs the loading: a line for each stage and each tenth of its bytes."""

    def __init__(self) -> None:
        self._stage = ""
        self._tenth = 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        tenth = 10 * done // total if total else 0
        if stage == self._stage and tenth <= self._tenth:
            return
        if stage != self._stage:
            log.info("%s%s", stage, f" ({format_size(total)})" if total else "")
        elif total:
            log.info("%s: %d %% of %s", stage, 10 * tenth, format_size(total))
        self._stage, self._tenth = stage, tenth
