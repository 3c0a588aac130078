"""WaitingQueues: the waiting sequences by tenant and adapter. It begins loads of adapters and binds loaded ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice, takewhile

from truffula.engine.limits import EngineLimits
from truffula.engine.sequence import Sequence, TurnKey
from truffula.errors import AdapterLoadError, ErrorInfo
from truffula.lora.pool import AdapterPool

PREFETCH_WINDOW = 4
"""Adapters looked at in a step for those that are loaded already, as a multiple of ``prefetch_adapters``."""
MAX_OVERTAKING = 16
"""How many sequences of a queue are looked at for one that need not wait for a running prompt."""


class WaitingQueues:
    """First in, first out within a queue: the sequences of one tenant for one adapter (or for the base). A preempted
    sequence returns by age, that is to the front.

    A sequence is *ready* when it does not wait for an adapter, else *unbound*. No method costs more for a longer queue.
    """

    def __init__(self, limits: EngineLimits, adapters: AdapterPool) -> None:
        self._limits = limits
        self._adapters = adapters
        self._queues: dict[TurnKey, OrderedDict[int, Sequence]] = {}
        self._ready: dict[TurnKey, Sequence] = {}  # heads that are ready
        self._unbound: OrderedDict[TurnKey, int] = OrderedDict()  # number of unbound sequences
        self._loading: dict[TurnKey, float] = {}  # queues of unbound sequences that are loading, since when
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue.values()

    def ready_heads(self) -> list[Sequence]:
        """The first sequence of each queue that could run now if there were room."""
        return list(self._ready.values())

    def ready_head(self, key: TurnKey) -> Sequence | None:
        return self._ready.get(key)

    def num_ready(self) -> int:
        return len(self._ready)

    def candidates(self, key: TurnKey) -> list[Sequence]:
        """The sequences of ``key`` that could run now if there were room, as many as may overtake each other."""
        if key not in self._ready:
            return []
        return [sequence for sequence in self._first(key, MAX_OVERTAKING) if sequence.ready]

    def _first(self, key: TurnKey, count: int) -> list[Sequence]:
        return list(islice(self._queues[key].values(), count))

    def push(self, sequence: Sequence) -> None:
        queue = self._queues.setdefault(sequence.key, OrderedDict())
        newest = next(reversed(queue), 0)
        queue[sequence.serial] = sequence
        if newest > sequence.serial:
            older = list(takewhile(lambda serial: serial < sequence.serial, queue))
            for serial in (sequence.serial, *reversed(older)):
                queue.move_to_end(serial, last=False)
        self._count += 1
        if not sequence.ready:
            self._unbound[sequence.key] = self._unbound.get(sequence.key, 0) + 1
        self._update_head(sequence.key)

    def remove(self, sequence: Sequence) -> None:
        del self._queues[sequence.key][sequence.serial]
        self._count -= 1
        if not sequence.ready:
            self._count_bound(sequence.key)
        self._update_head(sequence.key)
        if not self._queues[sequence.key]:
            del self._queues[sequence.key]

    def _count_bound(self, key: TurnKey) -> None:
        self._unbound[key] -= 1
        if not self._unbound[key]:
            del self._unbound[key]
            self._loading.pop(key, None)

    def _update_head(self, key: TurnKey) -> None:
        head = next(iter(self._queues[key].values()), None)
        if head is not None and head.ready:
            self._ready[key] = head
        else:
            self._ready.pop(key, None)

    # Adapters

    def num_loading(self) -> int:
        """Sequences whose adapter is loading."""
        return sum(self._unbound[key] for key in self._loading)

    def unbound_names(self, most: int) -> list[str]:
        """Names of the first ``most`` adapters that have unbound sequences."""
        refs = [next(iter(self._queues[key].values())).request.adapter for key in islice(self._unbound, most)]
        return list(dict.fromkeys(ref.name for ref in refs if ref is not None))

    def is_loading(self, sequence: Sequence) -> bool:
        return not sequence.ready and sequence.key in self._loading

    def load_time(self, sequence: Sequence, now: float) -> float:
        """Seconds that its adapter was loading while it waited."""
        if not self.is_loading(sequence):
            return sequence.load_s
        return max(0.0, now - max(self._loading[sequence.key], sequence.arrival))

    def prefetch_adapters(self, now: float) -> list[tuple[Sequence, ErrorInfo]]:
        """Begin loads of adapters before their turn, and bind loaded ones, so that one slow load delays only its own
        requests. Returns the sequences whose adapter did not load, with the error.

        At most ``prefetch_adapters`` load for waiting requests at a time, and no more loads begin while as many
        adapters could run now. Adapters that are loaded are not counted.
        """
        most, loading = self._limits.prefetch_adapters, 0
        failed: list[tuple[Sequence, ErrorInfo]] = []
        for key in list(islice(self._unbound, PREFETCH_WINDOW * most)):
            unbound = [one for one in self._first(key, self._limits.max_running) if not one.ready]
            if not unbound:  # they wait behind a full window of sequences that are ready
                continue
            ref = unbound[0].request.adapter
            assert ref is not None
            enough = loading >= most or self.num_ready() >= most
            if enough and key not in self._loading and not self._adapters.is_loaded(ref):
                self._unbound.move_to_end(key)
                continue
            found = self._adapters.lookup(ref, now)
            if found.status == "loading":
                loading += 1
                self._loading.setdefault(key, now)
            elif found.generation is not None:
                for sequence in unbound:
                    self._bind(sequence, found.generation, now)
                self._loading.pop(key, None)
            else:
                error = found.error or AdapterLoadError(f"Adapter {ref.name!r} did not load.").info()
                failed += [(one, error) for one in self._queues[key].values() if not one.ready]
        return failed

    def _bind(self, sequence: Sequence, generation: str, now: float) -> None:
        sequence.load_s = self.load_time(sequence, now)
        # From now on this request uses these bytes, even if the adapter's files change.
        sequence.loaded_lease = self._adapters.retain(generation)
        sequence.generation = generation
        self._count_bound(sequence.key)
        self._update_head(sequence.key)
