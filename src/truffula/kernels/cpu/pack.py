"""Packs adapters into panels, which the loading worker writes and the native kernels read without a copy.

Panels of 16 outputs are the same for every instruction set (kernels.h), so an image serves them all. A and B
of a linear layer are panels. B's first lane is the lane of the site's first column in the product's panels, and B of a
site over gates and ups is two runs of panels. A of a table is stored as rows ``[V, r]``, one of which a token gathers.
At the matrix of latent attention both directions are needed: A is followed by its transpose, and B is each head's
transposed rows of keys, then each head's rows of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from truffula.errors import KernelError
from truffula.kernels.adapters import (
    AdapterLayout,
    LowRank,
    PackedPart,
    PackedTensor,
    Place,
    SiteTensors,
    check_place,
    copied,
)
from truffula.kernels.backend import BFLOAT16
from truffula.kernels.cpu.library import library
from truffula.kernels.cpu.weights import as_bits
from truffula.kernels.inputs import Array, Uint8

_FORMATS = MappingProxyType({"F32": "float32", "BF16": "bfloat16"})


def pack_panels(layout: AdapterLayout, sites: Sequence[SiteTensors]) -> list[PackedPart]:
    """``sites``, checked and ascending, in panels. bfloat16 stays bfloat16, other dtypes become float32: no rounding.

    All A of one op have the same format, because an image of mixed dtypes must be summed in one order.
    """
    for tensors in sites:
        for part in tensors.parts:
            if not isinstance(part, LowRank):
                raise KernelError(
                    f"no kernel of the native backend serves the adapter part {part.kind!r}.", param=part.kind
                )
    found = [(s.site, check_place(layout, s.site), p) for s in sites for p in s.parts if isinstance(p, LowRank)]
    wide = {place.op for _, place, part in found if part.a.dtype != BFLOAT16}
    shared: dict[tuple[int, str, bool, bool], PackedTensor] = {}
    made = []
    for site, place, part in found:
        dtype = "F32" if place.op in wide else "BF16"
        gathers = place.kind == "embed"
        key = (id(part.a), dtype, gathers, place.heads is not None)
        if key not in shared:
            rows = replace(copied(part.a.T, dtype), shape=part.a.shape)
            pieces = [(part.a, 0), *([(part.a.T, 0)] if place.heads else [])]
            shared[key] = rows if gathers else _panels(part.a.shape, dtype, pieces)
        pieces = _of_heads(part.b, *place.heads) if place.heads else [(part.b[lo:hi], n) for lo, hi, n in runs(place)]
        b = _panels(part.b.shape, "BF16" if part.b.dtype == BFLOAT16 else "F32", pieces)
        made.append(PackedPart(site, LowRank.kind, part.scale, (shared[key], b)))
    return made


def runs(place: Place) -> list[tuple[int, int, int]]:
    """Runs of rows ``lo .. hi`` of B in consecutive panels, each with its first lane: two over gates and ups."""
    first, end, half = place.first, place.first + place.outputs, place.half
    cut = min(max(half, first), end) if half else end
    cuts = ((first, cut, 0), (cut, end, half))
    return [(lo - first, hi - first, (lo - base) % library().LANES) for lo, hi, base in cuts if lo < hi]


def _of_heads(b: Array, heads: int, keys: int, values: int) -> list[tuple[Array, int]]:
    """B of latent attention as pieces, whose first lane is 0: ``[r, keys]`` of each head, then ``[values, r]``."""
    per_head = b.reshape(heads, keys + values, b.shape[1])
    return [(piece, 0) for piece in (*per_head[:, :keys].swapaxes(1, 2), *per_head[:, keys:])]


def _panels(shape: tuple[int, ...], dtype: str, pieces: Sequence[tuple[Array, int]]) -> PackedTensor:
    """A tensor of ``shape`` as ``pieces``, each with the lane of its first row."""
    native, fmt = library(), _FORMATS[dtype]
    sizes = [native.matrix_bytes(lane + piece.shape[0], piece.shape[1], fmt) for piece, lane in pieces]

    def write(to: Uint8) -> None:
        at = 0
        for (piece, lane), size in zip(pieces, sizes, strict=True):
            native.pack_panels(as_bits(piece), to[at : at + size], format=fmt, lane=lane)
            at += size

    return PackedTensor(dtype, shape, sum(sizes), write)
