"""The native storage formats, and the choice of a matrix's format by its parts, the dtype and the options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from truffula.kernels.program import WeightDecl

LANES = 16
PLANNED_RANK = 256
"""The memory plan counts products with A of this rank per row and op; the budget charges an adapter for more."""
F32, BF16, Q8_0, Q4_0, Q4_1, Q5_0 = range(6)
"""Storage formats, as kernels.h numbers them."""
NAMES = ("float32", "bfloat16", "q8_0", "q4_0", "q4_1", "q5_0")
BLOCK = 32
BLOCK_KINDS: Mapping[str, int] = MappingProxyType({"Q8_0": Q8_0, "Q4_0": Q4_0, "Q4_1": Q4_1, "Q5_0": Q5_0})
"""Stored types that are packed without a change of their values."""
_SYMMETRIC = frozenset({"Q8_0", "Q4_0", "Q5_0"})
_LINES = MappingProxyType({Q8_0: 8, Q4_0: 4, Q4_1: 4, Q5_0: 5})


@dataclass(frozen=True)
class WeightOptions:
    """The model's dtype, and ``quantize`` of ``EngineConfig``. ``blocks`` False: compute on dequantised values."""

    dtype: str
    quantize: str = "none"
    blocks: bool = True


def panels_of(outputs: int, half: int = 0) -> int:
    """Panels of 16 outputs; gates and ups are padded separately."""
    return 2 * -(-half // LANES) if half else -(-outputs // LANES)


def panel_bytes(fmt: int, inputs: int) -> int:
    if fmt in _LINES:
        blocks = inputs // BLOCK
        return 64 * (blocks * _LINES[fmt] + (blocks if fmt == Q4_1 else (blocks + 1) // 2))
    return 64 * (inputs if fmt == F32 else (inputs + 1) // 2)


def matrix_format(stored: set[str], options: WeightOptions, decl: WeightDecl, *, exact: bool, panels: bool) -> int:
    """The format of a matrix whose parts are stored as ``stored`` (dtypes, or kinds of blocks).

    Blocks are kept without loss where one format can hold all parts: the values of Q4_0 and Q5_0 fit Q8_0, so these
    three may be mixed. ``exact`` matrices and tables that are only gathered are never quantised.
    """
    if panels and not exact and decl.shape[1] % BLOCK == 0:
        if options.blocks and len(stored) == 1 and stored <= BLOCK_KINDS.keys():
            return BLOCK_KINDS[next(iter(stored))]
        if options.blocks and stored <= _SYMMETRIC:
            return Q8_0
        if options.quantize == "q8_0":
            return Q8_0
    if options.dtype == "bfloat16" and not exact:
        return BF16
    return BF16 if stored == {"bfloat16"} else F32


def keeps_blocks(
    fmt: int, stored: set[str], options: WeightOptions, decl: WeightDecl, *, exact: bool, panels: bool
) -> bool:
    """Whether a matrix in ``fmt`` (the result of ``matrix_format``) holds the file's blocks without rounding."""
    if fmt <= BF16 or not stored <= BLOCK_KINDS.keys():
        return False
    unrounded = WeightOptions(options.dtype, blocks=options.blocks)
    return fmt == matrix_format(stored, unrounded, decl, exact=exact, panels=panels)
