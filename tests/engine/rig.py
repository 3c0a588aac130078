"""An engine over the hash model with a clock and a loader in the test's hands, checked after every step."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from hash_model import HashModel
from invariants import check_engine

from grammars import VOCAB, VOCABULARY
from truffula.engine.blocks import BlockTable
from truffula.engine.budget import MemoryBudget
from truffula.engine.engine import Engine
from truffula.engine.limits import EngineLimits
from truffula.engine.sequence import Sequence
from truffula.errors import AdapterLoadError, ErrorInfo
from truffula.items import Grammar
from truffula.kernels.adapters import SiteTensors, low_rank
from truffula.kernels.backend import Executable
from truffula.kernels.inputs import Capacity
from truffula.lora.compose import compose
from truffula.lora.image import NO_FACTS, AdapterFacts, ImageWriter
from truffula.lora.pool import AdapterPool
from truffula.lora.worker import LoadResponse
from truffula.params import EngineParams
from truffula.types import MAX_ADAPTERS, AdapterRef, EngineRequest, TokenEvent, WeightedAdapter

EOS = VOCAB - 1
STATES = -1
DEPTHS = [1, 2]
"""Steps that may be unfinished: what holds with one holds with two."""


INVOCATION = (5, 6)
FACTS = {
    "call": AdapterFacts(invocation=INVOCATION),
    "call2": AdapterFacts(invocation=INVOCATION),
    "fewer": AdapterFacts(vocab_size=VOCAB - 40),
    "later": AdapterFacts(invocation=(15,)),
    "prefix": AdapterFacts(virtual_ids=tuple(range(VOCAB, VOCAB + 6)), kv_ops=(0,)),
    "soft": AdapterFacts(virtual_ids=tuple(range(VOCAB, VOCAB + 5))),
}
"""Of the adapters that are not plain, by their locators: activated, with fewer ids, with virtual tokens."""


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class StubAdapter:
    """An adapter of ``nbytes`` arbitrary bytes: the hash model uses its generation only."""

    generation: str
    nbytes: int = 64
    rank: int = 1
    facts: AdapterFacts = NO_FACTS

    @property
    def sites(self) -> list[SiteTensors]:
        ballast = np.zeros((1, max(1, self.nbytes // 4)), np.float32)
        return [low_rank(0, ballast, np.zeros((1, 1), np.float32), 1.0)]


class HandLoader:
    """A ``LoadingWorker`` without processes, whose loads end when the test says. ``automatic``: on the next poll.

    The generation is locator and fingerprint, so a source has the same adapter in every test; a locator in
    ``same_bytes`` has that of another. Locators and fingerprints that begin with ``bad`` fail.
    """

    def __init__(self, *, automatic: bool = True, nbytes: int = 64) -> None:
        self.automatic = automatic
        self.nbytes = nbytes
        self.started: list[str] = []
        self.same_bytes: dict[str, str] = {}
        self._next = 0
        self._paused = False
        self._queued: dict[int, AdapterRef] = {}
        self._open: dict[int, AdapterRef] = {}
        self._done: list[LoadResponse] = []
        self._folder = Path(tempfile.mkdtemp(prefix="truffula-rig-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def start(self, ref: AdapterRef, has: str = "") -> int:
        self._next += 1
        self._queued[self._next] = ref
        self._begin()
        return self._next

    def _begin(self) -> None:
        while self._queued and not self._paused:
            ticket = next(iter(self._queued))
            self._open[ticket] = self._queued.pop(ticket)
            self.started.append(self._open[ticket].locator)

    def finish(self, locators: Iterable[str] | None = None) -> None:
        for ticket, ref in list(self._open.items()):
            if locators is None or ref.locator in locators:
                del self._open[ticket]
                self._done.append(self._result(ticket, ref))

    def poll(self, *, paused: bool = False) -> list[LoadResponse]:
        self._paused = paused
        self._begin()
        if self.automatic:
            self.finish()
        done, self._done = self._done, []
        return done

    def poll_fds(self) -> dict[int, int]:
        return {}

    def poll_timeout(self) -> float | None:
        return 0.001 if self._open or self._queued else None

    def cancel(self, ticket: int) -> None:
        self._queued.pop(ticket, None)
        self._open.pop(ticket, None)

    def close(self) -> None:
        self._queued.clear()
        self._open.clear()

    def _result(self, ticket: int, ref: AdapterRef) -> LoadResponse:
        if ref.locator.startswith("bad") or ref.fingerprint.startswith("bad"):
            return LoadResponse(ticket=ticket, error=ErrorInfo(code=AdapterLoadError.code, message="scripted"))
        locator = self.same_bytes.get(ref.locator, ref.locator)
        stub = StubAdapter(
            f"{locator}@{ref.fingerprint}", self.nbytes, facts=FACTS.get(locator, NO_FACTS),
        )  # fmt: skip
        path = self._folder / str(ticket)
        prefix = None
        if stub.facts.kv_ops:
            shape = 1, 2, len(stub.facts.virtual_ids), 1
            prefix = np.random.default_rng(len(stub.generation)).random(shape).astype(np.float32)
        writer = ImageWriter(stub.generation, stub.rank, stub.sites, facts=stub.facts, prefix=prefix)
        writer.write(path)
        return LoadResponse(ticket=ticket, image_path=str(path), image=writer.header)


def limits(**changes) -> EngineLimits:
    usual = EngineLimits(
        max_model_len=128, step_tokens=32, step_logit_rows=32, max_running=8, max_waiting=1000, block_size=4,
        num_blocks=200, prefix_cache=True, vocab_size=VOCAB, eos_token_ids=(EOS,),
    )  # fmt: skip
    return replace(usual, **changes)


def capacity_of(lim: EngineLimits) -> Capacity:
    return Capacity(
        max_tokens=lim.step_tokens, max_seqs=lim.max_running, max_logit_rows=lim.step_logit_rows,
        max_segments=lim.max_running * MAX_ADAPTERS, num_blocks=lim.num_blocks, block_size=lim.block_size,
        max_blocks_per_seq=-(-lim.max_model_len // lim.block_size), num_states=lim.num_states,
    )  # fmt: skip


@dataclass
class Answer:
    """What the events of one request came to."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list | None = None
    final: TokenEvent | None = None
    steps: list[int] = field(default_factory=list)  # in which steps its tokens came

    @property
    def finish_reason(self) -> str | None:
        return self.final.finish_reason if self.final else None

    @property
    def code(self) -> str | None:
        return self.final.error.code if self.final and self.final.error else None


class Rig:
    """``Engine`` with everything in reach. ``step`` checks every owner and the promises about events."""

    def __init__(
        self, lim: EngineLimits | None = None, *, executable: Executable | None = None, budget_bytes: int = 1 << 30,
        loader: HandLoader | None = None, seed: int = 0, depth: int = 1,
    ) -> None:  # fmt: skip
        self.limits = lim or limits()
        self.clock = Clock()
        self.loader = loader or HandLoader()
        self.budget = MemoryBudget(budget_bytes)
        self.executable = executable or HashModel(
            capacity_of(self.limits), self.limits.vocab_size, windows=self.limits.kv_windows, seed=seed, depth=depth
        )
        self.adapters = AdapterPool(self.executable, self.loader, self.budget, self.clock, failure_ttl_s=10.0)
        self.engine = Engine(self.executable, self.limits, self.adapters, self.budget, clock=self.clock)
        self.engine.set_vocabulary(VOCABULARY)
        self.answers: dict[str, Answer] = {}
        self.steps = 0
        self.hold_grammars = False
        """Whether steps begin before the grammars of their requests are compiled."""

    def add(self, request: EngineRequest) -> None:
        self.answers.setdefault(request.request_id, Answer())
        self.engine.add(request)

    def running(self) -> list[Sequence]:
        return list(self.engine._scheduler._running)

    def waiting(self) -> list[Sequence]:
        return list(self.engine._scheduler._waiting)

    def check_unfinished(self) -> None:
        """Each block and state row that an unfinished step uses is held by the sequence it was planned for, or kept for
        that step."""
        running = self.engine._scheduler._running
        for plan, _ in self.engine._submitted:
            kept = [held for step, holdings in running._unfinished.items() if step >= plan.step for held in holdings]
            layout = self.engine._blocks.layout
            blocks = {block for held in kept for block in refs(held.table)}
            for chunk in plan.chunks:
                sequence = running.at(chunk.seq_slot)
                assert sequence is not None or chunk.seq_slot in {held.seq_slot for held in kept}
                own = set() if sequence is None else refs(sequence.table)
                for group, table in enumerate(chunk.block_tables):
                    read = table[layout.first_block(group, chunk.start) :].tolist()
                    assert {(group, block) for block in read} <= own | blocks, "a block in use was released"
                used = {(STATES, row) for _, *rows in chunk.spans for row in rows if row}
                assert used <= own | blocks, "a state row in use was released"

    def step(self) -> list[TokenEvent]:
        self.steps += 1
        self.clock.now += 0.001
        if not self.hold_grammars:
            wait(self.engine._grammars._pending.values())
        events = self.engine.step()
        check_engine(self.engine)
        self.check_unfinished()
        for event in events:
            answer = self.answers[event.request_id]
            assert answer.final is None, f"an event after the final one of {event.request_id}"
            answer.token_ids += event.token_ids
            answer.logprobs += event.logprobs
            answer.top_logprobs += event.top_logprobs
            if event.prompt_logprobs is not None:
                assert answer.prompt_logprobs is None, "prompt logprobs came twice"
                answer.prompt_logprobs = event.prompt_logprobs
            if event.token_ids:
                answer.steps.append(self.steps)
            if event.finish_reason is not None:
                answer.final = event
        return events

    def drain(self, most: int = 5000) -> None:
        """Steps until every request has its final event."""
        for _ in range(most):
            if self.engine.idle():
                return
            self.step()
        raise AssertionError(f"no end after {most} steps: {self.engine.stats()}")

    def run(self, requests: Iterable[EngineRequest]) -> dict[str, Answer]:
        """Run all of them to their ends; then nothing may be left."""
        for request in requests:
            self.add(request)
        self.drain()
        self.assert_clean()
        return self.answers

    def assert_clean(self) -> None:
        """No block in use, no lease, no sequence."""
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0), stats
        assert stats.free_blocks + stats.cached_blocks == stats.num_blocks - len(self.limits.kv_windows)
        assert all(state.leases == 0 for state in self.adapters.states())
        assert not any(any(group.refs) for group in self.engine._blocks.store.groups)
        check_engine(self.engine)


def refs(table: BlockTable) -> set[tuple[int, int]]:
    """The blocks and state rows that a table references, with their groups."""
    blocks = {(group, block) for group in range(len(table.ids)) for block in table.held(group)}
    return blocks | {(STATES, row) for row in (table.states.held() if table.states else ())}


def composed(weights: dict[str, float], fingerprints: Mapping[str, object] = MappingProxyType({})) -> AdapterRef | None:
    """The weighted sum of the loader's adapters by locator."""
    refs = {name: AdapterRef(name=name, locator=name, fingerprint=str(fingerprints.get(name, ""))) for name in weights}
    return compose(WeightedAdapter(refs[name], weight) for name, weight in weights.items())


def request(
    name: str, prompt: list[int], *, adapter: str | AdapterRef | None = None, choice: int = 0,
    resume_ids: list[int] | None = None, grammar: Grammar | None = None, salt: str = "",
    queue_deadline: float | None = None, deadline: float | None = None, arrival: float = 0.0, tenant: str = "",
    weight: float = 1.0, **params,
) -> EngineRequest:  # fmt: skip
    ref = AdapterRef(name=adapter, locator=adapter) if isinstance(adapter, str) else adapter
    return EngineRequest(
        request_id=name, prompt_ids=prompt, params=EngineParams(**{"temperature": 0.0, **params}), choice=choice,
        adapter=ref, resume_ids=resume_ids or [], grammar=grammar, salt=salt, queue_deadline=queue_deadline,
        deadline=deadline, arrival=arrival, tenant=tenant, weight=weight,
    )  # fmt: skip


def alone(req: EngineRequest, *, seed: int = 0, **changes) -> Answer:
    """What ``req`` answers with the engine to itself, in one chunk, without a prefix cache."""
    settings = {"step_tokens": 512, "step_logit_rows": 512, "prefix_cache": False, "num_blocks": 200, **changes}
    return Rig(limits(**settings), seed=seed).run([req])[req.request_id]
