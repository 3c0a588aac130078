"""The files of a GGUF model: one, or the parts that ``llama-gguf-split`` and the converters write.

The first part holds the metadata; each holds whole tensors, ``split.no`` (from 0), ``split.count`` and
``split.tensors.count`` (of all parts). Their names end in ``-00001-of-00003.gguf``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truffula.errors import CheckpointError, some
from truffula.weights.gguf_header import GgufHeader, GgufTensor, PartName, read_header
from truffula.weights.mapped import MappedFile

# A file that was cut into byte ranges: some publishers do this to stay below the Hub's limit of 50 GB per file.
_PIECE = re.compile(r"(?P<whole>.+\.gguf)(?P<cut>[.-]?(part|split)-?)[a-z0-9]+", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One mapped file and its header."""

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
    count = _number(first, "split.count", 1)
    if count <= 1:
        return [first]
    parts = [first, *map(_open, _other_parts(first, count))]
    _check_set(parts, count)
    return parts


def tensors_of(parts: list[Part]) -> dict[str, tuple[Part, GgufTensor]]:
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


def _number(part: Part, key: str, default: int) -> int:
    value: Any = part.header.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(
            f"{part.path}: the GGUF metadata key {key} is {value!r}; it must be an integer of at least 0.", param=key
        )
    return value


def _other_parts(first: Part, count: int) -> list[Path]:
    """The paths of parts 2 to ``count``. Raises ``CheckpointError`` when one is missing."""
    path, number = first.path, _number(first, "split.no", 0) + 1
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


def _check_set(parts: list[Part], count: int) -> None:
    """Raise ``CheckpointError`` when the parts do not belong to one model."""
    first, *others = parts
    total = _number(first, "split.tensors.count", 0)
    shared = [key for key in first.header.metadata if not key.startswith("split.") and key != "general.alignment"]
    for index, part in enumerate(others, 1):
        mine, theirs = first.header.metadata, part.header.metadata
        found = {key: theirs.peek(key) for key in shared if key in theirs}
        wanted = {key: mine.peek(key) for key in found}
        for key, value in (("split.no", index), ("split.count", count), ("split.tensors.count", total)):
            found[key], wanted[key] = _number(part, key, 0), value
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
