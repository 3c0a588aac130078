"""The texts that a server reads while its engine starts are those of the files that the engine loaded."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from truffula.config import load_config
from truffula.engine.client import EngineClient, Opening
from truffula.errors import CheckpointChanged
from truffula.server.launch import begin_engine
from truffula.server.started import start
from truffula.testing.tiny import write_tiny_checkpoint


class Meanwhile:
    """An opening whose caller does something between reading the files and the engine's look at them."""

    def __init__(self, inner: Opening, act: Callable[[], object]) -> None:
        self._inner, self._act = inner, act
        self.files, self.close = inner.files, inner.close
        self.made: EngineClient | None = None

    def client(self) -> EngineClient:
        self._act()
        self.made = self._inner.client()
        return self.made


def test_a_file_that_changes_before_the_engine_looks_is_read_again(tmp_path):
    write_tiny_checkpoint(tmp_path)
    side = tmp_path / "generation_config.json"
    side.write_text(json.dumps({"top_k": 7, "eos_token_id": 1}))
    resolved = load_config({"model": str(tmp_path), "transport": "thread", "generation_defaults": True}, {})
    opening = Meanwhile(begin_engine(resolved), lambda: side.write_text(json.dumps({"top_k": 13, "eos_token_id": 1})))
    started = start(resolved, "http://127.0.0.1", opening)
    assert opening.made is not None
    try:
        assert started.app.state.truffula.defaults == {"top_k": 13}
    finally:
        opening.made.close()


def test_a_model_that_was_replaced_meanwhile_does_not_lend_its_texts(tmp_path):
    write_tiny_checkpoint(tmp_path)
    resolved = load_config({"model": str(tmp_path), "transport": "thread"}, {})

    class Replaced(Meanwhile):
        def client(self) -> EngineClient:
            made = super().client()  # it has loaded
            fresh = tmp_path / "fresh.json"
            fresh.write_text((tmp_path / "config.json").read_text() + " ")
            fresh.replace(tmp_path / "config.json")
            return made

    # Touched after the texts were read, so that they are read again; replaced after the engine has loaded.
    opening = Replaced(begin_engine(resolved), lambda: (tmp_path / "config.json").touch())
    with pytest.raises(CheckpointChanged, match="replaced while the model was loaded"):
        start(resolved, "http://127.0.0.1", opening)
