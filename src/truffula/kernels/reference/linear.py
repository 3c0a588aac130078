"""Products with weights, and what adapters make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from truffula.kernels.adapters import (
    AdapterImage,
    AdapterLayout,
    Bias,
    ColumnScale,
    InputScale,
    LowRank,
    Part,
    Replace,
    Rows,
    SiteTensors,
    check_place,
    check_served,
    require_served,
    tensors_of,
)
from truffula.kernels.inputs import Array
from truffula.kernels.reference.weights import Weight, view

_FIELDS: Mapping[type[Part], str] = MappingProxyType(
    {ColumnScale: "column_scale", InputScale: "input_scale", Bias: "bias", Replace: "weight"}
)
"""The fields of a ``SiteAdapter`` that hold the one tensor of a part."""


@dataclass(frozen=True)
class Expand:
    """B of one LowRank ``[O, r]`` float32: the product with A number ``shrink`` is multiplied by Bᵀ and ``scale``."""

    shrink: int
    b: Tensor
    scale: float


@dataclass(frozen=True)
class SiteAdapter:
    """One adapter at one site, output columns ``lo .. hi``: its parts, in float32. ``replaced`` are Rows."""

    lo: int
    hi: int
    expands: tuple[Expand, ...] = ()
    column_scale: Tensor | None = None
    input_scale: Tensor | None = None
    bias: Tensor | None = None
    weight: Tensor | None = None
    ids: Tensor | None = None  # int64, ascending
    host_ids: Array | None = None  # the same, so that a check of token ids does not wait for the device
    rows: Tensor | None = None

    @property
    def makes_product(self) -> bool:
        """Whether its product is not the base's with something added."""
        return any(t is not None for t in (self.column_scale, self.input_scale, self.weight, self.ids))

    def product(self, x: Tensor, base: Tensor, weight: Weight) -> Tensor:
        """``[rows, O]``: x' W'ᵀ of the site contract (``kernels/adapters.py``), where ``base`` is x Wᵀ. ``weight`` is
        the base's, of all columns of the op; ``x`` of an embedding is its token ids."""
        if x.ndim == 1:
            return self._gathered(x, base)
        if self.input_scale is not None or self.weight is not None:
            x = x if self.input_scale is None else x * self.input_scale
            return F.linear(x, (weight.rows(self.lo, self.hi) if self.weight is None else self.weight).float())
        if self.ids is None or self.rows is None:
            return base
        made = base.clone()
        made[:, self.ids] = F.linear(x, self.rows)
        return made

    def _gathered(self, ids: Tensor, base: Tensor) -> Tensor:
        if self.weight is not None:
            return self.weight[ids.clamp(max=len(self.weight) - 1)]
        if self.ids is None or self.rows is None:
            return base
        places = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        return torch.where((self.ids[places] == ids)[:, None], self.rows[places], base)


@dataclass(frozen=True)
class OpAdapter:
    """One adapter at one op: a shrink (x Aᵀ) per distinct A, and its parts per site."""

    shrinks: dict[int, Tensor] = field(default_factory=dict)  # by the address of A: A^T [I, r] float32, a view
    sites: list[SiteAdapter] = field(default_factory=list)

    def shrunk(self, x: Tensor) -> dict[int, Tensor]:
        """x Aᵀ for each distinct A. An embedding's own tokens have no row of A."""
        if x.ndim > 1:
            return {key: torch.mm(x, a_t) for key, a_t in self.shrinks.items()}
        return {
            key: a_t[x.clamp(max=len(a_t) - 1)] * (x < len(a_t))[:, None].float() for key, a_t in self.shrinks.items()
        }


@dataclass(frozen=True)
class Segment:
    """Rows ``lo .. hi`` use an adapter (by op and expert, 0 for other ops), its contributions times ``weight``."""

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


def apply_adapters_(y: Tensor, x: Tensor, op: tuple[int, int], segments: Sequence[Segment], weight: Weight) -> None:
    """Add to the rows of each segment what its adapter contributes at ``op``, a number and an expert: see the site
    contract in ``kernels/adapters.py``.

    ``y``, the product of ``weight`` ``[rows, O]``, and ``x`` are float32. ``x`` of an embedding is its token ids,
    int64: a row of Aᵀ is what a one-hot row gives. Segments may overlap; they are added in order.
    """
    found = [(segment, segment.ops[op]) for segment in segments if op in segment.ops]
    base = y.clone() if any(site.makes_product for _, adapter in found for site in adapter.sites) else y
    for segment, adapter in found:
        some, rows = x[segment.lo : segment.hi], slice(segment.lo, segment.hi)
        shrunk = adapter.shrunk(some)
        for site in adapter.sites:
            columns = y[rows, site.lo : site.hi]
            if site.makes_product:
                product = base[rows, site.lo : site.hi]
                columns.sub_(product, alpha=segment.weight)
                made = site.product(some, product, weight).clone()
                _add_low_rank_(made, site.expands, shrunk, 1.0)
                if site.column_scale is not None:
                    made *= site.column_scale
                columns.add_(made, alpha=segment.weight)
            else:
                _add_low_rank_(columns, site.expands, shrunk, segment.weight)
            if site.bias is not None:
                columns.add_(site.bias, alpha=segment.weight)


def _add_low_rank_(y: Tensor, expands: Sequence[Expand], shrunk: Mapping[int, Tensor], weight: float) -> None:
    for e in expands:
        alpha = e.scale * weight
        if len(y) == 1:  # a decoding sequence: the matrix-vector product takes 2/3 of addmm's time
            y[0].addmv_(e.b, shrunk[e.shrink][0], alpha=alpha)
        else:
            y.addmm_(shrunk[e.shrink], e.b.t(), alpha=alpha)


def norm_vectors(
    weight: Tensor, bias: Tensor | None, op: int, segments: Sequence[Segment]
) -> tuple[Tensor, Tensor | None]:
    """The vectors of a norm for rows that are in all of ``segments``, whose adapters have its site."""
    left, replaced = 1.0, torch.zeros_like(weight)
    for segment in segments:
        (site,) = segment.ops[op, 0].sites
        if site.weight is not None:
            left, replaced = left - segment.weight, replaced + segment.weight * site.weight
        if site.bias is not None:
            bias = segment.weight * site.bias + (0.0 if bias is None else bias)
    return left * weight + replaced, bias


def lay_out(image: AdapterImage, layout: AdapterLayout, device: torch.device) -> dict[tuple[int, int], OpAdapter]:
    """An adapter's tensors on ``device`` by op index and expert: on the CPU views of its image, which is in float32.

    Raises:
        KernelError: See ``require_served``; or the image's table is inconsistent.
    """
    require_served(image, layout)
    return lay_out_sites(image.sites(), layout, lambda array: view(array).to(device))


def lay_out_sites(
    sites: Iterable[SiteTensors], layout: AdapterLayout, place_on_device: Callable[[Array], Tensor]
) -> dict[tuple[int, int], OpAdapter]:
    """The tensors of ``sites`` by op index and expert, as ``place_on_device`` makes them, in float32."""
    ops: dict[tuple[int, int], OpAdapter] = {}
    there: Callable[[Array], Tensor] = lambda array: place_on_device(array).float()
    for tensors in sites:
        place = check_place(layout, tensors.site)
        check_served(place, tensors.parts)
        op = ops.setdefault((place.op, place.expert), OpAdapter())
        expands: list[Expand] = []
        others: dict[str, Tensor] = {}
        host_ids: Array | None = None
        for part in tensors.parts:
            if isinstance(part, LowRank):
                key = part.a.ctypes.data  # fused modules share one A
                if key not in op.shrinks:
                    op.shrinks[key] = there(part.a).t()
                expands.append(Expand(key, there(part.b), part.scale))
            elif isinstance(part, Rows):
                order = np.argsort(part.ids)
                host_ids = part.ids[order].astype(np.int64)
                values = there(part.values)
                others["ids"] = torch.from_numpy(host_ids).to(values.device)
                others["rows"] = values[torch.from_numpy(order).to(values.device)]
            else:
                others[_FIELDS[type(part)]] = there(tensors_of(part)[0])
        last = place.first + place.outputs
        op.sites.append(SiteAdapter(place.first, last, tuple(expands), host_ids=host_ids, **others))
    return ops
