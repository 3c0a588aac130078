"""Multi-head latent attention in the absorbed form: queries are moved to the space of the cached latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truffula.kernels.program import Attention, Mla
from truffula.kernels.reference import attention
from truffula.kernels.reference.linear import OpAdapter, Segment
from truffula.kernels.reference.weights import Weight


def compute(
    op: Mla, q: Tensor, plane: Tensor, kv_b: Weight, batches: Sequence[attention.Batch],
    number: int, segments: Sequence[Segment],
) -> Tensor:  # fmt: skip
    """float32 ``[T, heads·dim_v]``: ``q [T, heads·(nope + rope)]`` over the plane of latents ``[P, S, rank + rope]``.

    ``number`` is the op's number, under which ``segments`` have the adapters of ``kv_b``.
    """
    q = q.float().view(-1, op.heads, op.nope + op.rope)
    keys, values = _by_head(op, kv_b.whole.float())
    latent_q = torch.cat([torch.einsum("thn,hnc->thc", q[..., : op.nope], keys), q[..., op.nope :]], -1)
    acting = [(s, s.ops[number, 0]) for s in segments if (number, 0) in s.ops]
    for segment, adapter in acting:
        rows = slice(segment.lo, segment.hi)
        queries = q[rows, :, : op.nope]
        latent_q[rows, :, : op.rank] += segment.weight * _of_keys(op, adapter, queries, keys)
    # One KV head, shared by all heads: its key is the cached row, its value the row's latent.
    shared = Attention(
        name=op.name, q=op.q, k=op.latent, v=op.latent, out=op.out, group=op.group, planes=(op.plane, op.plane),
        heads=op.heads, kv_heads=1, dim_k=op.rank + op.rope, dim_v=op.rank, scale=op.scale,
    )  # fmt: skip
    mixed = attention.compute(shared, latent_q.flatten(1), plane, plane[..., : op.rank], batches, None)
    mixed = mixed.view(-1, op.heads, op.rank)
    out = torch.einsum("thc,hvc->thv", mixed, values)
    for segment, adapter in acting:
        rows = slice(segment.lo, segment.hi)
        out[rows] += segment.weight * _of_values(op, adapter, mixed[rows], values)
    return out.flatten(1)


def _by_head(op: Mla, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of keys ``[heads, nope, ·]`` and of values ``[heads, dim_v, ·]`` of a matrix with kv_b's rows."""
    rows = matrix.view(op.heads, op.nope + op.dim_v, -1)
    return rows[:, : op.nope], rows[:, op.nope :]


def _of_keys(op: Mla, adapter: OpAdapter, queries: Tensor, keys: Tensor) -> Tensor:
    """What an adapter adds to ``queries`` W_k, ``[T, heads, rank]``: with c on the rows of W_k, it scales queries."""
    (site,) = adapter.sites
    factor = site.column_scale
    added, scaled = queries.new_zeros(*queries.shape[:2], op.rank), queries
    if factor is not None:
        scaled = queries * _by_head(op, factor)[0][..., 0]
        added = torch.einsum("thn,hnc->thc", scaled, keys) - torch.einsum("thn,hnc->thc", queries, keys)
    for e in site.expands:
        b = _by_head(op, e.b)[0]
        added = added + e.scale * torch.einsum("thn,hnr->thr", scaled, b) @ adapter.shrinks[e.shrink].t()
    return added


def _of_values(op: Mla, adapter: OpAdapter, mixed: Tensor, values: Tensor) -> Tensor:
    """What an adapter adds to ``mixed`` W_vᵀ, ``[T, heads, dim_v]``. Softmax weights sum to 1, and so do biases."""
    (site,) = adapter.sites
    base = torch.einsum("thc,hvc->thv", mixed, values)
    made = base
    for e in site.expands:
        shrunk = mixed @ adapter.shrinks[e.shrink]
        made = made + e.scale * torch.einsum("thr,hvr->thv", shrunk, _by_head(op, e.b)[1])
    if site.column_scale is not None:
        made = made * _by_head(op, site.column_scale)[1][..., 0]
    return made - base if site.bias is None else made - base + _by_head(op, site.bias)[1][..., 0]
