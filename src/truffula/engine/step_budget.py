"""How the tokens of a step are shared: what is left of it, and whose turn it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from truffula.engine.sequence import Sequence, TurnKey


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
    """The order of turns, and their deficits. Tenants take turns, and in those of a tenant its adapters do, the base
    being one of them, so that a tenant's share does not grow with its adapters.

    In a turn an adapter spends a quantum of tokens on its prompts (those running and those waiting); then it moves to
    the back of its tenant, and the tenant to the back of all. A turn that the end of a step interrupts is the first of
    the next one. Tokens it could not spend remain for its next turn, up to one quantum. The quantum of a tenant is
    proportional to its weight, the heaviest one's being ``quantum``. A new adapter is added at the end. Source:
    Shreedhar and Varghese 1995, "Efficient fair queueing using deficit round robin".

    Bound: with T tenants that have tokens to compute, and A adapters of one of these, each of these A has a turn after
    at most T * A turns of others. A turn spends at most two quanta, a step's tokens, so that is after T * A steps,
    where running streams (one token each) leave tokens, and the turn finds a place and memory.
    """

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._deficits: dict[str, dict[TurnKey, int]] = {}  # by tenant; both in the order of turns
        self._quanta: dict[str, int] = {}  # of the tenants in the last order
        self._interrupted: TurnKey | None = None  # whose turn has not ended

    def order(self, keys: Mapping[TurnKey, float]) -> deque[deque[TurnKey]]:
        """``keys``, all of which have tokens to compute, by tenant and in the order of their turns. Their values are
        the weights of the tenants.
        """
        heaviest, self._quanta = max(keys.values()) or 1.0, {}
        for key, weight in keys.items():
            self._deficits.setdefault(key[0], {}).setdefault(key, 0)
            self._quanta[key[0]] = max(1, round(self._quantum * weight / heaviest))
        order = deque(deque(filter(keys.__contains__, mine)) for mine in self._deficits.values())
        if sum(map(len, self._deficits.values())) > 64 + 2 * len(keys):
            # The others have nothing to compute now: by the algorithm they lose their deficits and their turns.
            kept = {mine[0][0]: {key: self._deficits[key[0]][key] for key in mine} for mine in order if mine}
            self._deficits = kept
        return order

    def begin_turn(self, key: TurnKey) -> int:
        """Begin or continue a turn; returns the tokens it may spend."""
        quantum, mine = self._quanta[key[0]], self._deficits[key[0]]
        if key != self._interrupted:
            mine[key] = min(mine[key] + quantum, 2 * quantum)
        self._interrupted = None
        return mine[key]

    def end_turn(self, key: TurnKey, spent: int, *, interrupted: bool) -> None:
        """End a turn that spent tokens, or, if it has some left, interrupt it. One that could not spend any keeps its
        place.
        """
        left = max(0, self._deficits[key[0]][key] - spent)
        if interrupted and left:
            self._interrupted = key
            self._deficits[key[0]][key] = left
            return
        mine = self._deficits.pop(key[0])
        del mine[key]
        mine[key] = left
        self._deficits[key[0]] = mine
