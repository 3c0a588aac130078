"""The whole parity matrix, row by row (an hour on two cores). ``make parity`` prints it."""

from __future__ import annotations

import pytest
from parity_matrix import Row, rows


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(), ids=lambda row: row.label)
def test_parity(row: Row) -> None:
    failed = [f"{name}: {why}" for name, why in row.run() if why]
    assert not failed, "\n".join(failed)
