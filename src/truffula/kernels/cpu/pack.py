"""Packs adapters into panels, which the loading worker writes and the native kernels read without a copy.

Panels of 16 outputs are the same for every instruction set (kernels.h), so an image serves them all. A and B
of a linear layer are panels. B's first lane is the lane of the site's first column in the product's panels, and B of a
site over gates and ups is two runs of panels. A of a table is stored as rows ``[V, r]``, one of which a token gathers.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.kernels.adapters import (
    DTYPES,
    LOW_RANK,
    AdapterLayout,
    LowRank,
    PackedPart,
    PackedTensor,
    Place,
    SiteTensors,
    check_place,
)
from truffula.kernels.cpu.formats import BF16, F32, LANES, panel_bytes, panels_of
from truffula.kernels.cpu.weights import BFLOAT16, as_bits
from truffula.kernels.inputs import Array

Bytes = npt.NDArray[np.uint8]


def pack_panels(layout: AdapterLayout, sites: Sequence[SiteTensors]) -> list[PackedPart]:
    """``sites``, checked and ascending, in panels. bfloat16 stays bfloat16, other dtypes become float32: no rounding.

    All A of one op have the same format, because an image of mixed dtypes must be summed in one order.
    """
    found = [(s.site, check_place(layout, s.site), p) for s in sites for p in s.parts if isinstance(p, LowRank)]
    wide = {place.op for _, place, part in found if part.a.dtype != BFLOAT16}
    shared: dict[tuple[int, int, bool], PackedTensor] = {}
    made = []
    for site, place, part in found:
        fmt = F32 if place.op in wide else BF16
        key = (id(part.a), fmt, place.gathers)
        if key not in shared:
            shared[key] = _table_rows(part.a, fmt) if place.gathers else _panels(part.a, fmt, [(0, len(part.a), 0)])
        b_format = BF16 if part.b.dtype == BFLOAT16 else F32
        b = _panels(part.b, b_format, runs(place))
        made.append(PackedPart(site, LOW_RANK, part.scale, (shared[key], b)))
    return made


def runs(place: Place) -> list[tuple[int, int, int]]:
    """Runs of rows ``lo .. hi`` of B in consecutive panels, each with its first lane: two over gates and ups."""
    first, end, half = place.first, place.first + place.outputs, place.half
    cut = min(max(half, first), end) if half else end
    cuts = ((first, cut, 0), (cut, end, half))
    return [(lo - first, hi - first, (lo - base) % LANES) for lo, hi, base in cuts if lo < hi]


def _panels(array: Array, fmt: int, spans: Sequence[tuple[int, int, int]]) -> PackedTensor:
    width = panel_bytes(fmt, array.shape[1])
    sizes = [panels_of(lane + hi - lo) * width for lo, hi, lane in spans]
    native: Any = importlib.import_module("truffula.kernels.cpu._native")

    def write(to: Bytes) -> None:
        at = 0
        for (lo, hi, lane), size in zip(spans, sizes, strict=True):
            native.pack_panels(as_bits(array[lo:hi]), to[at : at + size], format=fmt, lane=lane)
            at += size

    return PackedTensor("BF16" if fmt == BF16 else "F32", array.shape, sum(sizes), write)


def _table_rows(array: Array, fmt: int) -> PackedTensor:
    dtype = "BF16" if fmt == BF16 else "F32"

    def write(to: Bytes) -> None:
        to.view(DTYPES[dtype]).reshape(array.shape[::-1])[...] = array.T

    return PackedTensor(dtype, array.shape, array.size * DTYPES[dtype].itemsize, write)
