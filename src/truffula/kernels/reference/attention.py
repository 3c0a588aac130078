"""Attention over paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from truffula.kernels.inputs import StepInputs
from truffula.kernels.program import Attention

# Scores of one slice of query rows stay below this many float32 values (64 MB), whatever the chunk and context are.
_SCORE_LIMIT = 1 << 24


@dataclass(frozen=True)
class Batch:
    """Sequences with equally many rows in this step and contexts of similar length, attended in one product.

    ``rows`` [n·q] are their rows of the step (a slice when adjacent). ``slots`` [n·L] are the KV slots of the keys;
    padding points at the zero slot. ``positions`` [n, L] are those of the keys. ``seen`` [n, 1, q, L] is True for keys
    that the query attends to.
    """

    rows: Tensor | slice
    slots: Tensor
    positions: Tensor
    seen: Tensor
    sequences: int
    queries: int
    keys: int


def plan(
    inputs: StepInputs,
    group: int,
    window: int | None,
    chunked: bool,
    block_size: int,
    zero_slot: int,
    device: torch.device,
) -> list[Batch]:
    """Group the step's sequences for one KV group and window; the batches' tensors lie on ``device``.

    Similar length means the same power of two, so that a short context is never padded to a long one's size.
    Keys before the window of a sequence's first row are not gathered at all.
    """
    n = inputs.N
    starts = inputs.q_start[:n].astype(np.int64)
    queries = inputs.q_start[1 : n + 1].astype(np.int64) - starts
    ends = inputs.kv_len[:n].astype(np.int64)
    first = np.zeros(n, np.int64) if window is None else np.maximum(ends - queries - window + 1, 0)
    classes: dict[tuple[int, int], list[int]] = {}
    for index in np.flatnonzero(queries > 0).tolist():
        size = int(ends[index] - first[index] - 1).bit_length()
        classes.setdefault((int(queries[index]), size), []).append(index)
    batches = []
    for (count, _), members in classes.items():
        start, end, tables = starts[members, None], ends[members, None], inputs.block_tables[group][members]
        keys = int((ends - first)[members].max())
        key = first[members, None] + np.arange(keys)  # [n, L] absolute positions
        block = np.minimum(key // block_size, tables.shape[1] - 1)
        slots = tables[np.arange(len(members))[:, None], block].astype(np.int64) * block_size + key % block_size
        # Slots beyond a sequence's end may hold anything, NaN too, and 0 · NaN is NaN: read zeros instead.
        slots = np.where(key < end, slots, zero_slot)
        query = (end - count + np.arange(count))[:, :, None]  # [n, q, 1] absolute positions
        seen = key[:, None, :] <= query
        if window is not None:
            seen &= key[:, None, :] // window == query // window if chunked else key[:, None, :] > query - window
        rows = (start + np.arange(count)).reshape(-1)
        adjacent = bool((np.diff(rows) == 1).all())
        batches.append(
            Batch(
                rows=slice(int(rows[0]), int(rows[-1]) + 1) if adjacent else torch.from_numpy(rows).to(device),
                slots=torch.from_numpy(slots.reshape(-1)).to(device),
                positions=torch.from_numpy(key).to(device),
                seen=torch.from_numpy(seen[:, None]).to(device),
                sequences=len(members), queries=count, keys=keys,
            )
        )  # fmt: skip
    return batches


def write(plane: Tensor, slots: Tensor, values: Tensor) -> None:
    """Row t of ``values``, ``[T, width]`` or ``[T, heads, ..., dim]``, goes to slot ``slots[t]`` of ``plane
    [P, S, width]``."""
    plane.view(-1, *values.shape[1:]).index_copy_(0, slots, values)


def compute(op: Attention, q: Tensor, k: Tensor, v: Tensor, batches: Sequence[Batch], sinks: Tensor | None) -> Tensor:
    """``[T, heads·dim_v]`` in ``q``'s dtype: ``q``, ``[T, heads·dim_k]`` or ``[T, heads, ..., dim_k]``, over the planes
    ``k`` and ``v`` ``[P, S, width]``.

    A CPU computes in float32, which is up to four times as quick there as torch's attention in 16 bits.
    """
    dtype = torch.float32 if q.device.type == "cpu" else q.dtype
    out = q.new_empty(q.shape[0], op.heads * op.dim_v)
    for batch in batches:
        n, length = batch.sequences, batch.keys
        keys = k.view(-1, k.shape[-1]).index_select(0, batch.slots).to(dtype).view(n, length, op.kv_heads, op.dim_k)
        values = v.view(-1, v.shape[-1]).index_select(0, batch.slots).to(dtype).view(n, length, op.kv_heads, op.dim_v)
        queries = q[batch.rows].to(dtype).view(n, batch.queries, op.kv_heads, -1, op.dim_k)
        bias = _alibi(op, batch.positions) if op.alibi else None
        result = _in_slices(op, queries, keys.transpose(1, 2), values.transpose(1, 2), batch.seen, sinks, bias)
        result = result.reshape(n * batch.queries, -1).to(q.dtype)
        if len(batches) == 1 and len(result) == len(out):
            return result
        out[batch.rows] = result
    return out


def _alibi(op: Attention, positions: Tensor) -> Tensor:
    """``[n, K, H/K, L]``: what each head adds to the score of each key at ``positions [n, L]``."""
    slopes = torch.tensor(op.alibi, dtype=torch.float32).view(1, op.kv_heads, -1, 1).to(positions.device)
    keys = positions.float()[:, None, None]
    return (slopes * keys.bfloat16()).bfloat16().float() * op.scale if op.alibi_rounded else slopes * keys


def _in_slices(
    op: Attention, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``[n, q, K, H/K, dim_v]`` from ``q [n, q, K, H/K, dim_k]``: few query rows at a time when scores would be large.

    The heads that share a KV head become rows of one product: ``[n, K, H/K · q, dim_k]``.
    """
    n, count, kv_heads, share, width = q.shape
    step = max(1, _SCORE_LIMIT // (n * op.heads * k.shape[2]))
    if count > step:
        parts = [(q[:, at : at + step], seen[:, :, at : at + step]) for at in range(0, count, step)]
        return torch.cat([_in_slices(op, rows, k, v, visible, sinks, bias) for rows, visible in parts], 1)
    if count > 1:
        q, seen = q.permute(0, 2, 3, 1, 4), seen.repeat(1, 1, share, 1)
    q = q.reshape(n, kv_heads, share * count, width)
    if op.softcap is None and sinks is None and bias is None:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=op.scale)
    else:
        mixed = _spelled_out(op, q, k, v, seen, sinks, None if bias is None else bias.repeat_interleave(count, 2))
    return mixed.view(n, kv_heads, share, count, -1).permute(0, 3, 1, 2, 4)


def _spelled_out(
    op: Attention, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sinks: Tensor | None, bias: Tensor | None
) -> Tensor:
    """torch's attention, with softcap, sinks and ``bias [n, K, rows, L]``: ``q [n, K, rows, dim_k]``, ``k`` and ``v``
    ``[n, K, L, dim]``."""
    scores = torch.matmul(q.float(), k.float().transpose(2, 3)).mul_(op.scale)
    if op.softcap is not None:
        scores = scores.div_(op.softcap).tanh_().mul_(op.softcap)
    if bias is not None:
        scores = scores.add_(bias)
    scores = scores.masked_fill_(~seen, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:  # one more column that takes weight and carries no value
        rows = scores.shape[2] // (op.heads // op.kv_heads)
        column = sinks.view(1, op.kv_heads, -1, 1).repeat_interleave(rows, 2).expand(len(scores), -1, -1, 1)
        weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    return torch.matmul(weights, v.float()).to(q.dtype)
