"""Products with weights, and the deltas of adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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
    """B of one site: adds the product with A number ``shrink``, times Bᵀ, to output columns ``lo .. hi``."""

    shrink: int
    lo: int
    hi: int
    b: Tensor  # [O, r] float32
    scale: float


@dataclass(frozen=True)
class OpAdapter:
    """One adapter at one op: a shrink (x Aᵀ) per distinct A, then an expand (· Bᵀ) per slice."""

    shrinks: dict[int, Tensor] = field(default_factory=dict)  # by the address of A: A^T [I, r] float32, a view
    expands: list[Expand] = field(default_factory=list)


@dataclass(frozen=True)
class Segment:
    """Rows ``lo .. hi`` use an adapter (by op and expert, 0 for other ops), its deltas times ``weight``."""

    lo: int
    hi: int
    ops: Mapping[tuple[int, int], OpAdapter]
    weight: float


def base_product(x: Tensor, weight: Weight) -> Tensor:
    """``[rows, O] = x Wᵀ`` in the weight's dtype: one product over all rows, whatever adapters they use."""
    x = x.to(weight.parts[0].dtype)
    if len(weight.parts) == 1:
        return F.linear(x, weight.parts[0])
    return torch.cat([F.linear(x, part) for part in weight.parts], 1)


def expert_product(
    x: Tensor,
    routes: Tensor,
    weight: Weight,
    combine: str,
    outputs: int,
    finish: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """``[T, k·O]`` or, with ``combine``, the sum ``[T, O]``; see ``ExpertLinear``. Experts are added in their order.

    ``finish(expert, rows, x, product)`` applies adapters, which act on the rows of the step ``rows``, and the epilogue.
    """
    k = routes.shape[1] // 2
    numbers, weights = routes[:, :k].long(), routes[:, k:]
    own = x.shape[1] != weight.experts[0].parts[0].shape[1]  # each expert of a row has an x of its own
    x = x.view(len(x), k, -1) if own else x
    out = torch.zeros(len(x), outputs, device=x.device) if combine != "none" else x.new_empty(len(x), k, outputs)
    for expert in sorted(set(numbers.flatten().tolist())):
        rows, places = torch.where(numbers == expert)
        some = x[rows, places] if own else x[rows]
        made = finish(expert, rows, some, base_product(some, weight.experts[expert]))
        if combine == "none":
            out[rows, places] = made.to(out.dtype)
            continue
        out.index_add_(0, rows, made * weights[rows, places, None] if combine == "weighted" else made)
    return out.flatten(1)


def add_deltas_(y: Tensor, x: Tensor, op: tuple[int, int], segments: Sequence[Segment]) -> None:
    """``y[t] += weight · scale · (x[t] Aᵀ) Bᵀ`` for the rows of each segment whose adapter has ``op``, a number and an
    expert.

    ``y`` and ``x`` are float32. ``x`` of an embedding is its token ids, int64: a row of Aᵀ is what a one-hot row gives.
    Segments may overlap; they are added in order.
    """
    for segment in segments:
        found = segment.ops.get(op)
        if found is None:
            continue
        some, rows = x[segment.lo : segment.hi], y[segment.lo : segment.hi]
        shrunk = {key: a_t[some] if x.ndim == 1 else torch.mm(some, a_t) for key, a_t in found.shrinks.items()}
        for e in found.expands:
            alpha = e.scale * segment.weight
            if len(rows) == 1:  # a decoding sequence: the matrix-vector product takes 2/3 of addmm's time
                rows[0, e.lo : e.hi].addmv_(e.b, shrunk[e.shrink][0], alpha=alpha)
            else:
                rows[:, e.lo : e.hi].addmm_(shrunk[e.shrink], e.b.t(), alpha=alpha)


def lay_out(image: AdapterImage, layout: AdapterLayout, device: torch.device) -> dict[tuple[int, int], OpAdapter]:
    """An adapter's tensors on ``device`` by op index and expert: on the CPU views of its image, which is in float32.

    Raises:
        KernelError: See ``require_served``; or the image's table is inconsistent.
    """
    require_served(image, layout)
    ops: dict[tuple[int, int], OpAdapter] = {}
    for tensors in image.sites():
        place = check_place(layout, tensors.site)
        op = ops.setdefault((place.op, place.expert), OpAdapter())
        for part in tensors.parts:
            check_served(place, part)
            assert isinstance(part, LowRank)
            key = part.a.ctypes.data  # fused modules share one A
            if key not in op.shrinks:
                op.shrinks[key] = view(part.a).to(device).t()
            b = view(part.b).to(device)
            op.expands.append(Expand(key, place.first, place.first + place.outputs, b, part.scale))
    return ops
