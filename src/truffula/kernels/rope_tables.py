"""Rotary tables, and how they depend on the length of a sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeTable:
    """``inv_freq`` float32 values as Python floats, one per rotated pair; cos and sin are multiplied by ``factor``.

    Rows whose length L (``StepInputs.rope_length``) is above ``border`` (0: none) use ``long_freq`` (longrope). Without
    it the base grows with L (dynamic): the frequency of pair i is divided by
    (growth * L / border - (growth - 1)) ** (i / (pairs - 1)).
    """

    id: int
    inv_freq: tuple[float, ...]
    factor: float = 1.0
    border: int = 0
    long_freq: tuple[float, ...] = ()
    growth: float = 0.0


@dataclass(frozen=True)
class RopeRegime:
    """How the rotary tables depend on the length of a sequence, above ``border`` tokens.

    ``grows`` False (longrope): a sequence that grows beyond the border changes to the other table, and its keys are
    computed again. True (dynamic): the base grows with the length, and keys stay as they were written.
    """

    border: int
    grows: bool

    def length(self, num_prompt: int, num_tokens: int) -> int:
        """``StepInputs.rope_length`` of a sequence of ``num_tokens`` tokens."""
        return num_prompt if self.grows else max(num_prompt, num_tokens)

    def key(self, length: int) -> int:
        """What cached keys depend on besides their tokens: equal for lengths that have one table."""
        if length <= self.border:
            return 0
        return length if self.grows else 1
