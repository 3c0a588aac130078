"""The whole parity matrix; ``make parity`` prints it. ``test_architecture_parity.py`` has the spread for every run."""

from __future__ import annotations

import pytest
from parity_matrix import Row, rows


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(), ids=lambda row: row.label)
def test_parity(row: Row) -> None:
    failed = [f"{name}: {why}" for name, why in row.run() if why]
    assert not failed, "\n".join(failed)
