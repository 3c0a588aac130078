"""Packs adapters into panels, which the loading worker writes and the native kernels read without a copy.

Panels of 16 outputs are the same for every instruction set (kernels.h), so an image serves them all. Matrices of a
linear layer are panels, in the forms of ``native/pack.h``: A and B take the bytes of their numbers, whatever the rank.
The first lane of B, and of a matrix that replaces the base's, is the lane of the site's first column in the product's
panels, and a site over gates and ups is two runs of panels. Vectors of output columns are float32 in panels of one
input. Rows of a table, and A of one ``[V, r]``, are stored as rows, one of which a token
gathers; at the head they are panels. Ids ascend.

At the matrix of latent attention both directions are needed: A is followed by its transpose, and B is each head's
transposed rows of keys, then each head's rows of values. Vectors there are those of keys, where they are used, and then
of each head's values in panels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np
from msgspec.structs import replace

from truffula.kernels.adapters import (
    AdapterLayout,
    Bias,
    ColumnScale,
    InputScale,
    LowRank,
    PackedPart,
    PackedTensor,
    Part,
    Place,
    Replace,
    SiteTensors,
    check_place,
    copied,
    dtype_name,
)
from truffula.kernels.backend import BFLOAT16
from truffula.kernels.cpu.library import library
from truffula.kernels.cpu.weights import as_bits
from truffula.kernels.inputs import Array, Uint8

_FORMATS = MappingProxyType({"F32": "float32", "BF16": "bfloat16", "F16": "float16"})
Form = Literal["whole", "rows", "columns"]
Piece = tuple[Array, int, Form]
"""A matrix in panels: with the lane of its first row, and its form."""


def pack_panels(layout: AdapterLayout, sites: Sequence[SiteTensors]) -> list[PackedPart]:
    """``sites``, checked and ascending, in panels. A, B and rows of the head keep their dtype; of other tensors only
    bfloat16 is kept, and float16 becomes float32: no rounding.

    All A of one op have the same format, because an image of mixed dtypes must be summed in one order.
    """
    library()  # here for a worker that packs nothing yet: the first load then finds it imported
    found = [(s.site, check_place(layout, s.site), p) for s in sites for p in s.parts]
    dtypes: dict[int, set[str]] = {}
    for _, place, part in found:
        if isinstance(part, LowRank):
            dtypes.setdefault(place.op, set()).add(dtype_name(part.a))
    shared: dict[tuple[int, str, bool, bool], PackedTensor] = {}
    made = []
    for site, place, part in found:
        if isinstance(part, LowRank):
            by_row, of_op = place.kind == "embed", dtypes[place.op]
            dtype = "F32" if len(of_op) > 1 or (by_row and of_op == {"F16"}) else next(iter(of_op))
            key = (id(part.a), dtype, by_row, place.heads is not None)
            if key not in shared:
                pieces: list[Piece] = [(part.a, 0, "rows")]
                if place.heads:
                    pieces.append((part.a.T, 0, "columns"))
                shared[key] = (
                    replace(copied(part.a.T, dtype), shape=part.a.shape)
                    if by_row
                    else _panels(part.a.shape, dtype, pieces)
                )
            made.append(PackedPart(site, part.kind, part.scale, (shared[key], _of_outputs(part.b, place, "columns"))))
        else:
            made.append(PackedPart(site, part.kind, 1.0, tuple(_tensors(part, place))))
    return made


def _tensors(part: Part, place: Place) -> Iterator[PackedTensor]:
    match part:
        case ColumnScale(values) | Bias(values) if place.kind != "norm":
            yield _vector(values, place, keys=isinstance(part, ColumnScale))
        case InputScale(values) | Bias(values):
            yield copied(values, "F32")
        case Replace(weight) if place.kind == "norm":
            yield copied(weight, "F32")
        case Replace(weight):
            yield copied(weight, _dtype(weight)) if place.kind == "embed" else _of_outputs(weight, place, "whole")
        case _:
            assert not isinstance(part, LowRank | ColumnScale)
            order = np.argsort(part.ids)
            rows = part.values[order]
            yield copied(part.ids[order], "I32")
            by_row = place.kind == "embed"
            yield copied(rows, _dtype(rows)) if by_row else _panels(rows.shape, dtype_name(rows), [(rows, 0, "rows")])


def _dtype(array: Array) -> str:
    """Of a tensor that products read as they read weights, or whose rows are gathered."""
    return "BF16" if array.dtype == BFLOAT16 else "F32"


def _of_outputs(matrix: Array, place: Place, form: Form) -> PackedTensor:
    """A matrix whose rows are the site's columns."""
    if place.heads:
        pieces = _of_heads(matrix, *place.heads)
    else:
        pieces = [(matrix[lo:hi], lane, form) for lo, hi, lane in runs(place)]
    return _panels(matrix.shape, _dtype(matrix) if form == "whole" else dtype_name(matrix), pieces)


def _vector(values: Array, place: Place, *, keys: bool) -> PackedTensor:
    """A number for each of the site's columns. ``keys``: at latent attention, also of those that are keys."""
    column = values.astype(np.float32)[:, None]
    if place.heads is None:
        return replace(_of_outputs(column, place, "columns"), shape=values.shape)
    heads, nope, _ = place.heads
    by_head = column.reshape(heads, -1, 1)
    of_values = _panels(values.shape, "F32", [(head, 0, "columns") for head in by_head[:, nope:]])
    if not keys:
        return of_values
    lanes = library().LANES
    first = -(-heads * nope // lanes) * lanes * 4

    def write(to: Uint8) -> None:
        to[:first].view(np.float32)[: heads * nope] = by_head[:, :nope].ravel()
        of_values.write(to[first:])

    return PackedTensor("F32", values.shape, first + of_values.nbytes, write)


def runs(place: Place) -> list[tuple[int, int, int]]:
    """Runs of rows ``lo .. hi`` of B in consecutive panels, each with its first lane: two over gates and ups."""
    first, end, half = place.first, place.first + place.outputs, place.half
    cut = min(max(half, first), end) if half else end
    cuts = ((first, cut, 0), (cut, end, half))
    return [(lo - first, hi - first, (lo - base) % library().LANES) for lo, hi, base in cuts if lo < hi]


def _of_heads(b: Array, heads: int, keys: int, values: int) -> list[Piece]:
    """B of latent attention: ``[r, keys]`` of each head, then ``[values, r]``."""
    per_head = b.reshape(heads, keys + values, b.shape[1])
    of_keys: list[Piece] = [(piece, 0, "rows") for piece in per_head[:, :keys].swapaxes(1, 2)]
    return of_keys + [(piece, 0, "columns") for piece in per_head[:, keys:]]


def _panels(shape: tuple[int, ...], dtype: str, pieces: Sequence[Piece]) -> PackedTensor:
    """A tensor of ``shape`` as ``pieces``."""
    native, fmt = library(), _FORMATS[dtype]
    sizes = [native.adapter_matrix_bytes(lane + len(piece), piece.shape[1], fmt, form) for piece, lane, form in pieces]

    def write(to: Uint8) -> None:
        at = 0
        for (piece, lane, form), size in zip(pieces, sizes, strict=True):
            native.pack_panels(as_bits(piece), to[at : at + size], fmt, lane, form)
            at += size

    return PackedTensor(dtype, shape, sum(sizes), write)
