"""Reads a model's text files in the API process: the same bytes as ``open_checkpoint``, without the tensors.

Does not import numpy, which the API process does not need.
"""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

from truffula.errors import CheckpointError
from truffula.weights import text_files
from truffula.weights.gguf.header import GgufHeader, name_file_in_errors, read_header
from truffula.weights.gguf.tokenizer import read_tokenizer
from truffula.weights.text_files import ModelTexts


def read_texts(path: Path) -> ModelTexts:
    """The text files of a model folder or a ``.gguf`` file. Raises ``CheckpointError`` when one cannot be read."""
    if path.is_dir():
        generation = text_files.generation_config(path)
        return ModelTexts(text_files.tokenizer_files(path), generation, no_tokenizer=text_files.no_tokenizer(path))
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped with its last view
    except (OSError, ValueError) as error:  # ValueError: an empty file is not mapped
        raise CheckpointError(f"{path} cannot be read: {error}.", param=str(path)) from error
    header = read_header(path, memoryview(mapped))
    with name_file_in_errors(path):
        found = read_tokenizer(header.metadata)
    return replace(found, warnings=(*found.warnings, *_short_vocabulary(header)))


def _short_vocabulary(header: GgufHeader) -> list[str]:
    """A warning where the vocabulary has fewer tokens than the model has rows. (The service warns of more.)"""
    table, tokens = header.tensors.get("token_embd.weight"), header.metadata.get("tokenizer.ggml.tokens")
    if table is None or not isinstance(tokens, list) or len(tokens) >= table.shape[0]:
        return []
    return [
        f"tokenizer.ggml.tokens lists {len(tokens)} tokens, token_embd.weight has {table.shape[0]} rows; ids without a "
        "token have no text."
    ]
