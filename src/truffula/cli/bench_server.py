"""A server of our own to measure: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truffula.config import EngineConfig, options_of
from truffula.errors import ConfigError

if TYPE_CHECKING:
    from truffula.model.load import ModelPlan


def engine_flags(config: EngineConfig) -> list[str]:
    """The command line that gives ``config`` again: only what differs from the defaults."""
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class OwnServer:
    """``truffula serve`` as a child: starts on entering, stops on leaving. ``url`` answers once ``wait`` returns."""

    def __init__(self, config: EngineConfig, flags: list[str], port: int | None = None) -> None:
        self._port = port or free_port()
        self._command = [sys.executable, "-m", "truffula", "serve", config.model, "--port", str(self._port)]
        self._command += [*engine_flags(config), *flags]
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> OwnServer:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def wait(self, timeout_s: float = 600) -> str:
        """The address, once it is healthy. Raises ``ConfigError`` with what the server said when it ended instead."""
        import httpx

        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._log.seek(0)
                said = self._log.read().decode(errors="replace")[-2000:]
                raise ConfigError(f"The server ended while it started:\n{said}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url + "/health", timeout=5).status_code == 200:
                    return self.url
            time.sleep(0.05)
        raise ConfigError(f"The server was not healthy within {timeout_s:g} seconds.")


def planned(config: EngineConfig) -> ModelPlan:
    """``config``'s model as it would be loaded; reads no weights."""
    from truffula.model.load import plan_model
    from truffula.weights.open import open_checkpoint
    from truffula.weights.sources import resolve_source

    path = resolve_source(config.model, cache_dir=config.cache_dir, offline=config.offline, revision=config.revision)
    checkpoint = open_checkpoint(path)
    try:
        return plan_model(checkpoint)
    finally:
        checkpoint.close()


def random_adapters(plan: ModelPlan, folder: Path, names: list[str], rank: int) -> Mapping[str, Path]:
    """Write a random all-linear adapter per name for a planned model: bfloat16, alpha 2r, different seeds."""
    from truffula.testing.adapters import write_tiny_adapter

    sites = plan.program.sites
    return {
        name: write_tiny_adapter(
            folder / name, sites, rank=rank, alpha=2 * rank, targets="all-linear", seed=seed, dtype="bfloat16"
        )
        for seed, name in enumerate(names)
    }


def config_fields(config: EngineConfig) -> dict[str, Any]:
    """``config`` as JSON-able values, for a child process."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
