"""One server for the whole folder; tests that need other options start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, serving, write_adapters, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "llama")


@pytest.fixture(scope="session")
def long_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For requests that must outlast a busy machine's pauses: thousands of tokens fit."""
    return write_model(tmp_path_factory.mktemp("served") / "long", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), model_folder)


@pytest.fixture(scope="session")
def live(model_folder: Path, adapter_folders: dict[str, Path]) -> Iterator[Live]:
    named = {name: str(adapter_folders[name]) for name in ("pirate", "org/poet")}
    options = {
        "adapters": named,
        "adapter_dir": adapter_folders["in-dir"].parent,
        "lorax_metrics": True,
        "max_model_len": 160,
        "backend": "auto",  # for speed: no test of this server asks what computes
    }
    with serving(model_folder, **options) as found:
        yield found


@pytest.fixture(scope="module")
def impatient(model_folder: Path) -> Iterator[Live]:
    """A server that waits a second for heads and bodies."""
    with serving(model_folder, body_timeout=1.0) as found:
        yield found
