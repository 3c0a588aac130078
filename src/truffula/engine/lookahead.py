"""Look-ahead: adapters of waiting requests are loaded before their turn comes, and not many at a time."""

from __future__ import annotations

from itertools import islice

from truffula.engine.roster import Roster
from truffula.engine.sequence import AdapterKey
from truffula.errors import AdapterLoadError
from truffula.lora.pool import AdapterPool

PEEKS = 4
"""How many times ``most`` adapters are looked at in a step, to find those that are loaded already."""


class LookAhead:
    """Gives waiting sequences their generation. One adapter that loads slowly delays nobody else's.

    At most ``most`` adapters load for waiting requests at a time, and no more are begun while ``most`` adapters could
    be served at once; adapters that are here already are not counted. ``window``: of one adapter's queue, how many
    sequences are looked at in a step.
    """

    def __init__(self, roster: Roster, adapters: AdapterPool, most: int, window: int) -> None:
        self._roster = roster
        self._adapters = adapters
        self._most = most
        self._window = window

    def look(self, now: float) -> None:
        waiting = self._roster.waiting
        loading = 0
        for key in waiting.unfixed(PEEKS * self._most):
            first = next(sequence for sequence in waiting.of(key) if not sequence.ready)
            assert first.request.adapter is not None
            enough = loading >= self._most or waiting.num_ready() >= self._most
            if enough and first.loading_since is None and not self._adapters.here(first.request.adapter):
                waiting.look_later(key)
            elif self._ask(key, now):
                loading += 1

    def _ask(self, key: AdapterKey, now: float) -> bool:
        """Ask the pool for one adapter; True while it loads."""
        waiting = self._roster.waiting
        unfixed = [s for s in islice(waiting.of(key), self._window) if not s.ready]
        if not unfixed:  # they stand behind a full window of sequences that are ready
            return False
        ref = unfixed[0].request.adapter
        assert ref is not None
        want = self._adapters.want(ref, now)
        if want.status == "loading":
            for sequence in unfixed:
                sequence.loading_since = now if sequence.loading_since is None else sequence.loading_since
            return True
        if want.status == "ready" and want.generation is not None:
            for sequence in unfixed:
                self._roster.fix_generation(sequence, want.generation, now)
            return False
        error = want.error or AdapterLoadError(f"Adapter {ref.name!r} did not load.").info()
        for sequence in [s for s in waiting.of(key) if not s.ready]:
            self._roster.finish(sequence, "error", now, error=error)
        return False
