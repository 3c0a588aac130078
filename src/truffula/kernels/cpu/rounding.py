"""What ``quantize`` would lose, worked out without loading: relative RMS error by kind of site. Needs no compiled
code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from truffula.errors import KernelError
from truffula.kernels.backend import PullWeight, QuantisedArray
from truffula.kernels.cpu.formats import BLOCK, BLOCK_KINDS, Q8_0, Wanted, keeps_blocks, matrix_format
from truffula.kernels.cpu.weights import chunks, roles
from truffula.kernels.mapped import release
from truffula.kernels.program import Linear, Program, WeightDecl

Array = npt.NDArray[Any]
_WANTED = Wanted("float32", "q8_0")


@dataclass
class Lost:
    """Of the tensors of one kind: how many, ``error`` their relative RMS error together, the worst by name."""

    tensors: int = 0
    squares: float = 0.0
    lost: float = 0.0
    worst: str = ""
    worst_error: float = 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self.lost / self.squares) if self.squares else 0.0

    def add(self, name: str, squares: float, lost: float) -> None:
        self.tensors += 1
        self.squares += squares
        self.lost += lost
        error = math.sqrt(lost / squares) if squares else 0.0
        if error >= self.worst_error:
            self.worst, self.worst_error = name, error


@dataclass
class Rounding:
    """``kinds`` by what a site is called (``q``, ``down``, ``head``), in the order of the program; ``kept`` matrices
    stay as they are: blocks already, looked up in only, asked for in float32, or of a width that is not whole blocks.
    """

    kinds: dict[str, Lost] = field(default_factory=dict)
    kept: int = 0

    @property
    def all(self) -> Lost:
        """Of all kinds together."""
        worst = max(self.kinds.values(), key=lambda kind: kind.worst_error, default=Lost())
        sums = (sum(getattr(kind, name) for kind in self.kinds.values()) for name in ("tensors", "squares", "lost"))
        tensors, squares, lost = sums
        return Lost(int(tensors), squares, lost, worst.worst, worst.worst_error)


def rounding_errors(
    program: Program, pull: PullWeight, stored_types: Mapping[str, str], tell: Callable[[int], None] = lambda _: None
) -> Rounding:
    """What ``quantize=q8_0`` would lose of ``program``'s weights; reads those that it would round, one at a time.

    Args:
        stored_types: How each part is stored, by its name (``ModelPlan``).
        tell: Told of the bytes read since it was told last.

    Raises:
        KernelError: A block's scale is beyond float16: loading would refuse it too.
    """
    made = Rounding()
    for decl, role in zip(program.weights, roles(program), strict=True):
        if len(decl.shape) == 1:
            continue
        types = (stored_types.get(part.name, "") for part in decl.parts)
        stored = {kind if kind in BLOCK_KINDS else "float32" for kind in types}
        given: dict[str, Any] = {"exact": role.exact, "panels": role.kind == "panels"}
        fmt = matrix_format(stored, _WANTED, decl, **given)
        if fmt != Q8_0 or keeps_blocks(fmt, stored, _WANTED, decl, **given):
            made.kept += 1
            continue
        sums: dict[tuple[str, str], list[float]] = {}
        for key, squares, lost, nbytes in _losses(program, decl, pull):
            at = sums.setdefault(key, [0.0, 0.0])
            at[0], at[1] = at[0] + squares, at[1] + lost
            tell(nbytes)
        for (kind, name), (squares, lost) in sums.items():
            made.kinds.setdefault(kind, Lost()).add(name, squares, lost)
    return made


def _losses(
    program: Program, decl: WeightDecl, pull: PullWeight
) -> Iterator[tuple[tuple[str, str], float, float, int]]:
    """((kind, tensor), sum of squares, of what rounding loses of it, bytes read), some rows at a time."""
    slices = _kinds(program, decl)
    first = 0
    for part, source in zip(pull(decl), decl.parts, strict=True):
        for lo, hi in chunks(part):
            some = part.rows(lo, hi) if isinstance(part, QuantisedArray) else part[lo:hi]
            values = some.dequantise() if isinstance(some, QuantisedArray) else some.astype(np.float32)
            for begin, end, kind in slices:
                rows = values[max(begin - first - lo, 0) : max(end - first - lo, 0)]
                if len(rows):
                    yield (kind, source.name), *q8_0_loss(rows, source.name), int(some.nbytes * len(rows) / len(values))
            release(some.blocks if isinstance(some, QuantisedArray) else some)
        first += part.shape[0]


def _kinds(program: Program, decl: WeightDecl) -> list[tuple[int, int, str]]:
    """Rows of a weight and what they are called."""
    for op in program.ops:
        if isinstance(op, Linear) and op.weight == decl.id and op.slices:
            return [(s.lo, s.hi, _short(program.sites[s.site].module)) for s in op.slices]
    return [(0, decl.shape[0], "head")]


def _short(module: str) -> str:
    return module.rpartition(".")[2].removesuffix("_proj")


def q8_0_loss(values: Array, name: str) -> tuple[float, float]:
    """Sums of squares of float32 ``[rows, width]`` and of what rounding to Q8_0 takes from it, as ggml rounds: the
    numbers by the scale before that is rounded to float16, halves away from zero.

    Raises:
        KernelError: A scale is beyond float16; names ``name``.
    """
    blocks = values.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        by = np.where(scale > 0, np.float32(1) / scale, np.float32(0)).astype(np.float32)
        stored = scale.astype(np.float16).astype(np.float32)
    if not np.isfinite(stored).all():
        raise KernelError(f"{name} has a block whose Q8_0 scale is beyond float16, so --quantize q8_0 cannot be used.")
    scaled = blocks * np.where(np.isfinite(by), by, np.float32(0))  # so small that nothing is stored of it
    whole = np.trunc(scaled)
    whole += np.where(np.abs(scaled - whole) >= 0.5, np.copysign(np.float32(1), scaled), np.float32(0))
    off = (blocks - whole * stored).ravel().astype(np.float64)
    flat = blocks.ravel().astype(np.float64)
    return float(flat @ flat), float(off @ off)
