"""Errors about the inside of a file, named by the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from truffula.errors import CheckpointError, UnsupportedModel


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """What is said of a key or a tensor begins with the file it is in."""
    try:
        yield
    except (CheckpointError, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error.message}", param=error.param, **error.data) from error
