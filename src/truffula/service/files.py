"""Where the service's process finds a model's text files: at the path that the started engine tells."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from truffula.text.tokenizer import Tokenizer, load_tokenizer
from truffula.types import EngineInfo
from truffula.weights.open import open_checkpoint


def tokenizer_of(info: EngineInfo) -> Tokenizer | None:
    """The tokenizer beside the weights that ``info``'s engine loaded; None where there is none.

    Raises ``CheckpointError`` for files that can't be read.
    """
    path = info.details.get("path")
    if path is None:
        return None
    with closing(open_checkpoint(Path(path))) as checkpoint:
        return load_tokenizer(checkpoint.tokenizer_files())
