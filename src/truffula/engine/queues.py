"""WaitingQueues: the waiting sequences by tenant and adapter. It begins loads of adapters and binds loaded ones."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice, takewhile

from truffula.engine.limits import EngineLimits, check_vocabulary, most_tokens
from truffula.engine.sequence import Sequence, TurnKey, sources_of
from truffula.errors import ErrorInfo, InvalidRequest, TruffulaError
from truffula.lora.loads import SourceState
from truffula.lora.locations import origin_of
from truffula.lora.pool import AdapterPool

PREFETCH_WINDOW = 4
"""Adapters looked at in a step beside those that load, as a multiple of ``prefetch_adapters``."""
MAX_OVERTAKING = 16
"""How many sequences of a queue are looked at for one that need not wait for a running prompt."""


class WaitingQueues:
    """First in, first out within a queue: the sequences of one tenant for one adapter (or for the base). A preempted
    sequence returns by age, that is to the front. ``longest`` returns how many tokens fit in memory when a sequence
    runs alone.

    A sequence is *ready* when it does not wait for an adapter, else *unbound*. No method costs more for a longer queue.
    """

    def __init__(self, limits: EngineLimits, adapters: AdapterPool, longest: Callable[[], int]) -> None:
        self._limits = limits
        self._adapters = adapters
        self._longest = longest
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
        """Names of the first ``most`` adapters that have unbound sequences, but for private ones."""
        refs = [next(iter(self._queues[key].values())).request.adapter for key in islice(self._unbound, most)]
        acting = [part.ref for ref in refs if ref is not None for part in ref.acting]
        return list(dict.fromkeys(ref.name for ref in acting if not ref.private))

    def is_loading(self, sequence: Sequence) -> bool:
        return not sequence.ready and sequence.key in self._loading

    def load_time(self, sequence: Sequence, now: float) -> float:
        """Seconds that its adapter was loading while it waited."""
        if not self.is_loading(sequence):
            return sequence.load_s
        return max(0.0, now - max(self._loading[sequence.key], sequence.arrival))

    def prefetch_adapters(self, now: float) -> list[tuple[Sequence, ErrorInfo | None]]:
        """Begin loads of adapters before their turn, and bind loaded ones, so that one slow load delays only its own
        requests. Returns the sequences that end: their adapters did not load, or cannot act together, or leave no room
        behind their virtual tokens, with the error; or nothing is left to compute of them, with None.

        At most ``prefetch_adapters`` of one origin (this machine, a host, a bucket) load for waiting requests at a
        time, so that a slow one does not keep the others from loading, and no more loads begin while as many adapters
        could run now. Adapters that are loaded are not counted.
        """
        most, loading = self._limits.prefetch_adapters, Counter[str]()
        ended: list[tuple[Sequence, ErrorInfo | None]] = []
        others = (key for key in self._unbound if key not in self._loading)
        for key in [*self._loading, *islice(others, PREFETCH_WINDOW * most)]:
            unbound = [one for one in self._first(key, self._limits.max_running) if not one.ready]
            if not unbound:  # they wait behind a full window of sequences that are ready
                continue
            # Without those that all of them have a lease on: such a source may have been unloaded meanwhile.
            lacking = [source for source in key[1] if any(source not in one.loaded_leases for one in unbound)]
            refs = {source: ref for source, ref in sources_of(unbound[0]).items() if source in lacking}
            enough = max(loading[origin_of(ref)] for ref in refs.values()) >= most or self.num_ready() >= most
            if enough and key not in self._loading and not all(map(self._adapters.is_loaded, refs.values())):
                self._unbound.move_to_end(key)
                continue
            found = {source: self._adapters.lookup(ref, now) for source, ref in refs.items()}
            failed = next(
                ((source, status.error) for source, status in found.items() if status.error is not None), None
            )
            if failed is not None:
                source, error = failed
                ended += [(one, error) for one in self._queues[key].values() if source not in one.loaded_leases]
                continue
            for source, status in found.items():
                if status.generation is not None:
                    self._bind(unbound, source, status.generation, now)
            ended += [end for one in unbound if one.ready for end in self._end_of_bound(one)]
            if any(status.status == "loading" for status in found.values()):
                loading.update(
                    origin_of(refs[source]) for source, status in found.items() if status.status == "loading"
                )
                self._loading.setdefault(key, now)
            else:
                self._loading.pop(key, None)
        return ended

    def _bind(self, sequences: list[Sequence], source: SourceState, generation: str, now: float) -> None:
        """Give ``sequences`` a lease on one of their adapters: from now on they use these bytes, even if the adapter's
        files change.
        """
        for sequence in sequences:
            if source in sequence.loaded_leases:
                continue
            load_s = self.load_time(sequence, now)
            sequence.bind_adapter(source, self._adapters.retain(generation))
            if sequence.ready:
                sequence.load_s = load_s
                self._count_bound(sequence.key)
                self._update_head(sequence.key)

    def _end_of_bound(self, sequence: Sequence) -> list[tuple[Sequence, ErrorInfo | None]]:
        """The end of ``sequence``, whose adapters are bound now, if it cannot begin: see ``prefetch_adapters``."""
        if (error := self._not_summable(sequence)) is not None:
            return [(sequence, error)]
        lease = sequence.virtual_lease
        try:
            own = max((one.facts.vocab_size for one in sequence.acting_leases.values()), default=0)
            if own or self._limits.more_ids:
                check_vocabulary(sequence.request, own or self._limits.base_ids)
            if own:
                sequence.take_vocabulary(own)
            if lease is None:
                return []
            total = most_tokens(sequence.request, self._limits, self._longest(), len(lease.facts.virtual_ids))
        except TruffulaError as refusal:
            return [(sequence, refusal.info())]
        sequence.prepend(lease, total)
        return [] if sequence.ended_before_start() is None else [(sequence, None)]

    def _not_summable(self, sequence: Sequence) -> ErrorInfo | None:
        """Why the adapters of ``sequence``, which are bound, cannot act together or weighted; None where they can."""
        if len(sequence.adapters) == 1 and sequence.adapters[0].weight == 1.0:
            return None
        leases, refs = sequence.acting_leases, sources_of(sequence)
        for source, lease in leases.items():
            if lease.facts.virtual_ids:
                return InvalidRequest(
                    f"Adapter {refs[source].name!r} puts virtual tokens before the prompt, so it cannot be weighted or "
                    "added to another adapter. Name it alone.",
                    param="adapters",
                    adapter=refs[source].name,
                ).info()
        sizes = {lease.facts.vocab_size: refs[source].name for source, lease in leases.items()}
        if len(sizes) > 1:
            name, size = sizes[max(sizes)], max(sizes)
            return InvalidRequest(
                f"Adapter {name!r} has a vocabulary of its own, of {size} tokens, and acts only beside adapters "
                "with the same. Name it alone.", param="adapters", adapter=name,
            ).info()  # fmt: skip
        return None
