"""``Residency``: the generations whose images are mapped, which of them have a slot, and who gives it up first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from truffula.errors import AdapterLoadError, TruffulaError
from truffula.kernels.backend import AdapterImage
from truffula.lora.generation import Generation
from truffula.lora.leases import Budget, Slots

OWNER = "adapters"


class Residency(Mapping[str, Generation]):
    """Part of the pool, which decides; this keeps slots, the budget's bytes and the lists in step.

    A resident generation has a slot of the executable and its bytes reserved; a *spare* one is mapped only.
    """

    def __init__(self, slots: Slots, budget: Budget) -> None:
        self._slots = slots
        self._budget = budget
        self._entries: dict[str, Generation] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # generations that may be evicted, oldest use first
        self._spare: set[str] = set()  # generations that are mapped but not resident
        self._stamp = 0.0

    def __getitem__(self, generation: str) -> Generation:
        return self._entries[generation]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, image: AdapterImage, now: float) -> None:
        """A mapped image, spare at first."""
        nbytes = image.nbytes + self._slots.adapter_bytes(image)
        self._entries[image.generation] = Generation(image, nbytes, used_at=now)
        self._spare.add(image.generation)

    def enter(self, generation: str) -> bool:
        """Reserve, then hand to the executable; False when the bytes are not to be had.

        Raises what the executable says against it, its bytes given back, as an ``AdapterLoadError`` where it is no
        error of ours.
        """
        entry = self._entries[generation]
        if not self._budget.reserve(OWNER, entry.nbytes):
            return False
        try:
            entry.slot = self._slots.adapter(entry.image)
        except TruffulaError:
            self._budget.release(OWNER, entry.nbytes)
            raise
        except (MemoryError, RuntimeError, ValueError) as error:  # a backend's own words for out of memory
            self._budget.release(OWNER, entry.nbytes)
            raise AdapterLoadError(f"The backend cannot take the adapter: {error}.") from error
        self._spare.discard(generation)
        self.touch(generation, entry.used_at)
        return True

    def leave(self, generation: str) -> None:
        """Give up its slot and bytes, if it has them."""
        entry = self._entries[generation]
        if entry.slot is not None:
            self._slots.drop_adapter(entry.slot)
            entry.slot = None
            self._idle.pop(generation, None)
            self._spare.add(generation)
            self._budget.release(OWNER, entry.nbytes)

    def remove(self, generation: str) -> None:
        """Forget a generation that has left: its image is unmapped with the last reference."""
        self._spare.discard(generation)
        del self._entries[generation]

    def touch(self, generation: str, now: float) -> None:
        """A use: moves the generation to the young end of the idle list, or out of it. Stamps never run backwards."""
        entry = self._entries[generation]
        entry.used_at = self._stamp = max(self._stamp, now)
        self._idle.pop(generation, None)
        if entry.idle:
            self._idle[generation] = None

    def oldest(self) -> str | None:
        """The idle generation that was not used for longest."""
        return next(iter(self._idle), None)

    def spare(self) -> list[str]:
        return list(self._spare)

    @property
    def spare_bytes(self) -> int:
        return sum(self._entries[generation].image.nbytes for generation in self._spare)

    @property
    def resident_bytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values() if entry.slot is not None)

    @property
    def idle_bytes(self) -> int:
        return sum(self._entries[generation].nbytes for generation in self._idle)

    def check(self) -> None:
        """Assert that every number agrees with every other."""
        slots = [entry.slot for entry in self._entries.values() if entry.slot is not None]
        assert len(slots) == len(set(slots)), "two generations in one slot"
        assert self._budget.used(OWNER) == self.resident_bytes, "reserved bytes are not those of resident adapters"
        assert set(self._idle) == {g for g, e in self._entries.items() if e.idle}, "the idle list is wrong"
        assert self._spare == {g for g, e in self._entries.items() if e.slot is None}, "the spare set is wrong"
        stamps = [self._entries[g].used_at for g in self._idle]
        assert stamps == sorted(stamps), "the idle list is out of order"
