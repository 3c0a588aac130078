"""The gated delta rule on tensors: one row after the other, or in chunks of rows, which give the same values.

Shapes: ``n`` sequences of ``L`` rows each, ``H`` heads. ``q``, ``k`` ``[n, H, L, dim_k]``, ``v`` ``[n, H, L, dim_v]``,
``g`` ``[n, H, L, 1 or dim_k]`` (log of the decay), ``beta`` ``[n, H, L, 1]``, the state ``[n, H, dim_k, dim_v]``; all
float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from truffula.kernels.program import GatedDelta
from truffula.kernels.reference.states import SpanBatch

_CHUNK, _CHUNK_OF_ROWS = 64, 16  # rows; fewer where each row of the state has a decay of its own


def gated_delta(
    op: GatedDelta, inputs: Sequence[Tensor], rate: Tensor, dt_bias: Tensor, states: Tensor, spans: Sequence[SpanBatch]
) -> Tensor:
    """``[T, H·dim_v]`` in the dtype of v: ``inputs`` are q, k, v, decay and beta, ``[T, width]`` each; ``states [rows,
    H·dim_k·dim_v]`` are read and written."""
    q, k, v, decay, beta = inputs
    g = rate.repeat_interleave(decay.shape[1] // op.heads) * F.softplus(decay.float() + dt_bias)
    beta = op.beta_scale * torch.sigmoid(beta.float())
    q, k = _unit(q, op) * op.scale, _unit(k, op)
    out = torch.empty_like(v)
    for span in spans:
        n, length = span.rows.shape
        x = [part[span.rows].view(n, length, op.heads, -1).transpose(1, 2).float() for part in (q, k, v, g, beta)]
        state = states[span.source].view(n, op.heads, op.dim_k, op.dim_v)
        values, state = (_step if length == 1 else _chunks)(x, state)
        out[span.rows] = values.transpose(1, 2).reshape(n, length, -1).to(out.dtype)
        states[span.target] = state.reshape(n, -1)
    return out


def _unit(x: Tensor, op: GatedDelta) -> Tensor:
    """q or k ``[T, key_heads·dim_k]`` with heads of length 1, each repeated for the heads that share it."""
    x = x.float().view(len(x), op.key_heads, op.dim_k)
    x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + op.eps)
    return x.repeat_interleave(op.heads // op.key_heads, 1).reshape(len(x), -1)


def _step(x: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule as ``GatedDelta`` states it, for one row. ``x`` are q, k, v, g and beta, as in all below."""
    q, k, v, g, beta = x
    state = state * g.exp().transpose(2, 3)
    state = state + k.transpose(2, 3) * (beta * (v - k @ state))
    return q @ state, state


def _chunks(x: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    out, size = [], _CHUNK if x[3].shape[-1] == 1 else _CHUNK_OF_ROWS
    for at in range(0, x[0].shape[2], size):
        part, state = _chunk([item[:, :, at : at + size] for item in x], state)
        out.append(part)
    return torch.cat(out, 2), state


def _chunk(x: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Several rows at once (Yang et al. 2024, "Gated Delta Networks", in its form with a triangular system).

    With G the sum of g up to a row, row i adds the outer product of k_i and u_i to the state, where
    u_i = beta_i (v_i - exp(G_i) k_i S - Σ_j<i (k_i exp(G_i - G_j) k_j) u_j) and S is the state before the chunk.
    """
    q, k, v, g, beta = x
    total = g.cumsum(2)
    since = (total[:, :, :, None] - total[:, :, None]).masked_fill(_later(v.shape[2], v.device), -torch.inf).exp()
    grown, rest = total.exp(), (total[:, :, -1:] - total).exp()
    unread = beta * (v - (grown * k) @ state)
    u = torch.linalg.solve_triangular(beta * _products(k, k, since), unread, upper=False, unitriangular=True)
    out = (grown * q) @ state + _products(q, k, since) @ u
    return out, state * grown[:, :, -1:].transpose(2, 3) + (rest * k).transpose(2, 3) @ u


def _later(length: int, device: torch.device) -> Tensor:
    """Whether row j is after row i, ``[i, j, 1]``."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[:, :, None]


def _products(x: Tensor, k: Tensor, since: Tensor) -> Tensor:
    """``[n, H, i, j]``: the product of x_i and k_j with the decay between them, ``since [n, H, i, j, 1 or dim_k]``."""
    if since.shape[-1] == 1:
        return (x @ k.transpose(2, 3)) * since[..., 0]
    return torch.einsum("nhid,nhjd,nhijd->nhij", x, k, since)
