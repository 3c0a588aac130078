"""Waiting sequences by adapter, and deficit round robin over adapters, the base being one of them.

An adapter has a turn to spend a quantum of tokens on its prompts (those running and those waiting), and then moves to
the back. Tokens it could not spend remain for its next turn, up to one quantum.
Source: Shreedhar and Varghese 1995, "Efficient fair queueing using deficit round robin".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import islice, takewhile

from truffula.engine.sequence import AdapterKey, Sequence


class WaitingQueues:
    """First in, first out within an adapter; a preempted sequence returns by age, that is to the front.

    ``num_loading`` counts the sequences whose adapter is loading. No method costs more for a longer queue.
    """

    def __init__(self) -> None:
        self._queues: dict[AdapterKey, OrderedDict[int, Sequence]] = {}
        self._ready: dict[AdapterKey, Sequence] = {}  # heads that do not wait for an adapter
        self._unbound: OrderedDict[AdapterKey, int] = OrderedDict()  # number of sequences without a generation
        self._count = 0
        self.num_loading = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue.values()

    def first(self, key: AdapterKey, count: int) -> list[Sequence]:
        """The first ``count`` sequences of ``key``."""
        return list(islice(self._queues[key].values(), count)) if key in self._queues else []

    def ready_heads(self) -> list[Sequence]:
        """The first sequence of each adapter (and of the base) that could run now if there were room."""
        return list(self._ready.values())

    def ready_head(self, key: AdapterKey) -> Sequence | None:
        return self._ready.get(key)

    def num_ready(self) -> int:
        return len(self._ready)

    def unbound(self, most: int) -> list[AdapterKey]:
        """Up to ``most`` adapters with sequences that have no generation yet, the longest waiting first."""
        return list(islice(self._unbound, most))

    def postpone(self, key: AdapterKey) -> None:
        """Move ``key`` to the end of ``unbound``."""
        self._unbound.move_to_end(key)

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
            self._count_bound(sequence)
        self._update_head(sequence.key)
        if not self._queues[sequence.key]:
            del self._queues[sequence.key]

    def mark_loading(self, sequence: Sequence, now: float) -> None:
        """The adapter of ``sequence`` is loading, since ``now`` unless it was before."""
        if sequence.loading_since is None:
            sequence.loading_since = now
            self.num_loading += 1

    def bind(self, sequence: Sequence, generation: str, now: float) -> None:
        """Give ``sequence`` the generation of its adapter, which is loaded."""
        self._count_bound(sequence)
        sequence.generation = generation
        if sequence.loading_since is not None:
            sequence.load_s += now - sequence.loading_since
            sequence.loading_since = None
        self._update_head(sequence.key)

    def _count_bound(self, sequence: Sequence) -> None:
        self._unbound[sequence.key] -= 1
        if not self._unbound[sequence.key]:
            del self._unbound[sequence.key]
        if sequence.loading_since is not None:
            self.num_loading -= 1

    def _update_head(self, key: AdapterKey) -> None:
        head = next(iter(self._queues[key].values()), None)
        if head is not None and head.ready:
            self._ready[key] = head
        else:
            self._ready.pop(key, None)


class DeficitRoundRobin:
    """The order of the adapters' turns, and their deficits. A new adapter is added at the end."""

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
