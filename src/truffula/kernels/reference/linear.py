"""Products with weights, and what adapters add to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from truffula.errors import KernelError
from truffula.kernels.backend import AdapterImage, SiteTensors
from truffula.kernels.program import Linear, Logits, Program, Site, SiteSlice
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


def converted_bytes(image: AdapterImage) -> int:
    """Bytes of the float32 copies that ``lay_out`` makes of arrays not stored so; a shared A counts once."""
    arrays = {array.ctypes.data: array for site in image.sites for array in (site.a, site.b)}
    return sum(4 * array.size for array in arrays.values() if array.dtype != np.float32)


def lay_out(program: Program, image: AdapterImage) -> dict[int, OpAdapter]:
    """An adapter's tensors by op index, in float32: views where they are stored so, else converted once.

    Raises:
        KernelError: A site that does not exist or that no op serves, or a shape that does not fit it.
    """
    by_site: dict[int, SiteTensors] = {}
    for tensors in image.sites:
        _check(program, tensors)
        by_site[tensors.site] = tensors
    made: dict[int, OpAdapter] = {}
    for index, op in enumerate(program.ops):
        if isinstance(op, Linear):
            slices: tuple[SiteSlice, ...] = op.slices
        elif isinstance(op, Logits) and op.site is not None:
            slices = (SiteSlice(op.site, 0, op.out.width),)
        else:
            continue
        present = [(item, by_site.pop(item.site)) for item in slices if item.site in by_site]
        if present:
            made[index] = _op_adapter(present)
    for site in by_site:
        raise KernelError(f"no op serves site {program.sites[site].module!r}.", param=program.sites[site].module)
    return made


def _check(program: Program, tensors: SiteTensors) -> None:
    if not 0 <= tensors.site < len(program.sites):
        raise KernelError(f"the adapter names site {tensors.site}; the program has {len(program.sites)}.", param="site")
    site: Site = program.sites[tensors.site]
    a, b = tensors.a.shape, tensors.b.shape
    fits = len(a) == len(b) == 2 and a[0] == b[1] > 0 and (a[1], b[0]) == (site.in_features, site.out_features)
    if not fits:
        want = f"[r, {site.in_features}] and [{site.out_features}, r]"
        raise KernelError(f"site {site.module}: A {list(a)}, B {list(b)}; {want} needed.", param=site.module)


def _op_adapter(present: list[tuple[SiteSlice, SiteTensors]]) -> OpAdapter:
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
        b = view(tensors.b).float()
        expands.append(Expand(at[address], at[address] + rank, item.lo, item.hi, b, tensors.scale))
    return OpAdapter(stacked(shrinks).t(), tuple(expands))
