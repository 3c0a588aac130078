"""The ops that work on rows alone, one plain function each, on tensors. This is the specification of what they compute.

Each takes and returns tensors and computes in float32; ``dtype`` is the one it rounds to, once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from truffula.kernels.program import Activation, Epilogue, Norm, Pointwise, Rope, RopeTable, Route


def activation(x: Tensor, kind: Activation) -> Tensor:
    """silu: x·sigmoid(x) · gelu: x·Φ(x) · gelu_tanh: its tanh form · relu · relu2: relu(x)² ·
    quick_gelu: x·sigmoid(1.702 x) · sigmoid · softplus."""
    match kind:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "softplus":
            return F.softplus(x)
        case "relu2":
            return F.relu(x).square()
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)


def embed(
    rows: Tensor, stored: torch.dtype, scale: float | None, add: Tensor | None, dtype: torch.dtype, virtual: Tensor
) -> Tensor:
    """``[T, D]``: ``rows`` of a table of dtype ``stored`` (with their adapters), times ``scale`` rounded to that dtype,
    plus ``add``. ``virtual [T]`` rows are not of the table, and are not scaled."""
    if scale is None and add is None:
        return rows.to(dtype)
    out = rows.float()
    if scale is not None:
        out = out * torch.where(virtual, 1.0, torch.tensor(scale, dtype=stored).float())[:, None]
    return (out if add is None else out + add).to(dtype)


def norm(
    op: Norm,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    plus: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``[T, width]`` normed over each of ``op.groups`` column groups; see ``Norm`` for the order of rounding."""
    values = x.float().view(x.shape[0], op.groups, -1) if op.groups > 1 else x.float()
    normalise = F.rms_norm if op.kind == "rms" else F.layer_norm
    values = normalise(values, values.shape[-1:], eps=op.eps)
    if op.cast == "first":
        values = values.to(dtype)
    per_group = (op.groups, -1) if op.groups > 1 else (-1,)
    if weight is not None:
        values = values * (weight.view(per_group) if weight.numel() == x.shape[1] else weight)
    if bias is not None:
        values = values + (bias.view(per_group) if bias.numel() == x.shape[1] else bias)
    values = values.view(x.shape)
    if gate is not None and op.gate_activation is not None:
        if op.cast == "first":
            values = values.to(dtype)
        values = values * activation(gate.float(), op.gate_activation)
    out = values.to(dtype)
    return out if plus is None else plus + out


def xielu(x: Tensor, numbers: Tensor) -> Tensor:
    """xIELU (Huang and Schlag 2024) with the ``numbers`` alpha_p, alpha_n, beta and eps."""
    alpha_p, alpha_n, beta, eps = numbers.unbind()
    below = (torch.expm1(torch.minimum(x, eps)) - x) * (beta + F.softplus(alpha_n))
    return torch.where(x > 0, F.softplus(alpha_p) * x * x, below) + beta * x


def pointwise(
    op: Pointwise, x: Tensor, y: Tensor | None, weight: Tensor | None, positions: Tensor, dtype: torch.dtype
) -> Tensor:
    """See ``Pointwise``; float32 inside. ``positions`` are those of token rows."""
    values = x.float()
    if y is not None and y.shape != x.shape:
        y = y.repeat_interleave(x.shape[1] // y.shape[1], 1)
    match op.kind:
        case "act":
            assert op.activation is not None
            out = activation(values, op.activation)
        case "add":
            assert y is not None
            out = values + y.float()
        case "mul":
            assert y is not None
            out = values * (y.float() if op.activation is None else activation(y.float(), op.activation))
        case "scale":
            out = values * (op.params[0] if weight is None else weight)
        case "clip":
            out = values.clamp(-op.params[0], op.params[0])
        case "softcap":
            out = torch.tanh(values / op.params[0]) * op.params[0]
        case "sigmoid_mul":
            assert y is not None
            out = values * torch.sigmoid(y.float())
        case "position_scale":
            beta, step, offset = op.params
            steps = torch.floor((positions.float() + offset) / step)
            out = values * (1 + beta * torch.log(1 + steps))[:, None]
        case "xielu":
            assert weight is not None
            out = xielu(values, weight)
    return out.to(dtype)


def rope_rows(table: RopeTable, positions: Tensor, lengths: Tensor) -> Tensor:
    """float32 ``[T, 2·pairs]``: [cos | sin] of position · inv_freq, times the table's factor. ``lengths`` ``[T]``: of
    the rows' sequences."""
    inv_freq = torch.tensor(table.inv_freq, dtype=torch.float32).to(positions.device)
    if table.border:
        lengths = torch.maximum(lengths, positions + 1)[:, None]
        if table.long_freq:
            beyond = torch.tensor(table.long_freq, dtype=torch.float32).to(positions.device)
        else:
            exponents = torch.arange(len(inv_freq), device=positions.device) / (len(inv_freq) - 1)
            grown = table.growth * lengths.double() / table.border - (table.growth - 1)
            beyond = (inv_freq / grown.clamp(min=1) ** exponents).float()
        inv_freq = torch.where(lengths > table.border, beyond, inv_freq)
    angles = positions.float()[:, None] * inv_freq
    return torch.cat([angles.cos(), angles.sin()], 1) * table.factor


def rope_factors(op: Rope, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What ``rope_`` multiplies with, ``[T, 1, dims]`` each: cosines, and sines signed by their place in a pair."""
    pairs = op.dims // 2
    cos, sin = rows.float()[:, None, :pairs], rows.float()[:, None, pairs:]
    if op.layout == "half":
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def rope_(op: Rope, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``x [T, heads·head_dim]`` in place: (a, b) of a pair becomes (a·cos − b·sin, b·cos + a·sin)."""
    part = x.view(x.shape[0], op.heads, op.head_dim)
    if op.dims < op.head_dim:
        part = part[..., op.start : op.start + op.dims]
    values = part.float()
    if op.layout == "half":
        swapped = values.roll(op.dims // 2, -1)
    else:
        swapped = values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # type: ignore[no-untyped-call]
    values = values.mul_(cos).addcmul_(swapped, sin)
    if values is not part:
        part.copy_(values)


def route(op: Route, logits: Tensor, correction: Tensor | None, expert_scale: Tensor | None = None) -> Tensor:
    """float32 ``[T, 2k]``: the chosen experts' numbers, then their weights; see ``Route``."""
    if op.score == "sparsemixer":
        return _sparsemixer(op, logits)
    scores = logits.softmax(-1) if op.score == "softmax" else logits.sigmoid()
    preference = logits if correction is None else scores + correction
    if op.groups > 1:
        by_group = (scores if correction is None else preference).view(len(scores), op.groups, -1)
        best = by_group.amax(-1) if op.group_score == "max" else by_group.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(best).scatter_(1, _first(best, op.topk_groups), 1.0)
        preference = preference.masked_fill(kept.repeat_interleave(by_group.shape[2], 1) == 0, -torch.inf)
    experts = _first(preference, op.k)
    weights = scores.gather(1, experts)
    if op.norm is not None:
        weights = weights / (weights.norm(op.norm, -1, keepdim=True) + op.plus).clamp_min(op.floor)
    weights = weights * op.scale
    if expert_scale is not None:
        weights = weights * expert_scale[experts]
    return torch.cat([experts.float(), weights], 1)


def _first(values: Tensor, count: int) -> Tensor:
    """The columns of the ``count`` largest values of each row, the largest first; of equal ones the lower number."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]


def _sparsemixer(op: Route, logits: Tensor) -> Tensor:
    left, experts, weights = logits.clone(), [], []
    for _ in range(op.k):
        best = left.max(-1, keepdim=True)
        far = (best.values - logits) / torch.maximum(logits.abs(), best.values) > 2 * op.jitter
        expert = _first(left, 1)
        experts.append(expert)
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(1, expert))
        left = left.scatter(1, expert, -torch.inf)
    return torch.cat([*[expert.float() for expert in experts], *weights], 1)


def epilogue(y: Tensor, e: Epilogue, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y [rows, O]`` (the base product with its adapters; overwritten) to what is stored, in ``Epilogue``'s order."""
    if y.dtype == dtype and bias is None and e.clip is None and e.activation is None and not e.glu and e.scale == 1.0:
        return y if residual is None else y + residual  # torch adds two bfloat16 in float32 and rounds once
    values = y.float()
    if bias is not None:
        values = values.add_(bias)
    if e.clip is not None:
        values = values.clamp_(-e.clip, e.clip)
    if e.glu:
        gate, up = values.chunk(2, -1)
        if e.glu_limit is not None:
            gate, up = gate.clamp(max=e.glu_limit), up.clamp(-e.glu_limit, e.glu_limit)
        if e.glu_offset:
            up = up + e.glu_offset
        values = (gate if e.activation is None else activation(gate, e.activation)).mul_(up)
    elif e.activation is not None:
        values = activation(values, e.activation)
    if e.scale != 1.0:
        values = values.mul_(e.scale)
    if residual is not None:
        values = values.add_(residual)
    return values.to(dtype)
