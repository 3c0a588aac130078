"""A tiny model, adapters for it, and clients that are closed whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from following import tiny_engine

from truffula.engine.client import EngineClient, connect
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_checkpoint(folder, tiny_llama_config(max_position_embeddings=4096), seed=3, dtype="float32")
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_adapter(tmp_path_factory.mktemp("adapter") / "loud", tiny_model, rank=3, alpha=30, seed=5)


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Callable[..., Any]]:
    """``start(transport, **config)``: a client that is closed when the test ends."""
    clients: list[EngineClient] = []

    def begin(transport: Any, progress: Any = None, **config: Any) -> EngineClient:
        clients.append(connect(tiny_engine(**{"model": tiny_model, **config}), transport, progress))
        return clients[-1]

    yield begin
    for client in clients:
        client.close()
