"""A limit on tensor shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence


def fits_an_array(shape: Sequence[int], itemsize: int) -> bool:
    """Whether numpy can make an array of ``shape``. An array without elements must not exceed the limit either."""
    return math.prod(max(size, 1) for size in shape) * itemsize < 2**63
