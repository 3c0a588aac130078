"""Loads weights from mapped files into native rows, panels and vectors."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np

from truffula.errors import KernelError
from truffula.kernels.backend import PullWeight, QuantisedArray, as_array
from truffula.kernels.cpu.formats import (
    BLOCK_KINDS,
    F32,
    LANES,
    WeightOptions,
    keeps_blocks,
    matrix_format,
    panel_bytes,
    panels_of,
)
from truffula.kernels.inputs import Array
from truffula.kernels.mapped import release_pages
from truffula.kernels.program import Embed, Linear, Logits, Program, WeightDecl

logger = logging.getLogger(__name__)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STORED = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
"""The dtypes of files and adapters that are accepted. Dtypes, not names: numpy computes a name on each access."""
_CHUNK_BYTES = 8 << 20
"""A file's pages are released after each chunk, so that the peak of memory stays near the packed size."""


@dataclass(frozen=True)
class Role:
    """How ops use a weight. ``half`` > 0: rows 0 .. half are gates, the rest ups, and their panels alternate."""

    kind: Literal["vector", "rows", "panels"]
    half: int = 0
    exact: bool = False  # kept in float32 whatever the model's dtype


def roles(program: Program) -> list[Role]:
    """One per weight.

    Raises:
        KernelError: A weight is used both as gate and up halves and as a whole.
    """
    halves: dict[int, set[int]] = {}
    exact: set[int] = set()
    for op in program.ops:
        if isinstance(op, Linear):
            outputs = program.weights[op.weight].shape[0]
            halves.setdefault(op.weight, set()).add(outputs // 2 if op.epilogue.glu else 0)
            if op.compute == "float32":
                exact.add(op.weight)
        elif isinstance(op, Logits):
            halves.setdefault(op.weight, set()).add(0)
    tables = {op.table for op in program.ops if isinstance(op, Embed)}
    made = []
    for decl in program.weights:
        if len(decl.shape) == 1:
            made.append(Role("vector", exact=decl.dtype == "float32"))
            continue
        used = halves.get(decl.id, set())
        if len(used) > 1:
            raise KernelError(f"{decl.name} is used both with and without a gate.", param=decl.name)
        if used == {0} or not used or decl.id not in tables:
            half = used.pop() if used else 0
            kind: Literal["rows", "panels"] = "panels" if decl.id in halves else "rows"
            made.append(Role(kind, half, exact=decl.dtype == "float32" or decl.id in exact))
        else:
            raise KernelError(f"{decl.name} is a table and a gate: not supported.", param=decl.name)
    return made


def packed_bytes(decl: WeightDecl, role: Role, fmt: int) -> int:
    """Bytes of a weight after packing."""
    if role.kind == "vector":
        return 4 * decl.shape[0]
    outputs, inputs = decl.shape
    if role.kind == "rows":
        return outputs * inputs * (4 if fmt == F32 else 2)
    return panels_of(outputs, role.half) * panel_bytes(fmt, inputs)


@dataclass
class Rounding:
    """The error of ``quantize``. ``sums`` by tensor: of the squares of its values, and of their rounding errors."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def error(self, names: Collection[str]) -> float:
        """The relative RMS error of these tensors together."""
        return math.sqrt(sum(self.sums[name][1] for name in names) / sum(self.sums[name][0] for name in names))

    def worst(self, names: Collection[str]) -> str:
        """The tensor with the largest error."""
        return max(names, key=lambda name: self.error([name]))

    def __str__(self) -> str:
        worst = self.worst(self.sums)
        return (
            f"{len(self.sums)} tensors rounded to Q8_0, relative RMS error {self.error(self.sums):.2%} together, "
            f"at most {self.error([worst]):.2%} ({worst})"
        )


def load_weights(native: Any, program: Program, options: WeightOptions, pull: PullWeight) -> list[Array | None]:
    """Pull every weight of ``program`` into ``native``, in order, under the program's ids. Returns the vectors' values.

    In bfloat16 matrices are rounded to it. In float32 a matrix stored in bfloat16 stays in it: that is exact, and a
    step reads half as much. Blocks keep their format (see ``matrix_format``).

    Raises:
        KernelError: Parts that do not make the declared shape, or a dtype that is not float32, float16 or bfloat16.
    """
    rounding = Rounding()
    made = [
        load_one(native, decl, role, options, pull, rounding)
        for decl, role in zip(program.weights, roles(program), strict=True)
    ]
    if rounding.sums:
        logger.info("%s", rounding)
    return made


def load_one(
    native: Any, decl: WeightDecl, role: Role, options: WeightOptions, pull: PullWeight, rounding: Rounding
) -> Array | None:
    """Pull one weight into ``native``; its rounding error is added to ``rounding``. Returns a vector's values."""
    parts = list(pull(decl))
    rows = sum(part.shape[0] for part in parts if part.shape)
    if rows != decl.shape[0] or any(part.shape[1:] != decl.shape[1:] for part in parts):
        shapes = [list(part.shape) for part in parts]
        raise KernelError(f"weight {decl.name}: parts {shapes} do not make {list(decl.shape)}.", param=decl.name)
    for part in parts:
        if not isinstance(part, QuantisedArray) and part.dtype not in STORED:
            raise KernelError(
                f"{decl.name} is {part.dtype.name}; expected float32, float16 or bfloat16.", param="dtype"
            )
    if role.kind == "vector":
        values = np.concatenate([np.asarray(as_array(part), np.float32) for part in parts])
        if options.dtype == "bfloat16" and not role.exact:
            values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        native.add_vector(values)
        return values
    kinds = {_kind(part) for part in parts}
    panels = role.kind == "panels"
    fmt = matrix_format(kinds, options, decl, exact=role.exact, panels=panels)
    weight = native.add_matrix(*decl.shape, format=fmt, panels=panels, half=role.half)
    lossless = keeps_blocks(fmt, kinds, options, decl, exact=role.exact, panels=panels)
    # A pull that does not read a checkpoint may return the parts as one array.
    names = [part.name for part in decl.parts] if len(parts) == len(decl.parts) else [decl.name for _ in parts]
    first = 0
    for part, name in zip(parts, names, strict=True):
        squares = lost = 0.0
        for lo, hi in chunks(part):
            try:
                more = _fill(native, weight, part, lo, hi, first + lo, lossless)
            except ValueError as error:
                raise KernelError(f"{decl.name}: {error}.", param=decl.name) from error
            squares, lost = squares + more[0], lost + more[1]
        first += part.shape[0]
        if squares:
            rounding.sums[name] = squares, lost
    return None


def _kind(part: Array | QuantisedArray) -> str:
    return part.kind if isinstance(part, QuantisedArray) else part.dtype.name


def chunks(part: Array | QuantisedArray) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about ``_CHUNK_BYTES``: a multiple of a panel's rows."""
    rows = part.shape[0]
    step = max(1, _CHUNK_BYTES // max(1, part.nbytes // max(1, rows))) // LANES * LANES or LANES
    for lo in range(0, rows, step):
        yield lo, min(lo + step, rows)


def _fill(
    native: Any, weight: int, part: Array | QuantisedArray, lo: int, hi: int, first: int, lossless: bool
) -> tuple[float, float]:
    """Pack rows ``lo .. hi`` of a part as rows ``first ..``. Returns sums of squares: values, errors."""
    if isinstance(part, QuantisedArray):
        some = part.rows(lo, hi)
        if lossless:
            native.fill(weight, np.ascontiguousarray(some.blocks), first, some.kind)
            release_pages(some.blocks)
            return 0.0, 0.0
        source, values = some.blocks, some.dequantise()
    else:
        source = values = part[lo:hi]
    squares, lost = native.fill(weight, as_bits(values), first)
    release_pages(source)
    return squares, lost


def as_bits(array: Array) -> Array:
    """A contiguous array, bfloat16 as uint16 bits: what the binding accepts."""
    array = np.ascontiguousarray(array)
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array


def planned_formats(program: Program, options: WeightOptions, stored_types: Mapping[str, str]) -> Mapping[int, int]:
    """Formats for the memory plan: float32 unless a tensor is known to be stored in bfloat16 or blocks."""
    return {
        decl.id: matrix_format(
            {kind if kind in BLOCK_KINDS else "float32" for kind in (stored_types.get(p.name, "") for p in decl.parts)},
            options, decl, exact=role.exact, panels=role.kind == "panels",
        )
        for decl, role in zip(program.weights, roles(program), strict=True)
        if len(decl.shape) > 1
    }  # fmt: skip
