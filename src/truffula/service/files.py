"""Where the service's process finds a model's text files: at the path that the engine tells."""

from __future__ import annotations

from pathlib import Path

from truffula.text.tokenizer import Tokenizer, load_tokenizer
from truffula.types import EngineInfo
from truffula.weights.texts import read_texts


def tokenizer_of(info: EngineInfo) -> Tokenizer | None:
    """The tokenizer beside the weights that ``info``'s engine loaded; None where there is none.

    Raises ``CheckpointError`` for files that can't be read.
    """
    path = info.details.get("path")
    return None if path is None else load_tokenizer(read_texts(Path(path)).tokenizer)
