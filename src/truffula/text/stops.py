"""Stop strings, found across token borders, without ever letting out text that could become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class StopMatch:
    """``text[start:end]`` of all text fed so far is ``stop``."""

    stop: str
    start: int
    end: int


class StopMatcher:
    """Feed text in any pieces; the match is the one that is complete first, and of those the longest.

    So the answer doesn't depend on how the text is cut: with the stops ``b`` and ``abc``, ``abc`` matches ``b``.
    ``holding`` counts the characters at the end of the text that are the beginning of some stop; what lies before them
    is safe to show.

    One Knuth-Morris-Pratt automaton per stop: O(1) amortised per character and stop, however long the stops are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # Longest first, so that of two stops ending at the same character the longer is met first.
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._firsts = {stop[0] for stop in self._stops}
        self._states = [0] * len(self._stops)
        self._fed = 0
        self.holding = 0

    def feed(self, text: str) -> StopMatch | None:
        """Take ``text``; the first complete stop, or None. After a match the matcher is spent."""
        if not self.holding and not any(first in text for first in self._firsts):
            self._fed += len(text)  # the common case, without a loop over characters
            return None
        states, stops, borders = self._states, self._stops, self._borders
        for at, char in enumerate(text):
            for index, stop in enumerate(stops):
                state, border = states[index], borders[index]
                while state and stop[state] != char:
                    state = border[state - 1]
                if stop[state] == char:
                    state += 1
                if state == len(stop):
                    end = self._fed + at + 1
                    return StopMatch(stop, end - len(stop), end)
                states[index] = state
        self._fed += len(text)
        self.holding = max(states)
        return None


@lru_cache(maxsize=64)
def _borders(stop: str) -> tuple[int, ...]:
    """For each prefix of ``stop``, the length of its longest proper border. Computed once for all choices and prompts
    of a request.
    """
    table = [0] * len(stop)
    length = 0
    for at in range(1, len(stop)):
        while length and stop[length] != stop[at]:
            length = table[length - 1]
        if stop[length] == stop[at]:
            length += 1
        table[at] = length
    return tuple(table)
