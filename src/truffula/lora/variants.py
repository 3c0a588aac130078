"""What variants of LoRA do to a pair, as one pair of plain matrices and a column scale (see PEFT's ``lora/variants``).

    BD-LoRA      A or B is block-diagonal: expanded
    QALoRA       A acts on means of groups of inputs: each of its columns is repeated
    KaSA         s B diag(d) A, minus the r smallest singular parts of W
    PiSSA, OLoRA s B A, minus the parts of W that A and B began with: the largest singular ones, the first of Q R
    DoRA         c ⊙ (W x + s B A x) with c = magnitude / ‖row of W + s B A‖; of an embedding, of its columns

What is subtracted is of low rank, too: the sum is a pair of rank 2r with scale 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from truffula.errors import AdapterError
from truffula.kernels.backend import Array
from truffula.kernels.program import RowOrder
from truffula.lora.base import Float32
from truffula.lora.fields import LoraSettings

Rows = Iterable[tuple[int, Array]]
"""Blocks of rows of a matrix: the number of the first, and the values."""
Taken = tuple[Float32, Float32]
"""B0 [O, r] and A0 [r, I] of what training took from the base's weight."""


@dataclass(frozen=True)
class Form:
    """How a pair is stored: with ``a_blocks`` and ``b_blocks`` on the diagonal, A of means of ``group`` inputs (0: of
    inputs), and outputs (rows of B, magnitudes, biases) in an ``order`` of their own."""

    a_blocks: int = 1
    b_blocks: int = 1
    group: int = 0
    order: RowOrder | None = None

    def shapes(self, rank: int, inputs: int, outputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The stored shapes of A and B."""
        return (rank, inputs // (self.a_blocks * max(1, self.group))), (outputs, rank // self.b_blocks)

    def expand(self, a: Array, b: Array) -> tuple[Array, Array]:
        """A [r, I] and B [O, r] as plain matrices."""
        if self.group:
            a = np.repeat(a.astype(np.float32) * np.float32(a.shape[1] / self.group), self.group, axis=1)
        return _block_diagonal(a, self.a_blocks), self.in_order(_block_diagonal(b, self.b_blocks))

    def in_order(self, rows: Array) -> Array:
        """``rows`` ``[O, ...]`` as stored, in the order of the base's."""
        return rows if self.order is None else self.order.sorted(rows)


PLAIN = Form()


def form_of(settings: LoraSettings, module: str, rank: int, inputs: int, outputs: int) -> Form:
    """How the pair of ``module`` is stored. Raises ``AdapterError`` where numbers do not divide."""
    if settings.use_qalora:
        group = settings.qalora_group_size
        _require_multiple("qalora_group_size", module, inputs, group)
        return Form(group=group)
    blocks = settings.use_bdlora
    if blocks is None:
        return PLAIN
    leaf = module.rpartition(".")[2]
    in_a = any(text in leaf for text in blocks.target_modules_bd_a or ())
    in_b = any(text in leaf for text in blocks.target_modules_bd_b or ())
    if (in_a and in_b) or (blocks.match_strict and not in_a and not in_b):
        which = "both target_modules_bd_a and target_modules_bd_b" if in_a else "neither of the two lists of modules"
        raise AdapterError(f"use_bdlora: {module} is in {which}.", param="use_bdlora")
    for size in (rank, inputs) if in_a else (rank, outputs) if in_b else ():
        _require_multiple("use_bdlora.nblocks", module, size, blocks.nblocks)
    return Form(blocks.nblocks if in_a else 1, blocks.nblocks if in_b else 1)


def with_taken_a(a: Array, diagonal: Array | None, taken: Taken | None) -> Array:
    """diag(diagonal) A, over A0 of what training took from the base."""
    if diagonal is not None:
        a = diagonal.astype(np.float32)[:, None] * a.astype(np.float32)
    return a if taken is None else np.concatenate([a.astype(np.float32), taken[1]])


def with_taken_b(b: Array, scale: float, taken: Taken | None, lo: int) -> Array:
    """B; or scale · B beside -B0, of which ``b`` has the rows from ``lo`` on."""
    if taken is None:
        return b
    return np.concatenate([b.astype(np.float32) * np.float32(scale), -taken[0][lo : lo + len(b)]], axis=1)


def largest_parts(weight: Float32, rank: int) -> Taken:
    """B0 and A0 whose product is the part of ``weight`` of its ``rank`` largest singular values (PiSSA)."""
    return _singular_parts(weight, slice(-rank, None))


def smallest_parts(weight: Float32, rank: int) -> Taken:
    """The same of the ``rank`` smallest (KaSA)."""
    return _singular_parts(weight, slice(rank))


def _singular_parts(weight: Float32, which: slice) -> Taken:
    """The part of some singular values, by their place from the smallest on: W projected on their vectors, which are
    those of W Wᵀ or Wᵀ W, whichever is smaller. In float64 that is more exact than an SVD in float32, and faster."""
    wide = weight.shape[0] <= weight.shape[1]
    rows = (weight if wide else weight.T).astype(np.float64)
    vectors = np.linalg.eigh(rows @ rows.T)[1][:, which]
    b, a = vectors.astype(np.float32), (vectors.T @ rows).astype(np.float32)
    return (b, a) if wide else (a.T, b.T)


def first_parts(weight: Float32, rank: int) -> Taken:
    """The first ``rank`` columns of Q and rows of R (OLoRA), which subtracts them times the scale."""
    q, r = np.linalg.qr(weight)
    return q[:, :rank], r[:rank]


def row_norms(rows: Rows, outputs: int, a: Array, b: Array, scale: float) -> Float32:
    """``[O]``: the norm of each row of W + scale · B A."""
    norms = np.empty(outputs, np.float32)
    a, b = a.astype(np.float32), b.astype(np.float32) * np.float32(scale)
    for lo, values in rows:
        hi = lo + len(values)
        norms[lo:hi] = np.linalg.norm(np.asarray(values, np.float32) + b[lo:hi] @ a, axis=1)
    return norms


def column_norms(rows: Rows, a: Array, b: Array, scale: float) -> Float32:
    """``[D]``: the norm of each column of a table E [V, D] + scale · (B A)ᵀ, of A [r, V] and B [D, r]."""
    squares = np.zeros(len(b), np.float64)
    b = b.astype(np.float32) * np.float32(scale)
    for lo, values in rows:
        changed = np.asarray(values, np.float32) + a[:, lo : lo + len(values)].astype(np.float32).T @ b.T
        squares += np.einsum("vd,vd->d", changed, changed, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)


def magnitude_scale(magnitude: Array, norms: Float32, key: str) -> Float32:
    """c of DoRA. Raises ``AdapterError`` (``param``: ``key``) where a norm is zero."""
    if (count := int((norms == 0).sum())) > 0:
        raise AdapterError(
            f"{key}: {count} rows of the adapted weight are zero, so DoRA's scale is infinite.", param=key
        )
    return magnitude.astype(np.float32).reshape(-1) / norms


def _block_diagonal(matrix: Array, blocks: int) -> Array:
    """Runs of rows of ``matrix [n, m / blocks]`` on a diagonal: ``[n, m]``."""
    if blocks == 1:
        return matrix
    rows, columns = len(matrix) // blocks, matrix.shape[1]
    made = np.zeros((len(matrix), columns * blocks), matrix.dtype)
    for block in range(blocks):
        made[block * rows : (block + 1) * rows, block * columns : (block + 1) * columns] = matrix[
            block * rows : (block + 1) * rows
        ]
    return made


def _require_multiple(field: str, module: str, size: int, of: int) -> None:
    if size % of:
        raise AdapterError(
            f"{field} is {of}, which does not divide {size}, a size of {module}.", param=field.split(".")[0]
        )


PARTS: dict[str, Callable[[Float32, int], Taken]] = {"pissa": largest_parts, "olora": first_parts}
