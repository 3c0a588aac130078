"""One step's budget: what it can hold, and what of that has been given to whom."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepCapacity:
    """What one step of the executable can hold: T tokens, R logit rows, N sequences, G adapters."""

    tokens: int
    rows: int
    sequences: int
    segments: int


@dataclass
class Grants:
    """By serial, what this step has given; ``tokens`` and ``rows`` are left. ``rows_of`` may be more than is needed."""

    tokens: int
    rows: int
    count_of: dict[int, int] = field(default_factory=dict)
    rows_of: dict[int, int] = field(default_factory=dict)
    preempted: bool = False
    refusals: int = 0

    def set(self, serial: int, count: int, rows: int) -> int:
        """Raise a sequence's grant to ``count`` tokens and ``rows`` rows; returns how many tokens that added."""
        added = count - self.count_of.get(serial, 0)
        self.tokens -= added
        self.rows -= rows - self.rows_of.get(serial, 0)
        self.count_of[serial], self.rows_of[serial] = count, rows
        return added

    def drop(self, serial: int) -> None:
        self.tokens += self.count_of.pop(serial, 0)
        self.rows += self.rows_of.pop(serial, 0)
