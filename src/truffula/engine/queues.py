"""Waiting sequences by adapter, and whose turn it is: deficit round robin over adapters, the base being one of them.

An adapter whose turn it is gets a quantum of tokens to spend on its prompts (those running and those waiting), and then
goes to the back; what it could not spend it keeps for its next turn, up to one quantum. Nothing here costs more a step
for thousands of adapters that wait than for those that can be served.
Source: Shreedhar and Varghese 1995, "Efficient fair queueing using deficit round robin".
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from truffula.engine.sequence import AdapterKey, Sequence


class WaitingQueues:
    """First in, first out within an adapter; preempted sequences go back by age, that is to the front."""

    def __init__(self) -> None:
        self._queues: dict[AdapterKey, deque[Sequence]] = {}
        self._ready: dict[AdapterKey, None] = {}  # whose head waits for no load
        self._unfixed: OrderedDict[AdapterKey, int] = OrderedDict()  # sequences that know no generation yet
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def of(self, key: AdapterKey) -> deque[Sequence]:
        """The queue of ``key``, to read."""
        return self._queues.get(key) or deque()

    def ready(self) -> list[AdapterKey]:
        """Adapters (and the base) whose first waiting sequence could run now if there were room."""
        return list(self._ready)

    def ready_head(self, key: AdapterKey) -> Sequence | None:
        return self._queues[key][0] if key in self._ready else None

    def num_ready(self) -> int:
        return len(self._ready)

    def unfixed(self, most: int) -> list[AdapterKey]:
        """Up to ``most`` adapters that somebody waits for without knowing a generation, longest so first."""
        return [key for key, _ in zip(self._unfixed, range(most), strict=False)]

    def look_later(self, key: AdapterKey) -> None:
        """Name ``key`` last in ``unfixed`` from now on."""
        self._unfixed.move_to_end(key)

    def push(self, sequence: Sequence) -> None:
        key = sequence.key
        queue = self._queues.setdefault(key, deque())
        place = len(queue)
        while place and queue[place - 1].serial > sequence.serial:
            place -= 1
        queue.insert(place, sequence)
        self._count += 1
        if not sequence.ready:
            self._unfixed[key] = self._unfixed.get(key, 0) + 1
        self._judge_head(key)

    def remove(self, sequence: Sequence) -> None:
        key = sequence.key
        queue = self._queues[key]
        if queue[0] is sequence:
            queue.popleft()
        else:
            queue.remove(sequence)
        self._count -= 1
        if not sequence.ready:
            self._one_less(key)
        if not queue:
            del self._queues[key]
        self._judge_head(key)

    def fixed(self, sequence: Sequence) -> None:
        """``sequence``, which waits, was given its generation just now."""
        self._one_less(sequence.key)
        self._judge_head(sequence.key)

    def _one_less(self, key: AdapterKey) -> None:
        self._unfixed[key] -= 1
        if not self._unfixed[key]:
            del self._unfixed[key]

    def _judge_head(self, key: AdapterKey) -> None:
        queue = self._queues.get(key)
        if queue and queue[0].ready:
            self._ready[key] = None
        else:
            self._ready.pop(key, None)

    def check(self) -> None:
        assert self._count == sum(len(queue) for queue in self._queues.values())
        for key, queue in self._queues.items():
            assert queue and all(sequence.key == key for sequence in queue)
            serials = [sequence.serial for sequence in queue]
            assert serials == sorted(set(serials)), "a queue is out of order"
            assert self._unfixed.get(key, 0) == sum(not sequence.ready for sequence in queue)
        assert set(self._ready) == {key for key, queue in self._queues.items() if queue[0].ready}
        assert self._unfixed.keys() <= self._queues.keys()


@dataclass
class _Place:
    since: int
    deficit: int = 0


class Turns:
    """Who was served longest ago, and the deficits. An adapter joins at the back when it first asks."""

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self._places: dict[AdapterKey, _Place] = {}
        self._clock = 0

    def order(self, keys: Iterable[AdapterKey]) -> list[AdapterKey]:
        """``keys``, all of whom want to be served, in the order of their turns."""
        keys = list(keys)
        for key in keys:
            if key not in self._places:
                self._places[key] = self._back()
        if len(self._places) > 64 + 2 * len(keys):
            # The others want nothing now. They lose their deficits, as is right, and their places.
            self._places = {key: self._places[key] for key in keys}
        return sorted(keys, key=lambda key: self._places[key].since)

    def begin(self, key: AdapterKey) -> int:
        """Its turn: the tokens it may spend now."""
        place = self._places[key]
        place.deficit = min(place.deficit + self.quantum, 2 * self.quantum)
        return place.deficit

    def end(self, key: AdapterKey, spent: int) -> None:
        place = self._places[key] = self._back(max(0, self._places[key].deficit - spent))
        assert place.deficit <= 2 * self.quantum

    def _back(self, deficit: int = 0) -> _Place:
        self._clock += 1
        return _Place(self._clock, deficit)
