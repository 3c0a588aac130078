"""Sequence states: the spans of a step as batches, and the convolution whose last inputs are a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truffula.kernels.inputs import StepInputs
from truffula.kernels.program import CausalConv
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
