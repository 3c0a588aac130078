"""What shapes a file may list."""

from __future__ import annotations

import math
from collections.abc import Sequence


def fits_an_array(shape: Sequence[int], itemsize: int) -> bool:
    """Whether numpy makes an array of that shape: the sizes that are not 0 have to be addressable too."""
    return math.prod(max(size, 1) for size in shape) * itemsize < 2**63
