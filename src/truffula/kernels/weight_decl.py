"""Weights of a program as data: their shapes, the tensors of the checkpoint that fill them, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

WeightId = Annotated[int, "weight"]
"""Position of a weight in ``Program.weights``. Fields of ops with this type are the weights that an op reads."""
BufferDtype = Literal["model", "float32"]
Transform = Literal[
    "none", "plus_one", "minus_exp", "transpose", "conv", "columns", "even_columns", "odd_columns", "alternating"
]


BLOCK_ROWS: Mapping[Transform, slice] = MappingProxyType(
    {"none": slice(None), "columns": slice(None), "even_columns": slice(0, None, 2), "odd_columns": slice(1, None, 2)}
)
"""The output rows that a part takes of blocks, which run along a matrix' inputs however its values are stored."""


@dataclass(frozen=True)
class RowOrder:
    """How a fused module stores its rows: ``groups`` times one run of each of ``widths`` (q, k and v of a head).

    A program has all rows of a run together: all q, then all k, then all v.
    """

    groups: int
    widths: tuple[int, ...]

    def sorted(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """``rows`` ``[O, ...]`` of the module, in the program's order."""
        grouped = rows.reshape(self.groups, sum(self.widths), *rows.shape[1:])
        runs = np.split(grouped, np.cumsum(self.widths)[:-1], axis=1)
        return np.concatenate([run.reshape(-1, *rows.shape[1:]) for run in runs])


class WeightPart(msgspec.Struct, frozen=True, gc=False):
    """One checkpoint tensor that fills rows of a weight, by its name in the checkpoint.

    ``transform``: ``plus_one`` adds 1, in float32, for norms with 1 + w; ``minus_exp`` is -exp(w), in float32;
    ``transpose`` is for matrices that are stored [I, O] (Conv1D), ``conv`` for [C, 1, K]. Then ``order`` sorts the
    rows. Of a weight of experts, a part fills rows
    ``lo ..`` of ``expert`` (None: of every expert) and has the shape ``stored``; ``columns`` takes matrices that are
    stored [I, O], ``even_columns`` and ``odd_columns`` every second column of such matrices, and ``alternating`` a
    vector [E, O] in which entries of gates and ups alternate.
    """

    name: str
    transform: Transform = "none"
    expert: int | None = None
    lo: int = 0
    stored: tuple[int, ...] = ()
    order: RowOrder | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether a matrix that is stored in blocks, which run along its inputs, may stay in them."""
        return self.transform in BLOCK_ROWS


@dataclass(frozen=True)
class WeightDecl:
    """A weight of the program: ``shape`` ``[O, I]``, ``[V, D]`` or ``[width]``, made of ``parts`` stacked along axis 0;
    or a matrix per expert, ``[E, O, I]``, whose parts say which rows they fill.

    ``name`` is the canonical one, used in messages. ``uses``: ``rows`` (gathered), ``matmul``, ``vector``, ``conv``
    (``[C, K]`` of a convolution). A tied table is one decl with both rows and matmul, stored once. ``dtype`` float32 is
    kept exact whatever the model's dtype.
    """

    id: int
    name: str
    shape: tuple[int, ...]
    parts: tuple[WeightPart, ...]
    uses: frozenset[str]
    dtype: BufferDtype = "model"
