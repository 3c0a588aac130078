"""The text files that the server reads by itself are those of the checkpoint that the engine opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from truffula.errors import CheckpointError
from truffula.testing.tiny import write_tiny_checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.texts import read_texts


def test_a_folders_texts(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, generation_config={"temperature": 0.5})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    checkpoint, texts = open_checkpoint(tmp_path), read_texts(tmp_path)
    assert texts.generation_config == checkpoint.generation_config == {"temperature": 0.5}
    assert set(texts.tokenizer) == {"tokenizer_config.json"}
    checkpoint.close()


@pytest.mark.parametrize("content", [None, b"", b"no GGUF"], ids=["missing", "empty", "another file"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        read_texts(path)
