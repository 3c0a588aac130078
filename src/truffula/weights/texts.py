"""A model's text files for who serves text and holds no weights: the same bytes that ``open_checkpoint`` gives, without
opening a tensor. Imports no array: the process that speaks HTTP has no use for one.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truffula.errors import CheckpointError
from truffula.weights import gguf_tokenizer, text_files
from truffula.weights.gguf_header import read_header
from truffula.weights.gguf_sampling import sampling_defaults
from truffula.weights.naming import naming_file


@dataclass(frozen=True)
class ModelTexts:
    """``tokenizer``: contents by file name (tokenizer.json, …); ``generation_config``: that file, ``{}`` for none."""

    tokenizer: dict[str, bytes]
    generation_config: dict[str, Any]


def read_texts(path: Path) -> ModelTexts:
    """Of a model folder or a ``.gguf`` file. Raises ``CheckpointError`` for what can't be read."""
    if path.is_dir():
        return ModelTexts(text_files.tokenizer_files(path), text_files.generation_config(path))
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # goes with the last view of it
    except (OSError, ValueError) as error:  # ValueError: an empty file is not mapped
        raise CheckpointError(f"{path} cannot be read: {error}.", param=str(path)) from error
    metadata = read_header(path, memoryview(mapped)).metadata
    with naming_file(path):
        files, _ = gguf_tokenizer.tokenizer_files(metadata)
        generation = {**sampling_defaults(metadata), **gguf_tokenizer.generation_config(metadata)}
        return ModelTexts(files, generation)
