"""A spread of the parity matrix. ``make parity`` runs and prints the whole: an hour on two cores."""

from __future__ import annotations

import pytest
from parity_matrix import Row, rows


@pytest.mark.slow
@pytest.mark.parametrize("row", rows()[::16], ids=lambda row: row.label)
def test_parity(row: Row) -> None:
    failed = [f"{name}: {why}" for name, why in row.run() if why]
    assert not failed, "\n".join(failed)
