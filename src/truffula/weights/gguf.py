"""A ``Checkpoint`` over a GGUF model, with the tensor names, shapes and conventions of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from truffula.errors import CheckpointError, some
from truffula.kernels.backend import QuantisedArray
from truffula.weights.checkpoint import Array, TensorInfo
from truffula.weights.gguf_header import GgufHeader, GgufTensor, name_file_in_errors
from truffula.weights.gguf_hparams import ROPE_FREQS, check_unread_keys
from truffula.weights.gguf_names import family_of, rename, to_config
from truffula.weights.gguf_parts import Part, open_parts, tensors_of
from truffula.weights.gguf_quants import FORMATS, BlockFormat, dequantize
from truffula.weights.gguf_tokenizer import generation_config, read_tokenizer
from truffula.weights.mapped import MappedFile


class GgufCheckpoint:
    """A GGUF model, in one file or in parts; ``path`` is the first.

    ``read`` reverses the changes of llama.cpp's converter: interleaved rows of q and k, norms stored as 1 + weight.
    Unquantised tensors without such changes are views of the mapped file; all others are new arrays, in float32 where
    the file is quantised.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parts = open_parts(path)
        self.files: tuple[MappedFile, ...] = tuple(part.file for part in self._parts)
        warnings: list[str] = []
        with name_file_in_errors(path):
            found = tensors_of(self._parts)
            tensors = {name: item for name, (_, item) in found.items()}
            first = self._parts[0].header
            self._header = GgufHeader(first.metadata, tensors)
            self._family = family_of(self._header)
            factors = self._values(*found[ROPE_FREQS]) if ROPE_FREQS in found else None
            self.config: dict[str, Any] = to_config(self._header, self._family, factors, warnings)
            self.generation_config: dict[str, Any] = generation_config(first.metadata)
            warnings += check_unread_keys(self._header)
        self._stored = self._renamed(found)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, item.shape, FORMATS[item.type].name, part.path, item.offset, item.nbytes)
            for name, (part, item) in self._stored.items()
        }
        self.warnings = tuple(warnings)

    def _data(self, name: str) -> Array:
        """``[nbytes]`` uint8: the tensor's bytes, with its rows in Hugging Face's order."""
        part, item = self._item(name)
        data = part.file.view(item.offset, item.nbytes)
        heads = self._permuted_heads(name)
        if not heads or not item.nbytes:
            return data
        if item.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{part.path}: tensor {item.name!r}: {item.shape[0]} rows do not divide into pairs of {heads} heads.",
                param=item.name,
            )
        return _restore_halves(data, item.shape[0], heads)

    def blocks(self, name: str) -> QuantisedArray | None:
        _, item = self._item(name)
        format = FORMATS[item.type]
        if not format.scales or len(item.shape) != 2:
            return None
        rows, width = item.shape
        data = self._data(name).reshape(rows, width // format.size, format.nbytes)
        scales = np.ascontiguousarray(data[..., : 2 * format.scales]).view(np.float16)
        if not np.isfinite(scales).all():
            return None  # the caller reads the values instead and reports those that are not finite
        return QuantisedArray(format.name, data, (rows, width), partial(_values, format))

    def read(self, name: str) -> Array:
        _, item = self._item(name)
        values = dequantize(FORMATS[item.type], self._data(name), item.shape)
        if self._family.shifted and name.endswith("norm.weight"):
            values = values.astype(np.float32) - np.float32(1)
        return values

    def raw(self, name: str) -> Array:
        part, item = self._item(name)
        return part.file.view(item.offset, item.nbytes)

    def tokenizer_files(self) -> dict[str, bytes]:
        return read_tokenizer(self._header.metadata).files

    def close(self) -> None:
        for part in self._parts:
            part.file.close()

    def _item(self, name: str) -> tuple[Part, GgufTensor]:
        try:
            return self._stored[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.", param=name) from None

    def _values(self, part: Part, item: GgufTensor) -> Array:
        return dequantize(FORMATS[item.type], part.file.view(item.offset, item.nbytes), item.shape)

    def _renamed(self, stored: Mapping[str, tuple[Part, GgufTensor]]) -> dict[str, tuple[Part, GgufTensor]]:
        found, unknown = {}, []
        for name, item in stored.items():
            if name == ROPE_FREQS:
                continue  # the config holds its values, in ``rope_parameters``
            new = rename(self._family, name)
            if new is None:
                unknown.append(name)
            else:
                found[new] = item
        if unknown:
            architecture = self._header.metadata["general.architecture"]
            raise CheckpointError(
                f"{self.path}: a {architecture} model has no such tensors: {some(unknown)}.", param=unknown[0]
            )
        return found

    def _permuted_heads(self, name: str) -> int:
        """The number of heads whose rows the converter has interleaved in this tensor; 0 for none."""
        if self._family.permuted and ".self_attn.q_proj." in name:
            return int(self.config["num_attention_heads"])
        if self._family.permuted and ".self_attn.k_proj." in name:
            return int(self.config["num_key_value_heads"])
        return 0


def _values(format: BlockFormat, blocks: Array) -> Array:
    return dequantize(format, np.ascontiguousarray(blocks).reshape(-1), (len(blocks), format.size))


def _restore_halves(data: Array, rows: int, heads: int) -> Array:
    """The bytes with the rows of each head reordered from interleaved pairs into two halves. A row is whole blocks."""
    pairs = data.reshape(heads, rows // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)
