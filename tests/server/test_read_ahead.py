"""The text files that a server reads while its engine starts are those of the model that the engine loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from truffula.engine.client import EngineClient, EngineHandle
from truffula.errors import CheckpointChanged
from truffula.server.launch import adapter_directory, start_server_engine
from truffula.server.serve import App, load_app
from truffula.settings import load_config
from truffula.testing.tiny import write_tiny_checkpoint


class Meanwhile:
    """A handle that tells where the model is, and whose caller does something before the engine looks at the files."""

    def __init__(self, inner: EngineHandle, model: Path, act: Callable[[], object]) -> None:
        self._inner, self._model, self._act = inner, model, act
        self.close = inner.close

    def model_path(self) -> Path:
        return self._model

    def client(self) -> EngineClient:
        self._act()
        return self._inner.client()


def load(model: Path, act: Callable[[], object]) -> App:
    resolved = load_config({"model": str(model), "transport": "inline", "generation_defaults": True}, {})
    handle = Meanwhile(start_server_engine(resolved), model, act)
    return load_app(resolved, "http://127.0.0.1", handle, adapter_directory(resolved))


def test_files_that_stay_are_read_once(tmp_path: Path):
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 7, "eos_token_id": 1}))
    app = load(tmp_path, lambda: None)
    try:
        assert app.asgi.state.truffula.defaults == {"top_k": 7}
    finally:
        app.service._client.close()


def test_a_model_that_was_replaced_meanwhile_is_not_served_with_the_texts_of_the_first(tmp_path: Path):
    write_tiny_checkpoint(tmp_path)

    def replace() -> None:
        fresh = tmp_path / "fresh.json"
        fresh.write_text((tmp_path / "config.json").read_text() + " ")
        fresh.replace(tmp_path / "config.json")

    with pytest.raises(CheckpointChanged, match="replaced while the model was loaded"):
        load(tmp_path, replace)
