"""How many examples a property is tried on: what finds a fault in a usual run, and more of them with ``--explore``."""

from __future__ import annotations

from hypothesis import settings


def examples(usual: int, explored: int) -> int:
    """``explored`` in a run that looks for new examples (``--explore``), else ``usual``."""
    return usual if settings.default.derandomize else explored
