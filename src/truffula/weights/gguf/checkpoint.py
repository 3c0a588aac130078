"""A ``Checkpoint`` over a GGUF model, with the tensor names, shapes and conventions of Hugging Face."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from truffula.errors import CheckpointError, some
from truffula.kernels.backend import QuantisedArray
from truffula.weights.checkpoint import Array, Checkpoint, TensorInfo
from truffula.weights.gguf.changes import Change, Config, Order
from truffula.weights.gguf.header import GgufHeader, GgufTensor, PartName, name_file_in_errors, read_header
from truffula.weights.gguf.hparams import TABLES, HParams, check_unread_keys
from truffula.weights.gguf.names import change_of, family_of, rename, to_config
from truffula.weights.gguf.quants import BY_NAME, FORMATS, dequantize, values_of_blocks
from truffula.weights.gguf.tokenizer import generation_config
from truffula.weights.mapped import MappedFile

# A file that was cut into byte ranges: some publishers do this to stay below the Hub's limit of 50 GB per file.
_PIECE = re.compile(r"(?P<whole>.+\.gguf)(?P<cut>[.-]?(part|split)-?)[a-z0-9]+", re.IGNORECASE)

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,8})\.", re.ASCII)


class GgufCheckpoint(Checkpoint):
    """A GGUF model, in one file or in parts; ``path`` is the first.

    ``read`` reverses the changes of llama.cpp's converter (``changes``). Unquantised tensors without such changes
    are views of the mapped file; all others are new arrays, in float32 where the file is quantised.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = open_parts(path)
        self.files = tuple(part.file for part in parts)
        warnings: list[str] = []
        with name_file_in_errors(path):
            found = _tensors_of(parts)
            metadata = parts[0].header.metadata
            self._header = GgufHeader(metadata, {name: item for name, (_, item) in found.items()})
            self._family = family_of(self._header)
            self.no_adapters = self._family.no_adapters
            tables = {}  # the config holds their values
            for name in [name for name in found if name in TABLES or re.fullmatch(self._family.read, name)]:
                part, item = found.pop(name)
                view = part.file.view(item.offset, item.nbytes)
                tables[item.name] = dequantize(FORMATS[item.type], view, item.shape)
            hparams = HParams(metadata["general.architecture"], self._header, tables)
            self.config: dict[str, Any] = to_config(hparams, self._family, warnings)
            self._sizes: dict[str, Any] = self.config.get("text_config", self.config)
            self._made = self._family.made(hparams, self._sizes) if self._family.made is not None else {}
            self.generation_config: dict[str, Any] = generation_config(metadata)
            warnings += check_unread_keys(self._header)
            self._layers = hparams.count("block_count")
            self.tensors = self._renamed(found)
        self.warnings = (*warnings, *([f"No adapters are taken: {self.no_adapters}"] if self.no_adapters else []))

    def _renamed(self, stored: Mapping[str, tuple[Part, GgufTensor]]) -> dict[str, TensorInfo]:
        found: dict[str, list[TensorInfo]] = {}
        unknown, unused = [], []
        layers = self._sizes["num_hidden_layers"]
        for name, (part, item) in stored.items():
            new = rename(self._family, name)
            layer = _LAYER.match(name)
            if layer and layers <= int(layer[1]) < self._layers:  # it predicts further tokens
                unused.append(name)
            elif new is None:
                unknown.append(name)
            else:
                info = TensorInfo(name, item.shape, FORMATS[item.type].name, part.path, item.offset, item.nbytes)
                for each, rows in self._split(new, info):
                    found.setdefault(each, []).append(rows)
        if unknown:
            architecture = self._header.metadata["general.architecture"]
            raise CheckpointError(f"a {architecture} model has no such tensors: {some(unknown)}.", param=unknown[0])
        self.unused = tuple(unused)
        items = found.items()
        tensors = {name: self._made_of(name, sorted(parts, key=lambda part: part.name)) for name, parts in items}
        for name, values in self._made.items():
            tensors[name] = TensorInfo(name, values.shape, "F32", self.path, 0, values.nbytes)
        return tensors

    def _split(self, name: str, info: TensorInfo) -> list[tuple[str, TensorInfo]]:
        """``info``, or each of its rows, where they are modules of their own."""
        module, _, kind = name.rpartition(".")
        own = next((own for stem, own in self._family.split.items() if module.endswith(f".{stem}")), None)
        if own is None:
            return [(name, info)]
        rows, *shape = info.shape
        if not shape or rows not in (self._sizes["num_attention_heads"], self._sizes["num_key_value_heads"]):
            why = f"{info.name} has the shape {list(info.shape)}: not a row for each head."
            raise CheckpointError(why, param=info.name)
        size = info.nbytes // rows
        return [
            (f"{module}.{own.format(h=row)}.{kind}",
             msgspec.structs.replace(info, shape=tuple(shape), offset=info.offset + row * size, nbytes=size))
            for row in range(rows)
        ]  # fmt: skip

    def _made_of(self, name: str, parts: list[TensorInfo]) -> TensorInfo:
        change, first, types = change_of(self._family, name, len(parts)), parts[0], {part.dtype: 0 for part in parts}
        try:
            shape = change.shape(self._sizes, *(part.shape for part in parts))
        except (ValueError, IndexError, TypeError):
            shape = None
        if shape is None or math.prod(shape) != sum(math.prod(part.shape) for part in parts):
            names, shapes = " and ".join(part.name for part in parts), [list(part.shape) for part in parts]
            raise CheckpointError(f"{name} cannot be made of {names}, of the shapes {shapes}.", param=first.name)
        nbytes = sum(part.nbytes for part in parts)
        info = TensorInfo(name, shape, "+".join(types), first.file, first.offset, nbytes)
        whole = self._in_whole_blocks(info, change)
        if whole and len(parts) == 1:
            return info
        kept = whole or (change.kept and len(types) == 1 and BY_NAME[first.dtype].dtype is not None)
        several = tuple(parts) if len(parts) > 1 or change.values is not None else ()
        return msgspec.structs.replace(info, parts=several, values=first.dtype if kept else "F32")

    def _info_and_change(self, name: str) -> tuple[TensorInfo, Change]:
        info = self.info(name)
        return info, change_of(self._family, name, len(info.parts))

    def _sorted(self, name: str, data: Array) -> Array:
        """``data``, the tensor's bytes or its values, with rows and columns in Hugging Face's order."""
        info, change = self._info_and_change(name)
        shape = info.shape
        for times, n, order in ((1, shape[0], change.rows), (math.prod(shape[:-1]), shape[-1], change.columns)):
            if order is None or not data.size:
                continue
            runs = self._runs(info, order, n)
            if data.size % (times * len(runs)):
                raise self._not_divided(info, n)
            data = data.reshape(times, len(runs), -1)[:, runs].reshape(-1)
        return data

    def _runs(self, info: TensorInfo, order: Callable[[Config, int], Order], n: int) -> Order:
        """The order of n rows or columns, which is made of no number that is larger."""
        try:
            runs = order({key: value for key, value in self._sizes.items() if type(value) is not int or value <= n}, n)
        except (KeyError, ValueError):
            raise self._not_divided(info, n) from None
        if not len(runs) or n % len(runs):
            raise self._not_divided(info, n)
        return runs

    def _not_divided(self, info: TensorInfo, n: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: tensor {info.name!r}: its {n} rows or columns in {info.dtype} do not divide into equal "
            "parts, as the metadata's numbers of heads say.",
            param=info.name,
        )

    def _in_whole_blocks(self, info: TensorInfo, change: Change) -> bool:
        """Whether the tensor is in blocks of one kind that are not divided when it is put in order."""
        format, last = BY_NAME.get(info.dtype), change.columns if len(info.shape) > 1 else change.rows
        if format is None or change.values is not None:
            return False
        if format.size == 1 or last is None:
            return True
        return info.shape[-1] // len(self._runs(info, last, info.shape[-1])) % format.size == 0

    def blocks(self, name: str) -> QuantisedArray | None:
        info, change = self._info_and_change(name)
        format = BY_NAME.get(info.dtype)
        if format is None or not format.scales or len(info.shape) < 2 or not self._in_whole_blocks(info, change):
            return None
        *rows, width = info.shape
        data = self._sorted(name, self._bytes(info)).reshape(*rows, width // format.size, format.nbytes)
        scales = np.ascontiguousarray(data[..., : 2 * format.scales]).view(np.float16)
        if not np.isfinite(scales).all():
            return None  # the caller reads the values instead and reports those that are not finite
        return QuantisedArray(format.name, data, info.shape, partial(values_of_blocks, format))

    def read(self, name: str) -> Array:
        if name in self._made:
            return self._made[name]
        info, change = self._info_and_change(name)
        if self._in_whole_blocks(info, change):
            return dequantize(BY_NAME[info.dtype], self._sorted(name, self._bytes(info)), info.shape)
        stored = info.parts or (info,)
        values = [dequantize(BY_NAME[part.dtype], self.bytes_of(part), part.shape) for part in stored]
        if change.values is not None:
            with np.errstate(all="ignore"):  # a later check reports values that are not finite
                values = [change.values(self._sizes, *values)]
        return self._sorted(name, np.concatenate([item.reshape(-1) for item in values])).reshape(info.shape)

    def _bytes(self, info: TensorInfo) -> Array:
        return np.concatenate([self.bytes_of(part) for part in info.parts]) if info.parts else self.bytes_of(info)


@dataclass(frozen=True)
class Part:
    """One mapped file and its header.

    The first part of a split model holds the metadata; each holds whole tensors, ``split.no`` (from 0),
    ``split.count`` and ``split.tensors.count`` (of all parts). Their names end in ``-00001-of-00003.gguf``.
    """

    file: MappedFile
    header: GgufHeader

    @property
    def path(self) -> Path:
        return self.file.path


def open_parts(path: Path) -> list[Part]:
    """All files of the model whose first or only file is ``path``, with their headers.

    Raises:
        CheckpointError: the file is a later part, parts are missing, or they do not belong together.
    """
    piece = _PIECE.fullmatch(path.name)
    if piece:
        whole = piece["whole"]
        raise CheckpointError(
            f"{path} is a piece of a file that was cut by bytes. Join the pieces in their order, "
            f"`cat {whole}{piece['cut']}* > {whole}`, and give {path.with_name(whole)}.",
            param=str(path),
        )
    first = _open(path)
    count = _split_number(first, "split.count", 1)
    if count <= 1:
        return [first]
    parts = [first, *map(_open, _other_parts(first, count))]
    _check_parts(parts, count)
    return parts


def _tensors_of(parts: list[Part]) -> dict[str, tuple[Part, GgufTensor]]:
    """Every tensor and its part, by name. Raises ``CheckpointError`` for a name that is in two parts."""
    found: dict[str, tuple[Part, GgufTensor]] = {}
    for part in parts:
        for name, item in part.header.tensors.items():
            if name in found:
                raise CheckpointError(
                    f"tensor {name!r} is in both {found[name][0].path.name} and {part.path.name}.", param=name
                )
            found[name] = (part, item)
    return found


def _open(path: Path) -> Part:
    file = MappedFile(path)
    return Part(file, read_header(path, file.data()))


def _split_number(part: Part, key: str, default: int) -> int:
    value: Any = part.header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(
            f"{part.path}: the GGUF metadata key {key} is {value!r}; it must be an integer of at least 0.", param=key
        )
    return value


def _other_parts(first: Part, count: int) -> list[Path]:
    """The paths of parts 2 to ``count``. Raises ``CheckpointError`` when one is missing."""
    path, number = first.path, _split_number(first, "split.no", 0) + 1
    named = PartName.of(path.name)
    if named and (named.number, named.total) != (number, count):
        named = None
    if number > 1:
        name = named.names()[0] if named else f"NAME-{1:05d}-of-{count:05d}.gguf"
        raise CheckpointError(
            f"{path} is part {number} of {count} of a split GGUF model; give the first part, {name}.", param=str(path)
        )
    if named is None:
        raise CheckpointError(
            f"{path} is part 1 of {count} of a split GGUF model, and the names of the others do not follow from its "
            f"name: rename the parts to NAME-00001-of-{count:05d}.gguf and so on.",
            param=str(path),
        )
    paths = [path.with_name(name) for name in named.names()[1:]]
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is part 1 of {count} of a split GGUF model; missing beside it: {some(missing, 3)}.",
            param=str(path.with_name(missing[0])),
        )
    return paths


def _check_parts(parts: list[Part], count: int) -> None:
    """Raise ``CheckpointError`` when the parts do not belong to one model."""
    first, *others = parts
    total = _split_number(first, "split.tensors.count", 0)
    shared = [key for key in first.header.metadata if not key.startswith("split.") and key != "general.alignment"]
    for index, part in enumerate(others, 1):
        mine, theirs = first.header.metadata, part.header.metadata
        found = {key: theirs.peek(key) for key in shared if key in theirs}
        wanted = {key: mine.peek(key) for key in found}
        for key, value in (("split.no", index), ("split.count", count), ("split.tensors.count", total)):
            found[key], wanted[key] = _split_number(part, key, 0), value
        for key, value in wanted.items():
            if found[key] != value:
                raise CheckpointError(
                    f"{part.path} does not belong to {first.path.name}: {key} is {found[key]!r}; expected {value!r}.",
                    param=key,
                )
    held = sum(len(part.header.tensors) for part in parts)
    if held != total:
        raise CheckpointError(
            f"{first.path}: split.tensors.count is {total}, but the {count} parts hold {held} tensors.",
            param="split.tensors.count",
        )
