"""Waiting sequences by adapter, and whose turn it is: deficit round robin over adapters, the base being one of them.

An adapter at the front is given a quantum of tokens to spend on its prompts (those running and those waiting), and then
goes to the back; what it could not spend it keeps for its next turn, up to one quantum. One with nothing to do leaves
the ring. Source: Shreedhar and Varghese 1995, "Efficient fair queueing using deficit round robin".
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from truffula.engine.sequence import AdapterKey, Sequence


class WaitingQueues:
    """First in, first out within an adapter; preempted sequences go back by age, that is to the front."""

    def __init__(self) -> None:
        self._queues: dict[AdapterKey, deque[Sequence]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def adapters(self) -> Iterator[AdapterKey]:
        """Those somebody waits for, longest wanted first."""
        return iter(self._queues)

    def of(self, key: AdapterKey) -> deque[Sequence]:
        """The queue of ``key``, to read."""
        return self._queues.get(key) or deque()

    def head(self, key: AdapterKey) -> Sequence | None:
        queue = self._queues.get(key)
        return queue[0] if queue else None

    def push(self, sequence: Sequence) -> None:
        queue = self._queues.setdefault(sequence.key, deque())
        place = len(queue)
        while place and queue[place - 1].serial > sequence.serial:
            place -= 1
        queue.insert(place, sequence)
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.key]
        if queue[0] is sequence:
            queue.popleft()
        else:
            queue.remove(sequence)
        self._count -= 1
        if not queue:
            del self._queues[sequence.key]

    def check(self) -> None:
        assert self._count == sum(len(queue) for queue in self._queues.values())
        for key, queue in self._queues.items():
            assert queue and all(sequence.key == key for sequence in queue)
            serials = [sequence.serial for sequence in queue]
            assert serials == sorted(set(serials)), "a queue is out of order"


class Turns:
    """The ring of adapters that want prompt tokens, and their deficits."""

    def __init__(self, quantum: int) -> None:
        self.quantum = quantum
        self._ring: OrderedDict[AdapterKey, int] = OrderedDict()

    def join(self, key: AdapterKey) -> None:
        """At the back, unless it is in the ring already."""
        self._ring.setdefault(key, 0)

    def keep_only(self, keys: set[AdapterKey]) -> None:
        for key in [key for key in self._ring if key not in keys]:
            del self._ring[key]

    def order(self) -> list[AdapterKey]:
        return list(self._ring)

    def begin(self, key: AdapterKey) -> int:
        """Its turn: what it may spend now."""
        self._ring[key] = min(self._ring[key] + self.quantum, 2 * self.quantum)
        return self._ring[key]

    def end(self, key: AdapterKey, spent: int) -> None:
        self._ring[key] = max(0, self._ring[key] - spent)
        self._ring.move_to_end(key)
