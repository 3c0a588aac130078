"""A JSON reply is the fold of the same deltas that a stream shows."""

from __future__ import annotations

from collections.abc import Iterable

from truffula.types import Completion, TextDelta


def collect(deltas: Iterable[TextDelta]) -> Completion:
    """Every delta of one request, in order (choices may interleave), as one answer."""
    raise NotImplementedError
