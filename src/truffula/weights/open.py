"""``open_checkpoint``: opens a model of any supported file format."""

from __future__ import annotations

from pathlib import Path

from truffula.errors import CheckpointError, ModelNotFound
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.folder import FolderCheckpoint
from truffula.weights.gguf.checkpoint import GgufCheckpoint
from truffula.weights.quantised.checkpoint import QuantisedCheckpoint
from truffula.weights.quantised.config import read_scheme, with_side_config
from truffula.weights.quantised.logical import FLOATS


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder or a ``.gguf`` file. Reads only headers and JSON, in milliseconds.

    Raises:
        ModelNotFound: ``path`` does not exist.
        CheckpointError: A file is broken or of an unknown format.
        UnsupportedModel: The architecture of a GGUF file or the quantisation is not supported; named in the message.
    """
    if path.is_dir():
        folder = FolderCheckpoint(path)
        if any(info.dtype not in FLOATS for info in folder.tensors.values()):
            folder.config = with_side_config(folder.config, path)
        scheme = read_scheme(folder.config)
        return folder if scheme is None else QuantisedCheckpoint(folder, scheme)
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist.", param=str(path))
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is one file of a model; give its folder, {path.parent}.", param=str(path))
    return GgufCheckpoint(path)
