"""Products with weights, and what adapters add to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from truffula.kernels.adapters import AtSlice, by_op
from truffula.kernels.backend import AdapterImage
from truffula.kernels.program import Program
from truffula.kernels.reference.weights import Weight, stacked, view


@dataclass(frozen=True)
class Expand:
    """One site's half of an adapter: columns ``h_lo .. h_hi`` of the shrunk rows go to output columns ``lo .. hi``."""

    h_lo: int
    h_hi: int
    lo: int
    hi: int
    b: Tensor  # [O, r] float32
    scale: float


@dataclass(frozen=True)
class OpAdapter:
    """One adapter at one op: a single shrink for all its slices, then one expand per slice."""

    a_t: Tensor  # [I, Σr] float32, a transposed view
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

    ``y`` and ``x`` are float32. Segments may overlap; they are added in order.
    """
    for segment in segments:
        found = segment.ops.get(op)
        if found is None:
            continue
        shrunk = torch.mm(x[segment.lo : segment.hi], found.a_t)
        if segment.hi - segment.lo == 1:  # a decoding sequence: the matrix-vector product takes 2/3 of addmm's time
            row, h = y[segment.lo], shrunk[0]
            for e in found.expands:
                row[e.lo : e.hi].addmv_(e.b, h[e.h_lo : e.h_hi], alpha=e.scale * segment.weight)
            continue
        rows = y[segment.lo : segment.hi]
        for e in found.expands:
            rows[:, e.lo : e.hi].addmm_(shrunk[:, e.h_lo : e.h_hi], e.b.t(), alpha=e.scale * segment.weight)


def converted_bytes(image: AdapterImage, device: torch.device) -> int:
    """Bytes of the float32 copies that ``lay_out`` makes on ``device``; a shared A counts once."""
    arrays = {array.ctypes.data: array for site in image.sites for array in (site.a, site.b)}
    return sum(4 * array.size for array in arrays.values() if device.type != "cpu" or array.dtype != np.float32)


def lay_out(program: Program, image: AdapterImage, device: torch.device) -> dict[int, OpAdapter]:
    """An adapter's tensors on ``device`` by op index, in float32: on the CPU views where they are stored so.

    Raises:
        KernelError: see ``by_op``.
    """
    return {index: _op_adapter(present, device) for index, present in by_op(program, image).items()}


def _op_adapter(present: Sequence[AtSlice], device: torch.device) -> OpAdapter:
    expands, shrinks = [], []
    at: dict[int, int] = {}  # address of an A -> its first column: fused modules share one A
    columns = 0
    for item, tensors in present:
        rank = tensors.a.shape[0]
        address = tensors.a.ctypes.data
        if address not in at:
            at[address] = columns
            shrinks.append(tensors.a)
            columns += rank
        b = view(tensors.b).to(device).float()
        expands.append(Expand(at[address], at[address] + rank, item.lo, item.hi, b, tensors.scale))
    return OpAdapter(stacked(shrinks).to(device).t(), tuple(expands))
