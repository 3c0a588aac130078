"""How a matrix is held: the native formats, and which one its parts, the dtype and the options give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from truffula.kernels.program import WeightDecl

LANES = 16
PLANNED_RANK = 256
"""Of all adapters of a row at one op: so wide a product with A is in the memory plan; an adapter pays for more."""
F32, BF16, Q8_0, Q4_0, Q4_1, Q5_0 = range(6)
"""Storage formats, as kernels.h numbers them."""
NAMES = ("float32", "bfloat16", "q8_0", "q4_0", "q4_1", "q5_0")
BLOCK = 32
BLOCK_KINDS: Mapping[str, int] = MappingProxyType({"Q8_0": Q8_0, "Q4_0": Q4_0, "Q4_1": Q4_1, "Q5_0": Q5_0})
"""Stored types that are held as they are."""
_SYMMETRIC = frozenset({"Q8_0", "Q4_0", "Q5_0"})
_LINES = MappingProxyType({Q8_0: 8, Q4_0: 4, Q4_1: 4, Q5_0: 5})


@dataclass(frozen=True)
class Wanted:
    """The model's dtype; ``quantize`` as ``EngineConfig`` has it; ``blocks`` False: compute on dequantised values."""

    dtype: str
    quantize: str = "none"
    blocks: bool = True


def panels_of(outputs: int, half: int = 0) -> int:
    """Panels of 16 outputs; gates and ups are padded apart."""
    return 2 * -(-half // LANES) if half else -(-outputs // LANES)


def panel_bytes(fmt: int, inputs: int) -> int:
    if fmt in _LINES:
        blocks = inputs // BLOCK
        return 64 * (blocks * _LINES[fmt] + (blocks if fmt == Q4_1 else (blocks + 1) // 2))
    return 64 * (inputs if fmt == F32 else (inputs + 1) // 2)


def matrix_format(stored: set[str], wanted: Wanted, decl: WeightDecl, *, exact: bool, panels: bool) -> int:
    """How a matrix is held whose parts are stored as ``stored`` (dtypes, or kinds of blocks).

    Whole blocks are kept without loss where one format holds all parts: Q4_0 and Q5_0 are Q8_0 with small numbers, so
    these three may be mixed. ``exact`` matrices and tables that are only gathered are never quantised.
    """
    if panels and not exact and decl.shape[1] % BLOCK == 0:
        if wanted.blocks and len(stored) == 1 and stored <= BLOCK_KINDS.keys():
            return BLOCK_KINDS[next(iter(stored))]
        if wanted.blocks and stored <= _SYMMETRIC:
            return Q8_0
        if wanted.quantize == "q8_0":
            return Q8_0
    if wanted.dtype == "bfloat16" and not exact:
        return BF16
    return BF16 if stored == {"bfloat16"} else F32


def keeps_blocks(fmt: int, stored: set[str], wanted: Wanted, decl: WeightDecl, *, exact: bool, panels: bool) -> bool:
    """Whether a matrix held in ``fmt`` (what ``matrix_format`` gave) is the file's blocks, none of them rounded."""
    if fmt <= BF16 or not stored <= BLOCK_KINDS.keys():
        return False
    unrounded = Wanted(wanted.dtype, blocks=wanted.blocks)
    return fmt == matrix_format(stored, unrounded, decl, exact=exact, panels=panels)
