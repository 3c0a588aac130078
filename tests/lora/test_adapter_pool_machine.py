"""After any interleaving of loads, leases, evictions, reloads and unloads the pool's books agree and nothing leaks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from lora_bases import pairs
from pool_rig import Rig

from truffula.errors import TruffulaError
from truffula.lora.leases import AdapterLease
from truffula.types import AdapterRef

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
    holds: Bundle[str] = Bundle("holds")
    claims: Bundle[AdapterRef] = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self._folder.name), limit=LIMIT, spare=2000)
        self.kv = _Kv(self.rig)
        self.refs: dict[str, AdapterRef] = {name: self.rig.ref(name) for name in "abc"}
        self.leased: dict[int, AdapterLease] = {}
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
    def want(self, name: str) -> str:
        want = self.rig.want(self.refs[name])
        return want.generation or "not loaded"

    @rule(seconds=st.sampled_from([0.1, 3.0, 20.0]))
    def step(self, seconds: float) -> None:
        self.rig.clock.now += seconds
        self.rig.pool.poll(self.rig.clock.now)

    @rule(target=leases, generation=generations)
    def acquire(self, generation: str) -> AdapterLease | None:
        try:
            lease = self.rig.pool.acquire(generation)
        except TruffulaError:
            return None
        if lease is not None:
            self.leased[lease.id] = lease
            image = self.rig.table.images[lease.slot]
            held = b"".join(site.a.tobytes() + site.b.tobytes() for site in pairs(image.sites()))
            assert self.contents.setdefault(generation, held) == held
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: AdapterLease | None) -> None:
        if lease is not None:
            del self.leased[lease.id]
            self.rig.pool.release(lease)

    @rule(target=holds, lease=leases)
    def hold(self, lease: AdapterLease | None) -> str:
        if lease is None or lease.id not in self.leased:
            return ""
        self.rig.pool.hold(lease.generation)
        return lease.generation

    @rule(generation=consumes(holds))
    def let_go(self, generation: str) -> None:
        if generation:
            self.rig.pool.let_go(generation)

    @rule(target=leases, generation=holds)
    def come_back(self, generation: str) -> AdapterLease | None:
        """A held generation is always obtainable once there is room, whatever became of its source."""
        lease = self.rig.pool.acquire(generation) if generation else None
        if lease is not None:
            self.leased[lease.id] = lease
        return lease

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        self.rig.pool.unload(name)

    @rule(name=NAMES)
    def pin(self, name: str) -> None:
        self.rig.pool.pin(self.refs[name])

    @rule(target=claims, name=NAMES)
    def claim(self, name: str) -> AdapterRef:
        self.rig.pool.claim(self.refs[name])
        return self.refs[name]

    @rule(ref=consumes(claims))
    def disclaim(self, ref: AdapterRef) -> None:
        self.rig.pool.disclaim(ref)

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
        for lease in self.leased.values():
            assert self.rig.table.images[lease.slot].generation == lease.generation

    def teardown(self) -> None:
        for lease in self.leased.values():
            self.rig.pool.release(lease)
        self.rig.pool.close()
        assert self.rig.table.images == {} and self.rig.budget.used("adapters") == 0
        assert not any(folder.exists() for folder in self.rig.spool.folders)
        self._folder.cleanup()


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
