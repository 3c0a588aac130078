"""Sequence states: the spans of a step as batches, and the convolution whose last inputs are a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from truffula.kernels.inputs import StepInputs
from truffula.kernels.program import CausalConv, Mamba2
from truffula.kernels.reference.ops import activation


@dataclass(frozen=True)
class SpanBatch:
    """Spans of equal length, of different sequences. ``rows`` [n, L] are their rows of the step; ``source`` and
    ``target`` [n] are the state rows that they begin with and leave."""

    rows: Tensor
    source: Tensor
    target: Tensor


def plan_spans(inputs: StepInputs, device: torch.device) -> list[SpanBatch]:
    """The step's spans in batches, in the order in which they must run: a sequence's second span after its first."""
    starts = inputs.span_start[: inputs.Z + 1].astype(np.int64)
    sequence = np.searchsorted(inputs.q_start[1 : inputs.N + 1], starts[:-1], side="right")
    place = np.arange(inputs.Z) - np.searchsorted(sequence, sequence)  # among the spans of its sequence
    batches = []
    for key in sorted(set(zip(place.tolist(), np.diff(starts).tolist(), strict=True))):
        members = np.flatnonzero((place == key[0]) & (np.diff(starts) == key[1]))
        rows = starts[members, None] + np.arange(key[1])
        source, target = inputs.state_in[members].astype(np.int64), inputs.state_out[members].astype(np.int64)
        batches.append(SpanBatch(*(torch.from_numpy(array).to(device) for array in (rows, source, target))))
    return batches


def causal_conv(
    op: CausalConv,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    spans: Sequence[SpanBatch],
    dtype: torch.dtype,
) -> Tensor:
    """``[T, C]`` of ``dtype``: ``x [T, C]`` convolved with ``weight [C, K]``; ``states [rows, (K - 1) · C]`` are read
    and written."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    columns, taps = weight.shape
    for span in spans:
        before = states[span.source].view(-1, taps - 1, columns)
        inputs = torch.cat([before, x[span.rows]], 1)
        windows = inputs.float().unfold(1, taps, 1)  # [n, L, C, K]
        values = (windows * weight).sum(-1)
        if bias is not None:
            values = values + bias
        if op.activation is not None:
            values = activation(values, op.activation)
        out[span.rows] = values.to(dtype)
        states[span.target] = inputs[:, inputs.shape[1] - (taps - 1) :].reshape(len(inputs), -1)
    return out


_CHUNK = 64
"""Tokens whose effect on each other Mamba-2 computes as one product."""


def mamba2(
    op: Mamba2, x: Tensor, b: Tensor, c: Tensor, dt: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor], states: Tensor, spans: Sequence[SpanBatch],
) -> Tensor:  # fmt: skip
    """float32 ``[T, heads · head_dim]``; see ``Mamba2`` for the operands.

    ``vectors``: rate, dt_bias and skip. ``states`` are read and written.

    The outputs of a chunk of tokens are their products with each other, decayed, and with the state before the chunk
    (Dao and Gu 2024, "Transformers are SSMs"). With a rate for each column of a state, token by token.
    """
    rate, dt_bias, skip = vectors
    out = torch.empty(x.shape[0], op.heads, op.head_dim, device=x.device)
    share = op.heads // op.groups
    inputs = x.float().view(-1, op.heads, op.head_dim)
    keys, queries = (y.float().view(-1, op.groups, op.state_size).repeat_interleave(share, 1) for y in (b, c))
    steps = F.softplus(dt.float() + dt_bias).clamp(*op.dt_limit)
    for span in spans:
        state = states[span.source].view(-1, op.heads, op.head_dim, op.state_size)
        if len(rate) != op.heads:
            rates = rate.view(op.heads, 1, op.state_size)
            for rows in span.rows.unbind(1):
                step = steps[rows][..., None, None]
                state = state * (step * rates).exp() + step * inputs[rows][..., None] * keys[rows][:, :, None]
                out[rows] = torch.einsum("nhps,nhs->nhp", state, queries[rows]) + skip[:, None] * inputs[rows]
            states[span.target] = state.flatten(1)
            continue
        for at in range(0, span.rows.shape[1], _CHUNK):
            rows = span.rows[:, at : at + _CHUNK]
            step = steps[rows]  # [n, q, H]
            decay = (step * rate).cumsum(1)
            between = decay[:, :, None] - decay[:, None]  # from token j to token i: [n, i, j, H]
            later = torch.ones(between.shape[1:3], dtype=torch.bool, device=x.device).triu(1)
            weights = between.masked_fill(later[:, :, None], -torch.inf).exp() * step[:, None]
            weights = weights * torch.einsum("nihs,njhs->nijh", queries[rows], keys[rows])
            values = torch.einsum("nijh,njhp->nihp", weights, inputs[rows])
            values += torch.einsum("nihs,nhps->nihp", queries[rows], state) * decay.exp()[..., None]
            out[rows] = values + skip[:, None] * inputs[rows]
            left = (decay[:, -1:] - decay).exp() * step
            state = state * decay[:, -1].exp()[..., None, None]
            state = state + torch.einsum("njhs,njhp,njh->nhps", keys[rows], inputs[rows], left)
        states[span.target] = state.flatten(1)
    return out.flatten(1)
