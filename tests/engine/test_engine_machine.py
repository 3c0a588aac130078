"""Any interleaving of add, abort, step, load, reload, unload, deadlines, little memory: nothing leaks, all end once."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from invariants import check_engine
from rig import HandLoader, Rig, alone, composed, limits, request

from grammars import RULES
from truffula.errors import TruffulaError
from truffula.types import AdapterCommand, AdapterRef

SOURCES = ["red", "green", "blue", "bad", "call", "soft"]


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        step_tokens=st.integers(2, 24),
        num_blocks=st.integers(14, 40),
        max_running=st.integers(1, 5),
        room=st.integers(600, 3000),
        max_waiting=st.integers(3, 12),
        block_bytes=st.sampled_from([0, 20]),
        windows=st.sampled_from([(None,), (None, 6), (3, 9), (5,)]),
        num_states=st.sampled_from([0, 0, 6, 12, 40]),
        depth=st.sampled_from([1, 2, 3]),
    )
    def begin(self, step_tokens, num_blocks, max_running, room, max_waiting, block_bytes, windows, num_states, depth):
        lim = limits(
            step_tokens=step_tokens, step_logit_rows=8, num_blocks=num_blocks, max_running=max_running,
            max_waiting=max_waiting, kv_block_bytes=(block_bytes,) * len(windows),
            kv_windows=windows, patience=3, num_states=num_states, state_bytes=2 * block_bytes,
        )  # fmt: skip
        self.rig = Rig(lim, loader=HandLoader(automatic=False, nbytes=200), budget_bytes=room, depth=depth)
        self.requests = {}
        self.fingerprints = dict.fromkeys(SOURCES, 0)
        self.aborted: set[str] = set()

    def ref(self, source: str) -> AdapterRef:
        return AdapterRef(name=source, locator=source, fingerprint=str(self.fingerprints[source]))

    def adapter(self, source) -> AdapterRef | None:
        if isinstance(source, dict):
            return composed(source, self.fingerprints)
        return None if source is None else self.ref(source)

    @rule(
        prompt=st.one_of(
            st.integers(1, 24).map(lambda n: list(range(n))), st.lists(st.integers(0, 5), min_size=0, max_size=20)
        ),
        source=st.sampled_from([None, None, *SOURCES])
        | st.dictionaries(st.sampled_from(SOURCES), st.sampled_from([1.0, -0.5, 0.0]), min_size=1),
        max_tokens=st.one_of(st.none(), st.integers(0, 10)),
        scores=st.one_of(st.none(), st.integers(0, 2)),
        patience=st.sampled_from([None] * 5 + [0.0, 0.3, 1.0]),
        deadline=st.sampled_from([None] * 5 + [0.0, 0.01, 1.0, 2.0]),
        grammar=st.sampled_from([None] * 4 + ["object", "open"]),
    )
    def add(self, prompt, source, max_tokens, scores, patience, deadline, grammar):
        name, now = f"r{len(self.requests)}", self.rig.clock.now
        req = request(
            name, prompt, adapter=self.adapter(source), max_tokens=max_tokens,
            grammar=None if grammar is None else RULES[grammar].grammar, prompt_logprobs=scores,
            queue_deadline=None if patience is None else now + patience,
            deadline=None if deadline is None else now + deadline,
        )  # fmt: skip
        self.requests[name] = req
        self.rig.add(req)
        check_engine(self.rig.engine)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        running = self.rig.answers[name].final is None
        self.rig.engine.abort(name)
        check_engine(self.rig.engine)
        self.rig.step()
        final = self.rig.answers[name].final
        assert final is not None, "an aborted request ends within one step"
        if running and final.finish_reason == "abort":
            self.aborted.add(name)

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.rig.step()

    @rule(ahead=st.integers(1, 3))
    def a_step_fails(self, ahead):
        self.rig.executable.faults.raise_on_step = self.rig.executable.steps + ahead

    @rule(sources=st.sets(st.sampled_from(SOURCES)))
    def loads_end(self, sources):
        self.rig.loader.finish(sources)

    @rule(source=st.sampled_from(SOURCES))
    def adapter_changes(self, source):
        self.fingerprints[source] += 1

    @rule(source=st.sampled_from(SOURCES), action=st.sampled_from(["load", "pin", "unload", "list"]))
    def command(self, source, action):
        pinned, action = action == "pin", "load" if action == "pin" else action
        try:
            self.rig.engine.command(AdapterCommand(action=action, ref=self.ref(source), pinned=pinned))
        except TruffulaError as error:
            assert (error.code, action) == ("adapter_not_found", "unload")
        check_engine(self.rig.engine)

    @rule(seconds=st.floats(0, 0.7))
    def time_passes(self, seconds):
        self.rig.clock.now += seconds

    def teardown(self):
        if not hasattr(self, "rig"):
            return
        self.rig.loader.automatic = True
        self.rig.drain()
        self.rig.assert_clean()
        for name, req in self.requests.items():
            answer = self.rig.answers[name]
            assert answer.final is not None
            assert answer.final.times is not None
            if answer.finish_reason in ("stop", "length"):
                lim = self.rig.limits
                expected = alone(
                    req, max_model_len=lim.max_model_len, kv_windows=lim.kv_windows, num_states=4 * (lim.num_states > 0)
                )
                many = len(answer.token_ids)
                assert answer.token_ids == expected.token_ids[:many]
                # Without max_tokens a request fills what memory there is: less here than alone.
                assert req.params.max_tokens is None or many == len(expected.token_ids)
        self.rig.engine.close()


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestEngineAtLength(EngineMachine.TestCase):
    settings = settings(max_examples=250, stateful_step_count=60, deadline=None)


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
