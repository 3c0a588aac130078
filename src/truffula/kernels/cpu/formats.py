"""Chooses the native storage format of a matrix by its parts, the dtype and the options."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

INT8_KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0")
"""Stored types that are packed without a change of their values, into the format of the same name in lower case, and
multiplied in int8."""
FLOAT_KINDS = ("FP8_128", "FP8_32", "NF4", "FP4_16")
"""Likewise, multiplied as floats: activations are not rounded."""
BLOCK_KINDS = (*INT8_KINDS, *FLOAT_KINDS)
_SYMMETRIC = frozenset({"Q8_0", "Q4_0", "Q5_0"})


@dataclass(frozen=True)
class WeightOptions:
    """The model's dtype, and ``quantize`` of ``EngineConfig``. ``blocks`` False: compute on dequantised values."""

    dtype: str
    quantize: str = "none"
    blocks: bool = True

    def matrix_format(self, stored: Set[str], *, exact: bool, quantisable: bool) -> tuple[str, bool]:
        """The format of a matrix whose parts are stored as ``stored`` (dtypes, or kinds of blocks), and whether it
        holds the file's blocks as they are.

        Blocks are kept where one format can hold all parts: the values of Q4_0 and Q5_0 fit Q8_0, so these three may
        be mixed. ``exact`` matrices are in float32, or in bfloat16 where the file has them so.
        """
        if quantisable:
            if self.blocks and len(stored) == 1 and stored <= set(BLOCK_KINDS):
                return next(iter(stored)).lower(), True
            if self.blocks and stored <= _SYMMETRIC:
                return "q8_0", True
            if self.quantize == "q8_0":
                return "q8_0", False
        if (self.dtype == "bfloat16" and not exact) or stored == {"bfloat16"}:
            return "bfloat16", False
        return "float32", False
