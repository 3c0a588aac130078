"""``ConfigAlone``: a config.json without weights, as the checkpoint that it describes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.model.names import written_tensors
from truffula.model.plan import FLOATS
from truffula.model.read import is_native, read_config
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
        UnsupportedModel: The config is not supported, or transformers' code computes the model.
    """

    format = "config.json alone"

    def __init__(self, file: Path) -> None:
        self.path, self.files = file.parent, ()
        self.config = read_json(file)
        self.generation_config = generation_config(file.parent)
        if not is_native(self.config):
            raise UnsupportedModel(
                f"{file}: model_type is {self.config.get('model_type')!r}, which transformers' code computes; such a "
                "model is inspected with its weights.",
                param="model_type",
            )
        read = read_config(self.config)
        flag, _ = read_flag(self.config)
        dtype = _dtype(self.config)
        tied = read.tie_default if flag is None else flag
        self.tensors = {
            item.name: TensorInfo(item.name, item.shape, dtype, file, 0, math.prod(item.shape) * _WIDTHS[dtype])
            for item in written_tensors(read.spec, has_head=not tied)
        }
        self.warnings = (f"{file} stands alone: weights, their sizes and tying are what it says they should be.",)
        if read_scheme(self.config) is not None:
            self.warnings += ("Files of quantised weights are smaller than the sizes here.",)

    def read(self, name: str) -> Array:
        raise CheckpointError(f"{self.path} holds no weights.", param=name)

    def bytes_of(self, info: TensorInfo) -> Array:
        """The name: two tables that a config describes are not equal."""
        return np.frombuffer(info.name.encode(), np.uint8)


def _dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config names, at its top or in its text config, as safetensors names it; else that of floats."""
    text = config.get("text_config")
    levels = [config, text] if isinstance(text, Mapping) else [config]
    names = [level.get(key) for level in levels for key in ("dtype", "torch_dtype")]
    return next((_DTYPES[name] for name in names if isinstance(name, str) and name in _DTYPES), "F32")
