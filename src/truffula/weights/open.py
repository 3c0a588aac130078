"""``open_checkpoint``: one door to every file format."""

from __future__ import annotations

from pathlib import Path

from truffula.errors import CheckpointError, ModelNotFound
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.folder import FolderCheckpoint
from truffula.weights.gguf import GgufCheckpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder or a ``.gguf`` file. Reads headers and JSON only: milliseconds, whatever the size.

    Raises:
        ModelNotFound: Nothing is there.
        CheckpointError: What is there is broken, or no format we read.
        UnsupportedModel: A GGUF file of an architecture or quantisation we don't read, by its name.
    """
    if path.is_dir():
        return FolderCheckpoint(path)
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist.", param=str(path))
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a model; give its folder, {path.parent}.", param=str(path))
    return GgufCheckpoint(path)
