"""Child processes of benchmarks, such as ``truffula serve``, each in its own session."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from truffula.config import EngineConfig, options_of
from truffula.environment import installed_environment
from truffula.errors import ErrorInfo, ProcessFailed, TruffulaError

if TYPE_CHECKING:
    from truffula.model.load import ModelPlan

OUTPUT_CHARS = 2000
"""Characters at the end of a child's output that an error shows."""
_TRUFFULA_ERROR = re.compile(r"^error \((?P<code>\w+)\) (?P<message>.+)\Z", re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end_children_on_sigterm() -> None:
    """Make SIGTERM raise ``SystemExit``, so that the context managers end child processes in other sessions.

    Call it once, in the main thread.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def child_error(what: str, output: str) -> TruffulaError:
    """The error that ``what`` failed, with the child's ``output``; the error of a truffula command keeps its code."""
    found = _TRUFFULA_ERROR.search(output)
    if found is not None:
        return TruffulaError.from_info(ErrorInfo(code=found["code"], message=f"{what}: {found['message'].strip()}"))
    return ProcessFailed(f"{what}:\n{output.strip()[-OUTPUT_CHARS:]}" if output.strip() else f"{what} without output.")


class Child:
    """A process that runs ``argv`` in its own session: started on entry; on exit, the whole session is killed.

    ``pipes`` replaces the streams that ``subprocess.Popen`` gets: no input, and a file for both outputs.
    """

    def __init__(self, name: str, argv: Sequence[str], **pipes: Any) -> None:
        self.name = name
        self._argv, self._pipes = list(argv), pipes

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": self._log, "stderr": self._log, **self._pipes}
        try:
            self._process = subprocess.Popen(self._argv, start_new_session=True, env=installed_environment(), **pipes)
        except OSError as error:
            self._log.close()
            raise ProcessFailed(f"{self.name} did not start: {error}.") from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # the session has no processes left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def output(self) -> str:
        """The child's standard error, and its standard output unless that is redirected."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    @property
    def pid(self) -> int:
        return self._process.pid


class Server(Child):
    """A child that listens on ``url``; ``wait`` returns once ``/health`` answers 200."""

    def __init__(self, name: str, argv: Sequence[str], url: str) -> None:
        super().__init__(name, argv)
        self.url = url

    def wait(self, timeout_s: float = 600) -> str:
        """The address, once the server is healthy.

        Raises:
            ProcessFailed: The server ended or took too long; with its output. The error of a truffula server is raised
            as it is.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.ended:
                raise child_error(f"{self.name} exited during its start", self.output())
            if self._healthy():
                return self.url
            time.sleep(0.05)
        raise ProcessFailed(
            f"{self.name} was not healthy within {timeout_s:g} seconds:\n{self.output()[-OUTPUT_CHARS:]}"
        )

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False


def engine_flags(config: EngineConfig) -> list[str]:
    """The command-line options of ``config`` that differ from the defaults."""
    flags = []
    for option in options_of(EngineConfig):
        value = getattr(config, option.field)
        if option.required or value == option.default:
            continue
        if option.kind == "switch":
            flags.append(option.flag if value else f"--no-{option.flag.removeprefix('--')}")
        else:
            flags += [option.flag, str(value)]
    return flags


def truffula_server(
    config: EngineConfig, adapter_dir: Path | str | None = None, port: int | None = None, more: Sequence[str] = ()
) -> Server:
    """``truffula serve`` as a child process, on ``port`` or a free one, with ``more`` flags. It logs warnings only."""
    port = port or free_port()
    argv = [sys.executable, "-m", "truffula", "serve", config.model, "--port", str(port), "--log-level", "warning"]
    if adapter_dir is not None:
        argv += ["--adapter-dir", str(adapter_dir)]
    return Server("truffula", [*argv, *engine_flags(config), *more], f"http://127.0.0.1:{port}")


def plan_of(config: EngineConfig) -> ModelPlan:
    """The plan of ``config``'s model. Reads no weights."""
    from truffula.model.load import plan_model
    from truffula.weights.open import open_checkpoint
    from truffula.weights.sources import resolve_source

    path = resolve_source(config.model, cache_dir=config.cache_dir, offline=config.offline, revision=config.revision)
    with contextlib.closing(open_checkpoint(path)) as checkpoint:
        return plan_model(checkpoint, config.implementation)


def random_adapters(plan: ModelPlan, folder: Path, names: list[str], rank: int, *, first_seed: int = 0) -> None:
    """Write a random all-linear adapter per name for a planned model: bfloat16, alpha 2r, different seeds."""
    from truffula.testing.adapters import write_tiny_adapter

    sites = plan.interface.sites
    for seed, name in enumerate(names, first_seed):
        # Without the name of a base, of which loading would warn.
        write_tiny_adapter(
            folder / name, sites, rank=rank, alpha=2 * rank, targets="all-linear", seed=seed, dtype="bfloat16",
            base_model_name_or_path=None,
        )  # fmt: skip
