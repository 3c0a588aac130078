"""Where the service's process finds a model's text files: at the path that the engine tells."""

from __future__ import annotations

from pathlib import Path

from truffula.text.tokenizer import Tokenizer, load_tokenizer
from truffula.types import EngineInfo
from truffula.weights.texts import read_texts
from truffula.weights.watch import require_loaded, stamp, text_stamped


def tokenizer_of(info: EngineInfo) -> Tokenizer | None:
    """The tokenizer beside the weights that ``info``'s engine loaded; None where there is none.

    Raises ``CheckpointError`` for files that can't be read, ``CheckpointChanged`` for files that replaced those loaded.
    """
    if "path" not in info.details:
        return None
    path = Path(info.details["path"])
    stamps = [stamp(file) for file in text_stamped(path)]
    texts = read_texts(path)
    require_loaded(path, info.files, stamps)
    return load_tokenizer(texts.tokenizer)
