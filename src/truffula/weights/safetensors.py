"""Reads and writes ``.safetensors`` files. The header is checked completely before data are used; data are mapped.

Layout: ``u64`` header length, little endian; that many bytes of JSON ``{name: {dtype, shape, data_offsets}}``; then
the data, which the tensors cover without gap or overlap. Source: the format's description in the safetensors project.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np

from truffula.errors import CheckpointError
from truffula.weights.checkpoint import Array, TensorInfo
from truffula.weights.mapped import MappedFile
from truffula.weights.text_files import is_lfs_pointer, lfs_pointer_error, parse_json

MAX_HEADER_BYTES = 100_000_000
DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
}
_Count = Annotated[int, msgspec.Meta(ge=0)]


class SafetensorsFile:
    """One opened file: ``tensors`` by name in the order of their data, ``metadata`` the strings of ``__metadata__``,
    ``header`` as stored, ``file`` the mapped bytes.

    Opening reads the header only. An invalid header raises ``CheckpointError`` naming the file and, if any, the tensor.
    ``descriptor`` as of ``MappedFile``.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self.file = MappedFile(path, descriptor)
        try:
            self.header = _read_header(path, self.file)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", param=str(path)) from error
        header = _parse_header(path, self.header)
        self.metadata = _check_metadata(path, header.pop("__metadata__", {}))
        self.tensors: dict[str, TensorInfo] = _check_tensors(path, header, 8 + len(self.header), self.file.size)

    def read(self, name: str) -> Array:
        """The tensor in its stored dtype: a view of the mapped file, or a copy when it is not aligned there."""
        info = self.tensors[name]
        return self.file.array(info.offset, info.nbytes, info.shape, DTYPES[info.dtype])

    def raw(self, name: str) -> Array:
        """``[nbytes]`` uint8 view of the tensor's bytes in the file."""
        info = self.tensors[name]
        return self.file.view(info.offset, info.nbytes)

    def runs(self, infos: Iterable[TensorInfo]) -> Iterator[Array]:
        """The values of ``infos``, tensors of this file: adjacent ones of one dtype as one array ``[values]``."""
        ordered = sorted(infos, key=lambda info: info.offset)
        start = 0
        for at, info in enumerate(ordered, 1):
            end = info.offset + info.nbytes
            if at == len(ordered) or (ordered[at].offset, ordered[at].dtype) != (end, info.dtype):
                offset = ordered[start].offset
                yield self.file.view(offset, end - offset).view(DTYPES[info.dtype])
                start = at

    def close(self) -> None:
        self.file.close()


def as_array(info: TensorInfo, raw: Array) -> Array:
    """The tensor whose bytes are ``raw``, in its stored dtype: a view, or a copy when it is not aligned."""
    view = raw.view(DTYPES[info.dtype]).reshape(info.shape)
    return view if view.flags.aligned else view.copy()


def write_tensors(
    path: Path,
    declared: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterable[Array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the file ``path``: ``declared`` has the dtype and shape of each tensor, ``arrays`` their values in the same
    order, of which one is held at a time. The data begin at a multiple of eight bytes, as in the safetensors package.

    Raises ``KeyError`` for a dtype that the format lacks.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in declared.items():
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for (dtype, shape), array in zip(declared.values(), arrays, strict=True):
            if (array.dtype, array.shape) != (DTYPES[dtype], shape):
                raise ValueError(f"an array of {array.dtype} {array.shape} was declared as {dtype} {shape}")
            file.write(np.ascontiguousarray(array).tobytes())


def _error(path: Path, why: str, tensor: str | None = None) -> CheckpointError:
    where = f"{path}: tensor {tensor!r}: " if tensor is not None else f"{path}: "
    return CheckpointError(where + why, param=tensor if tensor is not None else str(path), file=str(path))


def _read_header(path: Path, file: MappedFile) -> bytes:
    """The header as stored."""
    head, size = file.head(9), file.size
    if size == 0:
        raise _error(path, "the file is empty.")
    if is_lfs_pointer(head):
        raise lfs_pointer_error(path)
    if len(head) < 8:
        raise _error(path, f"truncated: {size} bytes, too short for a header length.")
    if head[8:] not in (b"", b"{"):
        raise _error(path, "its header does not begin with '{'; not a safetensors file.")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _error(
            path, f"its header claims {length} bytes, above the limit of {MAX_HEADER_BYTES}; not a safetensors file."
        )
    if 8 + length > size:
        raise _error(path, f"truncated: the header claims {length} bytes, but only {size - 8} follow.")
    return file.head(8 + length)[8:]


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise _error(path, f"its header is not valid JSON: {error}.") from error
    return header


def _check_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _error(path, "__metadata__ must map strings to strings.")
    return metadata


def _check_tensors(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, TensorInfo]:
    found = [_check_tensor(path, name, entry, start, size) for name, entry in header.items()]
    found.sort(key=lambda info: (info.offset, info.nbytes))
    end, before = start, ""
    for info in found:
        if info.offset < end:
            raise _error(path, f"its data overlap those of {before!r}.", info.name)
        if info.offset > end:
            raise _error(path, f"{info.offset - end} bytes before its data belong to no tensor.", info.name)
        end, before = info.offset + info.nbytes, info.name
    if end != size:
        raise _error(path, f"{size - end} bytes at its end belong to no tensor.")
    return {info.name: info for info in found}


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor in the header, as the format describes it."""

    dtype: str
    shape: list[_Count]
    data_offsets: tuple[_Count, _Count]


def _check_tensor(path: Path, name: str, raw: Any, start: int, size: int) -> TensorInfo:
    try:
        entry = msgspec.convert(raw, _Entry)
    except msgspec.ValidationError as error:
        raise _error(path, f"its entry must hold dtype, shape and data_offsets: {error}.", name) from error
    dtype, shape, (first, last) = entry.dtype, entry.shape, entry.data_offsets
    if dtype not in DTYPES:
        raise _error(path, f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}.", name)
    if start + last > size:
        raise _error(path, f"truncated: its data end at byte {start + last}, the file at {size}.", name)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != nbytes:
        raise _error(
            path, f"{dtype} of shape {shape} takes {nbytes} bytes, its data_offsets hold {last - first}.", name
        )
    if len(shape) > 32:
        raise _error(path, f"{len(shape)} dimensions; the limit is 32.", name)
    if 0 in shape and math.prod(filter(None, shape)) >= 2**60:  # numpy multiplies the other dimensions
        raise _error(path, f"shape {shape} has no elements, and dimensions too large for an array.", name)
    return TensorInfo(name, tuple(shape), dtype, path, start + first, nbytes)
