"""After any interleaving of loads, leases, evictions, reloads and unloads the pool's books agree and nothing leaks."""

from __future__ import annotations

import tempfile
from concurrent.futures import Future
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from lora_bases import pairs
from pool_rig import Rig

from truffula.errors import TruffulaError
from truffula.lora.generations import NO_SLOT
from truffula.lora.pool import AdapterLease
from truffula.types import AdapterRef, AdapterState

NAMES = st.sampled_from(["a", "b", "c"])
LIMIT = 6000  # bytes: two or three of these adapters


class _Kv:
    """The other pool of the budget: blocks in use, and idle ones that may be taken."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.used = 0
        self.idle: list[float] = []
        rig.budget.register_reclaimer("kv", self)

    def oldest(self) -> float | None:
        return self.idle[0] if self.idle else None

    def evict_oldest(self) -> int:
        self.idle.pop(0)
        self.rig.budget.release("kv", 500)
        return 500


class PoolMachine(RuleBasedStateMachine):
    generations: Bundle[str] = Bundle("generations")
    leases: Bundle[AdapterLease] = Bundle("leases")
    retained: Bundle[AdapterLease] = Bundle("retained")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self._folder.name), limit=LIMIT, mapped=2000)
        self.kv = _Kv(self.rig)
        self.refs: dict[str, AdapterRef] = {name: self.rig.ref(name) for name in "abc"}
        self.leased: set[AdapterLease] = set()  # of both kinds
        self.commands: list[Future[list[AdapterState]]] = []
        self.contents: dict[str, bytes] = {}

    @rule(name=NAMES, seed=st.integers(0, 3), rank=st.sampled_from([1, 4, 30]))
    def write(self, name: str, seed: int, rank: int) -> None:
        self.refs[name] = self.rig.write(name, seed, rank)

    @rule(name=NAMES)
    def break_it(self, name: str) -> None:
        path = self.rig.folder / name / "adapter_model.safetensors"
        if path.exists():
            path.write_bytes(path.read_bytes()[:-1])
        self.refs[name] = self.rig.ref(name, "broken")

    @rule(target=generations, name=NAMES)
    def lookup(self, name: str) -> str:
        return self.rig.lookup(self.refs[name]).generation or "not loaded"

    @rule(seconds=st.sampled_from([0.1, 3.0, 20.0]), idle=st.booleans())
    def step(self, seconds: float, idle: bool) -> None:
        self.rig.clock.now += seconds
        before, uploads = self.rig.pool.loads.completed, self.rig.table.num_uploads
        self.rig.pool.poll(self.rig.clock.now, idle=idle)
        assert self.rig.pool.loads.completed <= before + 1 and self.rig.table.num_uploads <= uploads + 1

    @rule(slow=st.booleans())
    def uploads(self, slow: bool) -> None:
        """Uploads take time from now on, or those that were begun have ended."""
        self.rig.table.slow = slow
        self.rig.table.finish()

    @rule(target=leases, generation=generations)
    def acquire(self, generation: str) -> AdapterLease | None:
        try:
            lease = self.rig.pool.acquire(generation)
        except TruffulaError:
            return None
        if lease is not None:
            self.leased.add(lease)
            image = self.rig.table.images[lease.slot]
            held = b"".join(site.a.tobytes() + site.b.tobytes() for site in pairs(image.sites()))
            assert self.contents.setdefault(generation, held) == held
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: AdapterLease | None) -> None:
        if lease is not None:
            self.leased.remove(lease)
            self.rig.pool.release(lease)

    @rule(target=retained, lease=leases)
    def retain(self, lease: AdapterLease | None) -> AdapterLease | None:
        if lease is None:
            return None
        kept = self.rig.pool.retain(lease.generation)
        self.leased.add(kept)
        return kept

    @rule(lease=consumes(retained))
    def release_retained(self, lease: AdapterLease | None) -> None:
        self.release(lease)

    @rule(target=leases, lease=retained)
    def come_back(self, lease: AdapterLease | None) -> AdapterLease | None:
        """A retained generation is always available once there is room, whatever became of its source."""
        resident = self.rig.pool.acquire(lease.generation) if lease is not None else None
        if resident is not None:
            self.leased.add(resident)
        return resident

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        self.rig.unload(self.refs[name])

    @rule(name=NAMES, pinned=st.booleans())
    def load(self, name: str, pinned: bool) -> None:
        self.commands.append(self.rig.command("load", self.refs[name], pinned=pinned))

    @rule()
    def drain(self) -> None:
        """With time, every command is answered and every load ends."""
        self.uploads(slow=False)
        for _ in range(20):
            self.step(20.0, idle=False)
        assert all(command.done() for command in self.commands)

    @rule()
    def use_kv(self) -> None:
        if self.rig.budget.reserve("kv", 500):
            self.kv.used += 1

    @precondition(lambda self: self.kv.used)
    @rule()
    def idle_kv(self) -> None:
        self.kv.used -= 1
        self.kv.idle.append(self.rig.clock.now)

    @invariant()
    def books_agree(self) -> None:
        self.rig.check()
        assert self.rig.budget.used("kv") == 500 * (self.kv.used + len(self.kv.idle))
        for lease in self.leased:
            if lease.slot != NO_SLOT:
                assert self.rig.table.images[lease.slot].generation == lease.generation

    def teardown(self) -> None:
        for lease in self.leased:
            self.rig.pool.release(lease)
        self.rig.table.finish()
        self.rig.pool.close()
        assert all(command.done() for command in self.commands)
        assert self.rig.table.images == {} and self.rig.budget.used("adapters") == 0
        assert not any(folder.exists() for folder in self.rig.loader.staging.folders)
        self._folder.cleanup()


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
