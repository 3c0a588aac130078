"""The storage types of GGUF by number: the supported ones, and the names of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class TypeSize(NamedTuple):
    """``size`` values take ``nbytes`` bytes."""

    name: str
    size: int
    nbytes: int


SIZES: Mapping[int, TypeSize] = {
    0: TypeSize("F32", 1, 4),
    1: TypeSize("F16", 1, 2),
    2: TypeSize("Q4_0", 32, 18),
    3: TypeSize("Q4_1", 32, 20),
    6: TypeSize("Q5_0", 32, 22),
    7: TypeSize("Q5_1", 32, 24),
    8: TypeSize("Q8_0", 32, 34),
    12: TypeSize("Q4_K", 256, 144),
    13: TypeSize("Q5_K", 256, 176),
    14: TypeSize("Q6_K", 256, 210),
    30: TypeSize("BF16", 1, 2),
}
# Types that are not supported; errors use these names.
OTHER_TYPES: Mapping[int, str] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
