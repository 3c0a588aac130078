"""``ConfigAlone``: a config.json without weights, as the checkpoint that it describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from truffula.environment import prepare_compute
from truffula.errors import CheckpointError
from truffula.model.names import written_tensors
from truffula.model.plan import FLOATS
from truffula.model.read import is_native, read_config, require_transformers
from truffula.weights.checkpoint import Array, Checkpoint, TensorInfo
from truffula.weights.quantised.config import read_scheme
from truffula.weights.text_files import generation_config, read_json
from truffula.weights.tying import read_flag

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_DTYPES = {name: stored for stored, name in FLOATS.items()}


class ConfigAlone(Checkpoint):
    """The tensors that transformers would write for a config.json, without values: for reports.

    They have the dtype that the config names, quantised or not; there is a head unless the flag, or without one the
    class, says that it is tied.

    Raises:
        UnsupportedModel: The config is not supported.
        MissingDependency: Transformers computes the model, and is not installed.
    """

    format = "config.json alone"

    def __init__(self, file: Path) -> None:
        self.path, self.files = file.parent, ()
        self.config = read_json(file, infinity=True)
        self.generation_config = generation_config(file.parent)
        shapes, dtype = _native(self.config) if is_native(self.config) else _others(self.config), _dtype(self.config)
        self.tensors = {
            name: TensorInfo(name, shape, dtype, file, 0, math.prod(shape) * _WIDTHS[dtype])
            for name, shape in shapes.items()
        }
        self.warnings = (f"{file} stands alone: weights, their sizes and tying are what it says they should be.",)
        if read_scheme(self.config) is not None:
            self.warnings += ("Files of quantised weights are smaller than the sizes here.",)

    def read(self, name: str) -> Array:
        raise CheckpointError(f"{self.path} holds no weights.", param=name)

    def bytes_of(self, info: TensorInfo) -> Array:
        """The name: two tables that a config describes are not equal."""
        return np.frombuffer(info.name.encode(), np.uint8)


def _native(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors by name."""
    read, (flag, _) = read_config(config), read_flag(config)
    tied = read.tie_default if flag is None else flag
    return {item.name: item.shape for item in written_tensors(read.spec, has_head=not tied)}


def _others(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The same of a model that transformers' code computes: its parameters and buffers, as it names them."""
    require_transformers(config)
    prepare_compute()
    from truffula.model.fallback.skeleton import make_skeleton

    skeleton = make_skeleton(config)
    model = skeleton.built()
    tied = model.all_tied_weights_keys if skeleton.config.tie_word_embeddings else {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config names, at its top or in its text config, as safetensors names it; else that of floats."""
    text = config.get("text_config")
    levels = [config, text] if isinstance(text, Mapping) else [config]
    names = [level.get(key) for level in levels for key in ("dtype", "torch_dtype")]
    return next((_DTYPES[name] for name in names if isinstance(name, str) and name in _DTYPES), "F32")
