"""Loads weights from mapped files into native rows, panels and vectors."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from truffula.errors import KernelError
from truffula.kernels.backend import (
    BFLOAT16,
    ComputedArray,
    Part,
    PullWeight,
    QuantisedArray,
    as_array,
    expert_matrices,
    pull_parts,
)
from truffula.kernels.cpu.formats import BLOCK_KINDS, WeightOptions
from truffula.kernels.cpu.library import library
from truffula.kernels.inputs import Array
from truffula.kernels.mapped import release_pages
from truffula.kernels.program import Embed, ExpertLinear, Linear, Logits, Mla, Program, WeightDecl

logger = logging.getLogger(__name__)
T = TypeVar("T")
_CHUNK_BYTES = 8 << 20
"""A file's pages are released after each chunk, so that the peak of memory stays near the packed size."""


@dataclass(frozen=True)
class Role:
    """How ops use a weight. ``half`` > 0: rows 0 .. half are gates, the rest ups, and their panels alternate.

    ``exact``: kept in float32 whatever the model's dtype. ``quantisable``: products may read it in blocks. ``heads``
    (count, key rows, value rows): of a ``latent`` matrix.
    """

    kind: Literal["vector", "rows", "panels", "latent"]
    half: int
    exact: bool
    quantisable: bool
    heads: tuple[int, int, int] = (0, 0, 0)


def roles(program: Program) -> list[Role]:
    """One per weight.

    Raises:
        KernelError: A weight is used in two of these ways.
    """
    products = [op for op in program.ops if isinstance(op, Linear | ExpertLinear | Logits)]
    halves: dict[int, set[int]] = {op.table: {0} for op in program.ops if isinstance(op, Embed)}
    for op in products:
        glu = isinstance(op, Linear | ExpertLinear) and op.epilogue.glu
        halves.setdefault(op.weight, set()).add(program.weights[op.weight].shape[-2] // 2 if glu else 0)
    multiplied = {op.weight for op in products}
    latent = {op.kv_b: (op.heads, op.nope, op.dim_v) for op in program.ops if isinstance(op, Mla)}
    exact = {op.weight for op in products if isinstance(op, Linear) and op.compute == "float32"}
    made = []
    for decl in program.weights:
        used = halves.get(decl.id, {0})
        if len(used) > 1:
            raise KernelError(f"{decl.name} is used both as gate and up halves and as a whole.", param=decl.name)
        if decl.id in latent and decl.id in halves:
            raise KernelError(f"{decl.name} is used both by head and as a whole.", param=decl.name)
        keep = decl.dtype == "float32" or decl.id in exact
        if len(decl.shape) == 1 or "conv" in decl.uses:
            made.append(Role("vector", 0, keep, quantisable=False))
        elif decl.id in latent:
            made.append(Role("latent", 0, keep, quantisable=False, heads=latent[decl.id]))
        elif decl.id not in multiplied:
            made.append(Role("rows", 0, keep, quantisable=False))
        else:
            whole_blocks = decl.shape[-1] % library().BLOCK == 0
            made.append(Role("panels", max(used), keep, quantisable=whole_blocks and not keep))
    return made


def planned_weights(program: Program, options: WeightOptions, stored_types: Mapping[str, str]) -> list[tuple[str, int]]:
    """For the memory plan, the format of each weight (``vectors`` for a vector) and its bytes after packing.

    Tensors count as stored in float32, unless ``stored_types`` names bfloat16 or a kind of blocks.
    """
    made = []
    for decl, role in zip(program.weights, roles(program), strict=True):
        if role.kind == "vector":
            made.append(("vectors", 4 * math.prod(decl.shape)))
            continue
        types = [stored_types.get(part.name, "") if part.in_blocks else "" for part in decl.parts if part.name]
        stored = {kind if kind in BLOCK_KINDS else "bfloat16" if kind == "BF16" else "float32" for kind in types}
        fmt, _ = options.matrix_format(stored, exact=role.exact, quantisable=role.quantisable)
        *experts, outputs, inputs = decl.shape
        if role.kind == "latent":
            nbytes = library().latent_matrix_bytes(*role.heads, inputs, fmt)
        else:
            nbytes = library().matrix_bytes(outputs, inputs, fmt, panels=role.kind == "panels", half=role.half)
        made.append((fmt, math.prod(experts) * nbytes))
    return made


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


def load_weights(native: Any, program: Program, options: WeightOptions, pull: PullWeight) -> list[str]:
    """Pull every weight of ``program`` into ``native``, in order, under the program's ids. Returns their formats.

    In bfloat16 matrices are rounded to it. In float32 a matrix stored in bfloat16 stays in it: that is exact, and a
    step reads half as much. Blocks keep their format (see ``WeightOptions.matrix_format``).

    Raises:
        KernelError: Parts that do not make the declared shape, or a dtype that is not float32, float16 or bfloat16.
    """
    rounding = Rounding()
    formats = _load(native, zip(program.weights, roles(program), strict=True), options, pull, rounding)
    if rounding.sums:
        logger.info("%s", rounding)
    return formats


def load_one(
    native: Any, decl: WeightDecl, role: Role, options: WeightOptions, pull: PullWeight, rounding: Rounding
) -> str:
    """Pull one weight into ``native``; its rounding error is added to ``rounding``. Returns its format."""
    return _load(native, [(decl, role)], options, pull, rounding)[0]


@dataclass(frozen=True)
class _Vector:
    values: Array


@dataclass(frozen=True)
class _Matrix:
    """The beginning of a matrix in ``format``; its rows follow."""

    decl: WeightDecl
    role: Role
    format: str


@dataclass(frozen=True)
class _Rows:
    """Rows ``first ..`` of an expert's matrix, from the tensor ``name``: blocks of ``kind``, or numbers for "". They
    were made from ``source``, which may be mapped."""

    decl: WeightDecl
    name: str
    expert: int
    first: int
    values: Array
    kind: str
    source: Array


def _load(
    native: Any,
    weights: Iterable[tuple[WeightDecl, Role]],
    options: WeightOptions,
    pull: PullWeight,
    rounding: Rounding,
) -> list[str]:
    """Pack what ``_read`` gives; the next piece is read in a thread meanwhile: files, checks, dequantisation.

    Returns the formats of the weights.
    """
    formats: list[str] = []
    weight = -1
    with contextlib.closing(_ahead(_read(weights, options, pull))) as pieces:
        for piece in pieces:
            if isinstance(piece, _Vector):
                native.add_vector(piece.values)
                formats.append("vectors")
            elif isinstance(piece, _Matrix):
                weight = _add_matrix(native, piece)
                formats.append(piece.format)
            else:
                _fill(native, weight, piece, rounding)
    return formats


def _add_matrix(native: Any, matrix: _Matrix) -> int:
    """The native id of a new matrix."""
    role, (*experts, outputs, inputs) = matrix.role, matrix.decl.shape
    if role.kind == "latent":
        return int(native.add_latent_matrix(*role.heads, inputs, format=matrix.format))
    panels, count = role.kind == "panels", math.prod(experts)
    return int(native.add_matrix(outputs, inputs, format=matrix.format, panels=panels, half=role.half, experts=count))


def _fill(native: Any, weight: int, rows: _Rows, rounding: Rounding) -> None:
    """Pack rows of ``weight``; sums of squares, of values and of rounding errors, are added to ``rounding``."""
    try:
        squares, lost = native.fill(weight, rows.values, rows.first, rows.kind, rows.expert)
    except ValueError as error:
        raise KernelError(f"{rows.decl.name}: {error}.", param=rows.decl.name) from error
    if squares:
        before = rounding.sums.get(rows.name, (0.0, 0.0))
        rounding.sums[rows.name] = before[0] + squares, before[1] + lost
    release_pages(rows.source)


def _read(
    weights: Iterable[tuple[WeightDecl, Role]], options: WeightOptions, pull: PullWeight
) -> Iterator[_Vector | _Matrix | _Rows]:
    """The weights in order, matrices in pieces of a few megabytes. A piece's pages are released when it is packed."""
    for decl, role in weights:
        parts = pull_parts(pull, decl)
        if role.kind == "vector":
            values = np.concatenate([np.asarray(as_array(part), np.float32) for part in parts])
            if options.dtype == "bfloat16" and not role.exact:
                values = values.astype(BFLOAT16).astype(np.float32)
            yield _Vector(np.ascontiguousarray(values.T).ravel())  # a convolution's: [K, C]
            continue
        kinds = {part.kind if isinstance(part, QuantisedArray) else part.dtype.name for part in parts}
        fmt, as_blocks = options.matrix_format(kinds, exact=role.exact, quantisable=role.quantisable)
        yield _Matrix(decl, role, fmt)
        for name, expert, first, part in _matrices(decl, parts):
            step = max(1, _CHUNK_BYTES * part.shape[0] // max(1, part.nbytes))
            for lo in range(0, part.shape[0], step):
                some = _rows(part, lo, lo + step)
                if isinstance(some, QuantisedArray):
                    source, kind = some.blocks, some.kind if as_blocks else ""
                else:
                    source, kind = some, ""
                values = np.ascontiguousarray(source) if kind else as_bits(as_array(some))
                yield _Rows(decl, name, expert, first + lo, values, kind, source)


def _ahead(pieces: Iterator[T]) -> Generator[T, None, None]:
    """``pieces``, of which the next one is made in a thread while the caller uses one."""
    with ThreadPoolExecutor(1, "truffula-weights") as thread:
        following = thread.submit(next, pieces, None)
        while (piece := following.result()) is not None:
            following = thread.submit(next, pieces, None)
            yield piece


def _matrices(decl: WeightDecl, parts: Sequence[Part]) -> Iterator[tuple[str, int, int, Part]]:
    """The matrices of the parts: tensor name, expert, first row, values."""
    if len(decl.shape) == 3:
        names = [part.name for part in decl.parts for _ in range(1 if part.expert is not None else decl.shape[0])]
        yield from ((name, *matrix) for name, matrix in zip(names, expert_matrices(decl, parts), strict=True))
        return
    # A pull that does not read a checkpoint may return the parts as one array.
    names = [part.name for part in decl.parts] if len(parts) == len(decl.parts) else [decl.name for _ in parts]
    first = 0
    for name, part in zip(names, parts, strict=True):
        yield name, 0, first, part
        first += part.shape[0]


def _rows(part: Part, lo: int, hi: int) -> Array | QuantisedArray:
    if isinstance(part, QuantisedArray):
        return part.rows(lo, hi)
    return part.read(lo, hi) if isinstance(part, ComputedArray) else part[lo:hi]


def as_bits(array: Array) -> Array:
    """A contiguous array, bfloat16 as uint16 bits: what the binding accepts."""
    array = np.ascontiguousarray(array)
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array
