"""A server of our own to measure: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from truffula.config import EngineConfig, options_of
from truffula.errors import ConfigError


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


@contextlib.contextmanager
def running_server(config: EngineConfig, flags: list[str], port: int | None = None) -> Iterator[str]:
    """Start ``truffula serve`` with ``flags`` (on a free port by default); yields its address once it is healthy."""
    port = port or free_port()
    command = [
        sys.executable,
        "-m",
        "truffula",
        "serve",
        config.model,
        "--port",
        str(port),
        *engine_flags(config),
        *flags,
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Any) -> None:
    import httpx

    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            raise ConfigError(f"The server ended while it started:\n{log.read().decode(errors='replace')[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise ConfigError("The server was not healthy within 600 seconds.")


def random_adapters(config: EngineConfig, folder: Path, names: list[str], rank: int) -> Mapping[str, Path]:
    """Write a random all-linear adapter per name for ``config``'s model: bfloat16, alpha 2r, different seeds."""
    from truffula.model.load import plan_model
    from truffula.testing.adapters import write_tiny_adapter
    from truffula.weights.open import open_checkpoint
    from truffula.weights.sources import resolve_source

    path = resolve_source(config.model, cache_dir=config.cache_dir, offline=config.offline, revision=config.revision)
    checkpoint = open_checkpoint(path)
    try:
        sites = plan_model(checkpoint).program.sites
    finally:
        checkpoint.close()
    made = {}
    for seed, name in enumerate(names):
        made[name] = write_tiny_adapter(
            folder / name, sites, rank=rank, alpha=2 * rank, targets="all-linear", seed=seed, dtype="bfloat16"
        )
    return made


def config_fields(config: EngineConfig) -> dict[str, Any]:
    """``config`` as JSON-able values, for a child process."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
