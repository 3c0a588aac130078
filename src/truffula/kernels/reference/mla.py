"""Multi-head latent attention in the absorbed form: queries are moved to the space of the cached latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truffula.kernels.program import Attention, Mla
from truffula.kernels.reference import attention
from truffula.kernels.reference.linear import Segment
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
    deltas = [delta for segment in segments for delta in _deltas(op, segment, number)]
    for rows, scale, a, b_keys, _ in deltas:
        latent_q[rows, :, : op.rank] += scale * torch.einsum("thn,hnr->thr", q[rows, :, : op.nope], b_keys) @ a
    # One KV head, shared by all heads: its key is the cached row, its value the row's latent.
    shared = Attention(
        name=op.name, q=op.q, k=op.latent, v=op.latent, out=op.out, group=op.group, planes=(op.plane, op.plane),
        heads=op.heads, kv_heads=1, dim_k=op.rank + op.rope, dim_v=op.rank, scale=op.scale,
    )  # fmt: skip
    mixed = attention.compute(shared, latent_q.flatten(1), plane, plane[..., : op.rank], batches, None)
    mixed = mixed.view(-1, op.heads, op.rank)
    out = torch.einsum("thc,hvc->thv", mixed, values)
    for rows, scale, a, _, b_values in deltas:
        out[rows] += scale * torch.einsum("thr,hvr->thv", mixed[rows] @ a.t(), b_values)
    return out.flatten(1)


def _by_head(op: Mla, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of keys ``[heads, nope, ·]`` and of values ``[heads, dim_v, ·]`` of a matrix with kv_b's rows."""
    rows = matrix.view(op.heads, op.nope + op.dim_v, -1)
    return rows[:, : op.nope], rows[:, op.nope :]


def _deltas(op: Mla, segment: Segment, number: int) -> list[tuple[slice, float, Tensor, Tensor, Tensor]]:
    """What a segment's adapter adds: its rows, the scale, A ``[r, rank]``, and B by head, of keys and of values."""
    found, rows = segment.ops.get((number, 0)), slice(segment.lo, segment.hi)
    if found is None:
        return []
    return [(rows, e.scale * segment.weight, found.shrinks[e.shrink].t(), *_by_head(op, e.b)) for e in found.expands]
