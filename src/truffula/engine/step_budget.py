"""How the tokens of a step are shared: what is left of it, and whose turn it is."""

from __future__ import annotations

from collections.abc import Collection

from truffula.engine.sequence import AdapterKey, Sequence


class StepBudget:
    """The tokens and rows of logits that are left of a step, and the number of tokens granted to each sequence."""

    def __init__(self, tokens: int, rows: int) -> None:
        self.tokens = tokens
        self.rows = rows
        self.counts: dict[Sequence, int] = {}
        self.preempted = False
        self.refusals = 0
        self.admitted = 0
        """Tokens of the sequences admitted so far."""

    def grant(self, sequence: Sequence, count: int) -> int:
        """Raise a grant to ``count`` tokens; returns how many tokens that added."""
        have = self.counts.get(sequence, 0)
        self.tokens -= count - have
        self.rows -= reserved_rows(sequence, count) - reserved_rows(sequence, have)
        self.counts[sequence] = count
        return count - have

    def revoke(self, sequence: Sequence) -> None:
        have = self.counts.pop(sequence, 0)
        self.tokens += have
        self.rows += reserved_rows(sequence, have)


def reserved_rows(sequence: Sequence, count: int) -> int:
    """Rows of logits to reserve for a grant: each sequence may need one for a draw."""
    return max(1, sequence.rows(count)) if count else 0


class DeficitRoundRobin:
    """The order of the adapters' turns, the base being one of them, and their deficits.

    An adapter has a turn to spend a quantum of tokens on its prompts (those running and those waiting), and then moves
    to the back. Tokens it could not spend remain for its next turn, up to one quantum. A new adapter is added at the
    end. Source: Shreedhar and Varghese 1995, "Efficient fair queueing using deficit round robin".
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._deficits: dict[AdapterKey, int] = {}  # in the order of turns

    def order(self, keys: Collection[AdapterKey]) -> list[AdapterKey]:
        """``keys``, all of which have tokens to compute, in the order of their turns."""
        for key in keys:
            self._deficits.setdefault(key, 0)
        order = [key for key in self._deficits if key in keys]
        if len(self._deficits) > 64 + 2 * len(keys):
            # The others have nothing to compute now: by the algorithm they lose their deficits and their turns.
            self._deficits = {key: self._deficits[key] for key in order}
        return order

    def begin_turn(self, key: AdapterKey) -> int:
        """Begin a turn; returns the tokens it may spend."""
        self._deficits[key] = min(self._deficits[key] + self._quantum, 2 * self._quantum)
        return self._deficits[key]

    def end_turn(self, key: AdapterKey, spent: int) -> None:
        """End a turn that spent tokens; one that could not spend any keeps its place, the first of the next step."""
        self._deficits[key] = max(0, self._deficits.pop(key) - spent)
