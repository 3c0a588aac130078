"""Random adapter parts, and the site contract of ``kernels/adapters.py`` in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from hypothesis import strategies as st
from one_op import exact

from truffula.kernels.adapters import Bias, ColumnScale, InputScale, LowRank, Part, Replace, Rows
from truffula.testing.programs import as_dtype

KINDS = ("low_rank", "column_scale", "input_scale", "bias", "replace")

Span = tuple[int, int, int, float]
"""Rows lo .. hi of an adapter, with a weight."""


def some_kinds(*allowed: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(allowed), min_size=1, max_size=4, unique=True)


def spans(rows: int, adapters: int) -> st.SearchStrategy[list[Span]]:
    """Segments that may overlap, be empty or leave rows out."""
    made = st.tuples(
        st.integers(0, rows), st.integers(0, rows), st.integers(0, adapters - 1), st.sampled_from([1.0, 1.0, 0.5, -2.0])
    )
    return st.lists(made.map(lambda s: (min(s[:2]), max(s[:2]), *s[2:])), max_size=5)


def random_parts(
    rng: np.random.Generator, kinds: Iterable[str], inputs: int, outputs: int, dtype: str, *, table: bool = False
) -> tuple[Part, ...]:
    """Parts of these kinds, stored in ``dtype`` with values that bfloat16 holds. ``table``: at an embedding."""

    def numbers(*shape: int, by: float = 1.0) -> np.ndarray:
        return as_dtype(exact(rng.standard_normal(shape) * by, "bfloat16"), dtype)

    made: list[Part] = []
    for kind in kinds:
        match kind:
            case "low_rank":
                rank = int(rng.choice([1, 3, 17]))
                made.append(LowRank(numbers(rank, inputs), numbers(outputs, rank, by=rank**-0.5), 0.25))
            case "column_scale":
                made.append(ColumnScale(numbers(outputs)))
            case "input_scale":
                made.append(InputScale(numbers(inputs)))
            case "bias":
                made.append(Bias(numbers(outputs)))
            case "replace":
                made.append(Replace(numbers(inputs, outputs) if table else numbers(outputs, inputs)))
            case "rows":
                end, width = (inputs + 9, outputs) if table else (outputs, inputs)
                ids = rng.permutation(end)[: rng.integers(1, max(2, end // 2))].astype(np.int32)
                made.append(Rows(ids, numbers(len(ids), width)))
    return tuple(made)


def product(parts: Sequence[Part], x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """c ⊙ (x' W'ᵀ + Σ s (x Aᵀ) Bᵀ) + b for ``x [I]`` and ``w [O, I]``."""
    inputs, weight, added, factor, bias = x, w, 0.0, 1.0, 0.0
    for part in parts:
        match part:
            case LowRank():
                added = added + part.scale * part.b.astype(np.float64) @ (part.a.astype(np.float64) @ x)
            case ColumnScale():
                factor = part.factor.astype(np.float64)
            case InputScale():
                inputs = x * part.factor.astype(np.float64)
            case Bias():
                bias = part.values.astype(np.float64)
            case Replace():
                weight = part.weight.astype(np.float64)
            case Rows():
                weight = w.copy()
                weight[part.ids] = part.values.astype(np.float64)
    return factor * (weight @ inputs + added) + bias


def mixed(
    x: np.ndarray, w: np.ndarray, row: int, segments: Sequence[Span], parts: Sequence[Sequence[Part]]
) -> np.ndarray:
    """A row of the product ``x wᵀ`` under ``segments`` of adapters, each with its ``parts`` at the site."""
    base = w @ x
    return base + sum(
        (
            by * (product(parts[number], x, w) - base)
            for lo, hi, number, by in segments
            if lo <= row < hi and parts[number]
        ),
        np.zeros_like(base),
    )


def fill_segments(step, segments: Sequence[Span], *, of_logits: bool = False) -> None:
    """Write ``segments`` over token rows, and over the same rows of logits."""
    step.G = len(segments)
    for g, (lo, hi, number, by) in enumerate(segments):
        step.seg[g], step.seg_r[g], step.seg_weight[g] = (lo, hi, number), (lo, hi) if of_logits else (0, 0), by
