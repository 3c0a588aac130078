"""A ``Checkpoint`` over a GGUF model, with the tensor names, shapes and conventions of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from truffula.errors import CheckpointError, some
from truffula.kernels.backend import QuantisedArray
from truffula.weights.checkpoint import Array, Checkpoint, TensorInfo
from truffula.weights.gguf_header import GgufHeader, GgufTensor, name_file_in_errors
from truffula.weights.gguf_hparams import ROPE_FREQS, check_unread_keys
from truffula.weights.gguf_names import family_of, rename, to_config
from truffula.weights.gguf_parts import Part, open_parts, tensors_of
from truffula.weights.gguf_quants import BY_NAME, FORMATS, BlockFormat, dequantize
from truffula.weights.gguf_tokenizer import generation_config, read_tokenizer


class GgufCheckpoint(Checkpoint):
    """A GGUF model, in one file or in parts; ``path`` is the first.

    ``read`` reverses the changes of llama.cpp's converter: interleaved rows of q and k, norms stored as 1 + weight.
    Unquantised tensors without such changes are views of the mapped file; all others are new arrays, in float32 where
    the file is quantised.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = open_parts(path)
        self.files = tuple(part.file for part in parts)
        warnings: list[str] = []
        with name_file_in_errors(path):
            found = tensors_of(parts)
            metadata = parts[0].header.metadata
            self._header = GgufHeader(metadata, {name: item for name, (_, item) in found.items()})
            self._family = family_of(self._header)
            factors = None
            if ROPE_FREQS in found:  # the config holds its values, in ``rope_parameters``
                part, item = found.pop(ROPE_FREQS)
                factors = dequantize(FORMATS[item.type], part.file.view(item.offset, item.nbytes), item.shape)
            self.config: dict[str, Any] = to_config(self._header, self._family, factors, warnings)
            self.generation_config: dict[str, Any] = generation_config(metadata)
            warnings += check_unread_keys(self._header)
            self.tensors = self._renamed(found)
        self.warnings = tuple(warnings)

    def _renamed(self, stored: Mapping[str, tuple[Part, GgufTensor]]) -> dict[str, TensorInfo]:
        found, unknown = {}, []
        for name, (part, item) in stored.items():
            new = rename(self._family, name)
            if new is None:
                unknown.append(name)
            else:
                format = FORMATS[item.type].name
                found[new] = TensorInfo(new, item.shape, format, part.path, item.offset, item.nbytes)
        if unknown:
            architecture = self._header.metadata["general.architecture"]
            raise CheckpointError(f"a {architecture} model has no such tensors: {some(unknown)}.", param=unknown[0])
        return found

    def _data(self, name: str) -> Array:
        """``[nbytes]`` uint8: the tensor's bytes, with its rows in Hugging Face's order."""
        data, rows, heads = self.raw(name), self.info(name).shape[0], self._interleaved_heads(name)
        if not heads or not data.size:
            return data
        if rows % (2 * heads):
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: {rows} rows do not divide into pairs of {heads} heads.", param=name
            )
        # The rows of each head are interleaved pairs, and become two halves. A row is whole blocks.
        pairs = data.reshape(heads, rows // heads // 2, 2, -1)
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)

    def _interleaved_heads(self, name: str) -> int:
        """The number of heads whose rows the converter has interleaved in this tensor; 0 for none."""
        if self._family.permuted and ".self_attn.q_proj." in name:
            return int(self.config["num_attention_heads"])
        if self._family.permuted and ".self_attn.k_proj." in name:
            return int(self.config["num_key_value_heads"])
        return 0

    def blocks(self, name: str) -> QuantisedArray | None:
        info = self.info(name)
        format = BY_NAME[info.dtype]
        if not format.scales or len(info.shape) != 2:
            return None
        rows, width = info.shape
        data = self._data(name).reshape(rows, width // format.size, format.nbytes)
        scales = np.ascontiguousarray(data[..., : 2 * format.scales]).view(np.float16)
        if not np.isfinite(scales).all():
            return None  # the caller reads the values instead and reports those that are not finite
        return QuantisedArray(format.name, data, (rows, width), partial(_values, format))

    def read(self, name: str) -> Array:
        info = self.info(name)
        values = dequantize(BY_NAME[info.dtype], self._data(name), info.shape)
        if self._family.shifted and name.endswith("norm.weight"):
            values = values.astype(np.float32) - np.float32(1)
        return values

    def tokenizer_files(self) -> dict[str, bytes]:
        return read_tokenizer(self._header.metadata).files


def _values(format: BlockFormat, blocks: Array) -> Array:
    return dequantize(format, np.ascontiguousarray(blocks).reshape(-1), (len(blocks), format.size))
