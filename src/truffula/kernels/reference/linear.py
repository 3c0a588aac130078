"""Products with weights, and the deltas of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from truffula.kernels.adapters import (
    AdapterImage,
    AdapterLayout,
    LowRank,
    check_place,
    check_served,
    require_served,
)
from truffula.kernels.reference.weights import Weight, view


@dataclass(frozen=True)
class Expand:
    """B of one site: adds shrink number ``shrink`` times Bᵀ to output columns ``lo .. hi``."""

    shrink: int
    lo: int
    hi: int
    b: Tensor  # [O, r] float32
    scale: float


@dataclass(frozen=True)
class OpAdapter:
    """One adapter at one op: a shrink (x Aᵀ) per distinct A, then an expand (· Bᵀ) per slice."""

    shrinks: tuple[Tensor, ...]  # A^T [I, r] float32, transposed views
    expands: tuple[Expand, ...]


@dataclass(frozen=True)
class Segment:
    """Rows ``lo .. hi`` use an adapter (its ops by index), its deltas times ``weight``."""

    lo: int
    hi: int
    ops: Mapping[int, OpAdapter]
    weight: float


def base_product(x: Tensor, weight: Weight) -> Tensor:
    """``[rows, O] = x Wᵀ`` in the weight's dtype: one product over all rows, whatever adapters they use."""
    x = x.to(weight.parts[0].dtype)
    if len(weight.parts) == 1:
        return F.linear(x, weight.parts[0])
    return torch.cat([F.linear(x, part) for part in weight.parts], 1)


def add_deltas_(y: Tensor, x: Tensor, op: int, segments: Sequence[Segment]) -> None:
    """``y[t] += weight · scale · (x[t] Aᵀ) Bᵀ`` for the rows of each segment whose adapter has op number ``op``.

    ``y`` and ``x`` are float32. ``x`` of an embedding is its token ids, int64: a row of Aᵀ is what a one-hot row gives.
    Segments may overlap; they are added in order.
    """
    for segment in segments:
        found = segment.ops.get(op)
        if found is None:
            continue
        some, rows = x[segment.lo : segment.hi], y[segment.lo : segment.hi]
        shrunk = [a_t[some] if x.ndim == 1 else torch.mm(some, a_t) for a_t in found.shrinks]
        for e in found.expands:
            alpha = e.scale * segment.weight
            if len(rows) == 1:  # a decoding sequence: the matrix-vector product takes 2/3 of addmm's time
                rows[0, e.lo : e.hi].addmv_(e.b, shrunk[e.shrink][0], alpha=alpha)
            else:
                rows[:, e.lo : e.hi].addmm_(shrunk[e.shrink], e.b.t(), alpha=alpha)


def copied_bytes(image: AdapterImage, device: torch.device) -> int:
    """Bytes of the copy that ``lay_out`` makes on ``device``; on the CPU it makes none."""
    return 0 if device.type == "cpu" else image.data.size


def lay_out(image: AdapterImage, layout: AdapterLayout, device: torch.device) -> dict[int, OpAdapter]:
    """An adapter's tensors on ``device`` by op index: on the CPU views of its image, which is in float32.

    Raises:
        KernelError: See ``require_served``; or the image's table is inconsistent.
    """
    require_served(image, layout)
    shrinks: dict[int, list[Tensor]] = {}
    expands: dict[int, list[Expand]] = {}
    at: dict[tuple[int, int], int] = {}  # op and address of an A -> its place: fused modules share one
    for tensors in image.sites():
        place = check_place(layout, tensors.site)
        for part in tensors.parts:
            check_served(place, part)
            assert isinstance(part, LowRank)
            key = (place.op, part.a.ctypes.data)
            of_op = shrinks.setdefault(place.op, [])
            if key not in at:
                at[key] = len(of_op)
                of_op.append(view(part.a).to(device).t())
            hi = place.first + place.outputs
            expands.setdefault(place.op, []).append(
                Expand(at[key], place.first, hi, view(part.b).to(device), part.scale)
            )
    return {op: OpAdapter(tuple(shrinks[op]), tuple(expands[op])) for op in shrinks}
