"""The header of a GGUF file: metadata and tensor list, every length checked against the file before it is used.

Layout (versions 2 and 3, little endian): magic ``GGUF``, ``u32`` version, ``u64`` tensors, ``u64`` pairs; the pairs
(string key, ``u32`` type, value); per tensor its name, ``u32`` dimensions, that many ``u64`` sizes (fastest first),
``u32`` type, ``u64`` offset; then, aligned, the data. Source: the GGUF description in the ggml project.

The package ``gguf`` reads the same, for tools: numpy views of each string make 8 s of SmolLM2's header (0.07 s here),
its import takes 0.2 s, and lengths that a file claims are not checked before memory is taken for them.
"""

from __future__ import annotations

import math
import re
import struct
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from truffula.errors import CheckpointError, UnsupportedModel
from truffula.weights.text_files import is_lfs_pointer, lfs_pointer_error

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 1 << 30
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Mapping[int, str] = dict(enumerate("BbHhIif")) | {7: "B", 10: "Q", 11: "q", 12: "d"}  # struct's letters
_U64 = struct.Struct("<Q")


class TypeSize(NamedTuple):
    """A storage type: ``size`` values take ``nbytes`` bytes."""

    name: str
    size: int
    nbytes: int


SIZES: Mapping[int, TypeSize] = {
    0: TypeSize("F32", 1, 4),
    1: TypeSize("F16", 1, 2),
    2: TypeSize("Q4_0", 32, 18),
    3: TypeSize("Q4_1", 32, 20),
    6: TypeSize("Q5_0", 32, 22),
    7: TypeSize("Q5_1", 32, 24),
    8: TypeSize("Q8_0", 32, 34),
    12: TypeSize("Q4_K", 256, 144),
    13: TypeSize("Q5_K", 256, 176),
    14: TypeSize("Q6_K", 256, 210),
    10: TypeSize("Q2_K", 256, 84),
    11: TypeSize("Q3_K", 256, 110),
    16: TypeSize("IQ2_XXS", 256, 66),
    17: TypeSize("IQ2_XS", 256, 74),
    18: TypeSize("IQ3_XXS", 256, 98),
    19: TypeSize("IQ1_S", 256, 50),
    20: TypeSize("IQ4_NL", 32, 18),
    21: TypeSize("IQ3_S", 256, 110),
    22: TypeSize("IQ2_S", 256, 82),
    23: TypeSize("IQ4_XS", 256, 136),
    29: TypeSize("IQ1_M", 256, 56),
    30: TypeSize("BF16", 1, 2),
    34: TypeSize("TQ1_0", 256, 54),
    35: TypeSize("TQ2_0", 256, 66),
    39: TypeSize("MXFP4", 32, 17),
    40: TypeSize("NVFP4", 64, 36),
}
"""The supported storage types, by their number in the files."""
OTHER_TYPES: Mapping[int, str] = {
    **{9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 41: "Q1_0"},
}
"""Types that are not supported, for errors."""
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf", re.ASCII)


@dataclass(frozen=True)
class PartName:
    """The file name of one part of a split model, ``STEM-00001-of-00003.gguf``; ``number`` counts from 1."""

    stem: str
    number: int
    total: int

    @classmethod
    def of(cls, name: str) -> PartName | None:
        """``name`` parsed; None when it is not the name of a part. It may be a path."""
        found = _PART.fullmatch(name)
        part = found and cls(found["stem"], int(found["number"]), int(found["total"]))
        return part if part and 1 <= part.number <= part.total else None

    def names(self) -> list[str]:
        """The names of all parts, in order."""
        return [f"{self.stem}-{i:05d}-of-{self.total:05d}.gguf" for i in range(1, self.total + 1)]


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Prefix the errors about a key or a tensor that are raised inside with ``path``."""
    try:
        yield
    except (CheckpointError, UnsupportedModel) as error:
        raise type(error)(f"{path}: {error.message}", param=error.param, **error.data) from error


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the list; ``shape`` in row-major order, ``offset`` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Strings:
    """``count`` strings, of which ``data`` is exactly the bytes."""

    data: memoryview
    count: int

    def read(self) -> list[str]:
        """The strings. A vocabulary has up to 262,144 of them, so the loop is optimised."""
        # Slicing bytes takes half the time of slicing a memoryview.
        data, position, unpack, found = bytes(self.data), 0, _U64.unpack_from, []
        for _ in range(self.count):
            stop = position + 8 + unpack(data, position)[0]
            found.append(data[position + 8 : stop].decode("utf-8", "surrogateescape"))
            position = stop
        return found


class Metadata(UserDict[str, Any]):
    """The key-value pairs of a file, in its order. It records which keys are read, so that the others can be reported.

    A lookup (``[key]``, ``get``) counts as a read; ``in``, iteration and ``peek`` do not.
    """

    def __init__(self, pairs: dict[str, Any]) -> None:
        super().__init__(pairs)
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self.data[key]
        self._read.add(key)
        if isinstance(value, _Strings):
            value = self.data[key] = value.read()
        return value

    def peek(self, key: str) -> Any:
        """The value for a message: not counted as a read; of a list, its length."""
        value = self.data[key]
        if isinstance(value, _Strings | list):
            return f"a list of {value.count if isinstance(value, _Strings) else len(value)}"
        return value

    def unread(self) -> list[str]:
        """The keys that were not read so far, in the file's order."""
        return [key for key in self if key not in self._read]


@dataclass(frozen=True)
class GgufHeader:
    """``metadata`` values are int, float, bool, str, or lists of these.

    Lists of strings are decoded when they are read, because an engine does not need the vocabulary. Until then the
    file must stay mapped.
    """

    metadata: Metadata
    tensors: Mapping[str, GgufTensor]


def read_header(path: Path, data: memoryview) -> GgufHeader:
    """Parse and check the header of a file that holds ``data``.

    Raises ``CheckpointError`` naming the file and the invalid key or tensor.
    """
    size, head = len(data), bytes(data[:64])
    if size == 0:
        raise _error(path, "the file is empty.")
    if is_lfs_pointer(head):
        raise lfs_pointer_error(path)
    if not head.startswith(MAGIC):
        raise _error(path, "it does not begin with 'GGUF'; not a GGUF file.")
    cursor = _Cursor(path, data[:MAX_HEADER_BYTES], len(MAGIC))
    version = cursor.number("I", "its version")
    if version not in VERSIONS:
        kind = "big-endian" if version in {v << 24 for v in VERSIONS} else f"version {version}"
        raise _error(path, f"{kind} GGUF is not supported; supported are versions 2 and 3 in little-endian byte order.")
    tensor_count, pair_count = cursor.number("Q", "its tensor count"), cursor.number("Q", "its metadata count")
    metadata: dict[str, Any] = {}
    cursor.require(pair_count, 13, "metadata pairs")
    for _ in range(pair_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise _error(path, f"the metadata key {key!r} is written twice.", key)
        metadata[key] = cursor.value(cursor.number("I", f"the type of {key!r}"), key)
    cursor.require(tensor_count, 24, "tensors")
    listed = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _error(path, f"general.alignment is {alignment!r}; it must be a power of two.", "general.alignment")
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(Metadata(metadata), _placed(path, listed, start, size))


def _error(path: Path, why: str, name: str | None = None) -> CheckpointError:
    return CheckpointError(f"{path}: {why}", param=name if name is not None else str(path), file=str(path))


class _Cursor:
    """A position in the header; every read first checks that the header holds enough bytes."""

    def __init__(self, path: Path, data: memoryview, position: int) -> None:
        self.path, self.data, self.position = path, data, position

    def require(self, count: int, each: int, what: str) -> None:
        if count * each > len(self.data) - self.position:
            raise _error(self.path, f"truncated or damaged: {count} {what} do not fit after byte {self.position}.")

    def number(self, letter: str, what: str) -> Any:
        kind = struct.Struct(f"<{letter}")
        self.require(1, kind.size, what)
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def string(self, what: str) -> str:
        self.require(1, 8, what)
        (length,) = _U64.unpack_from(self.data, self.position)
        self.position += 8
        self.require(length, 1, f"bytes of {what}")
        raw = bytes(self.data[self.position : self.position + length])
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _error(self.path, f"{what} is not UTF-8: {error.reason}.") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        value = self.number(self._letter(kind, key), f"the value of {key!r}")
        return bool(value) if kind == _BOOL else value

    def _letter(self, kind: int, key: str) -> str:
        if kind not in _NUMBERS:
            what = "is a list of lists" if kind == _ARRAY else f"has the unknown type {kind}"
            raise _error(self.path, f"the metadata key {key!r} {what}.", key)
        return _NUMBERS[kind]

    def _array(self, key: str) -> list[Any] | _Strings:
        kind = self.number("I", f"the type of {key!r}")
        count = self.number("Q", f"the length of {key!r}")
        if kind == _STRING:
            return self._strings(count, key)
        letter = self._letter(kind, key)
        self.require(count, struct.calcsize(f"<{letter}"), f"items of {key!r}")
        run = struct.Struct(f"<{count}{letter}")
        values = list(run.unpack_from(self.data, self.position))
        self.position += run.size
        return [bool(value) for value in values] if kind == _BOOL else values

    def _strings(self, count: int, key: str) -> _Strings:
        self.require(count, 8, f"strings of {key!r}")
        data, position, end = self.data, self.position, len(self.data)
        unpack, done = _U64.unpack_from, 0
        while done < count and position + 8 <= end:
            position += 8 + unpack(data, position)[0]
            done += 1
        if done != count or position > end:
            raise _error(self.path, f"truncated or damaged: the strings of {key!r} run past its end.", key)
        found = _Strings(data[self.position : position], count)
        self.position = position
        return found


def _tensor(cursor: _Cursor) -> GgufTensor:
    """The next entry of the list. Its ``offset`` is still from the start of the data."""
    name = cursor.string("a tensor's name")
    dimensions = cursor.number("I", f"the dimensions of {name!r}")
    if dimensions > 8:
        raise _error(cursor.path, f"tensor {name!r} has {dimensions} dimensions; the limit is 8.", name)
    shape = tuple(reversed([cursor.number("Q", f"the shape of {name!r}") for _ in range(dimensions)]))
    kind = cursor.number("I", f"the type of {name!r}")
    if kind not in SIZES:
        what = OTHER_TYPES.get(kind, f"type {kind}")
        known = ", ".join(format.name for format in SIZES.values())
        raise UnsupportedModel(
            f"{cursor.path}: tensor {name!r} is quantised as {what}, which is not supported; supported are {known}.",
            param=name,
            type=what,
        )
    format = SIZES[kind]
    if not shape or shape[-1] % format.size:
        why = f"rows of shape {shape} are not a multiple of the {format.name} block size."
        raise _error(cursor.path, f"tensor {name!r}: {why}", name)
    if 0 in shape and math.prod(filter(None, shape)) >= 2**60:  # numpy multiplies the other dimensions
        why = f"shape {shape} has no elements, and dimensions too large for an array."
        raise _error(cursor.path, f"tensor {name!r}: {why}", name)
    nbytes = math.prod(shape) // format.size * format.nbytes
    return GgufTensor(name, shape, kind, cursor.number("Q", f"the offset of {name!r}"), nbytes)


def _placed(path: Path, listed: list[GgufTensor], start: int, size: int) -> dict[str, GgufTensor]:
    """The tensors by name, with offsets from the start of the file. Each lies in the file, apart from the others."""
    found: dict[str, GgufTensor] = {}
    for item in listed:
        if item.name in found:
            raise _error(path, f"tensor {item.name!r} is listed twice.", item.name)
        found[item.name] = replace(item, offset=start + item.offset)
    end, before = start, ""
    for item in sorted(found.values(), key=lambda item: (item.offset, item.nbytes)):
        if item.offset < end:
            raise _error(path, f"tensor {item.name!r}: its data overlap those of {before!r}.", item.name)
        end, before = item.offset + item.nbytes, item.name
        if end > size:
            raise _error(path, f"truncated: tensor {before!r} ends at byte {end}, the file at {size}.", before)
    return found
