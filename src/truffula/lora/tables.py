"""Compares the copies of base tables that PEFT saves with an adapter with the base's own tables.

``save_pretrained`` writes ``<table>.base_layer.weight`` when an embedding or the head is targeted (its
``save_embedding_layers="auto"``), and PEFT loads it back into the base. A copy that equals the served table changes
nothing and is left out; another one would be a trained table, which is not served.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.backend import Array
from truffula.types import FileStamp
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.safetensors import DTYPES
from truffula.weights.watch import stamp_of

FLOATS = ("F32", "F16", "BF16")
_CHUNK_ROWS = 1024
_WAY_OUT = "Save the adapter with save_embedding_layers=False, which leaves the copy out."


@dataclass(frozen=True)
class BaseTable:
    """A table ``[V, D]`` in a file of the base: where it is, and the file as it was when the base was loaded."""

    file: FileStamp
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def check_copy(self, key: str, copy: Array) -> None:
        """``AdapterError`` unless ``copy``, the adapter's tensor ``key``, is this table in the copy's dtype.

        Reads both once.
        """
        if copy.shape != self.shape:
            raise _refused(key, f"has shape {list(copy.shape)}; the base's table has {list(self.shape)}")
        if self.dtype not in FLOATS:
            raise _refused(key, f"cannot be compared with the base's table, which is stored as {self.dtype}")
        try:
            with open(self.file.path, "rb") as file:  # noqa: PTH123  a path as a string
                if stamp_of(Path(self.file.path), os.fstat(file.fileno())) != self.file:
                    raise _refused(key, "cannot be compared: the base's file was replaced since it was loaded")
                own = np.memmap(file, DTYPES[self.dtype], "r", self.offset, self.shape)
        except OSError as error:
            raise _refused(key, f"cannot be compared: the base's file cannot be read ({error.strerror})") from error
        for row in range(0, len(own), _CHUNK_ROWS):
            chunk = slice(row, row + _CHUNK_ROWS)
            if not np.array_equal(own[chunk].astype(copy.dtype), copy[chunk]):
                raise _refused(key, "differs from the base's table: a trained table, which is not served yet")


def base_tables(names: Mapping[str, str], checkpoint: Checkpoint) -> dict[str, BaseTable]:
    """The base's tables by kind of site. ``names`` are their tensors (``ModelPlan.tables``)."""
    stamps = {file.path: file.opened for file in checkpoint.files}
    infos = {kind: checkpoint.tensors[name] for kind, name in names.items()}
    return {kind: BaseTable(stamps[i.file], i.dtype, i.shape, i.offset) for kind, i in infos.items()}


def check_copies(copies: Mapping[str, tuple[str, Array]], tables: Mapping[str, BaseTable]) -> None:
    """``AdapterError`` unless each copy (kind → key, tensor) equals the base's table of that kind."""
    for kind, (key, copy) in copies.items():
        if kind not in tables:
            raise _refused(key, "cannot be compared with the base's table here")
        tables[kind].check_copy(key, copy)


def _refused(key: str, why: str) -> AdapterError:
    return AdapterError(
        f"{key}, a copy of a base table (save_embedding_layers), {why}. {_WAY_OUT}",
        param="save_embedding_layers",
        key=key,
    )
