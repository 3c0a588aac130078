"""Submissions: whatever the order of adds, ends and aborts, each sequence is submitted or dropped, exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from truffula.params import EngineParams
from truffula.service.submissions import Submissions
from truffula.types import EngineRequest

RUNNING, WAITING = 2, 4
PLACES, SHARE = 6, 2


class Holder:
    """Holds the sequences that it was given until the test ends them, in any order."""

    info = SimpleNamespace(max_running=RUNNING, max_waiting=WAITING)

    def __init__(self) -> None:
        self.held: list[str] = []
        self.submitted: list[str] = []
        self.aborted: set[str] = set()

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self.held += [one.request_id for one in requests]
        self.submitted += [one.request_id for one in requests]

    def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted |= set(request_ids)


def request(request_id: str) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_ids=[1], params=EngineParams())


def call_of(request_id: str) -> str:
    return request_id.partition("-")[0]


class SubmissionsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.client = Holder()
        self.submissions = Submissions(self.client)  # type: ignore[arg-type]
        self.added: list[str] = []
        self.dropped: list[str] = []
        self.calls = 0

    def waiting(self) -> list[str]:
        gone = {*self.client.submitted, *self.dropped}
        return [one for one in self.added if one not in gone]

    @rule(count=st.integers(1, 9))
    def add(self, count: int) -> None:
        self.calls += 1
        ids = [f"{self.calls}-{n}" for n in range(count)]
        self.added += ids
        self.submissions.add([request(one) for one in ids])

    @precondition(lambda self: self.client.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        ended = data.draw(st.lists(st.sampled_from(self.client.held), min_size=1, unique=True))
        waiting, held = self.waiting(), Counter(map(call_of, self.client.held))
        self.client.held = [one for one in self.client.held if one not in ended]
        before = len(self.client.submitted)
        self.submissions.ended(ended)
        self.check_turns(waiting, held - Counter(map(call_of, ended)), self.client.submitted[before:])

    def check_turns(self, waiting: list[str], held: Counter[str], submitted: list[str]) -> None:
        """No call got a second new place while one below its share, which waited, got none."""
        got = Counter(map(call_of, submitted))
        if max(got.values(), default=0) < 2:
            return
        left_out = {call for call in map(call_of, waiting) if not got[call] and held[call] < SHARE}
        assert not left_out, (got, left_out)

    @precondition(lambda self: self.client.held or self.waiting())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from([*self.client.held, *self.waiting()]), min_size=1, unique=True))
        held = set(self.client.held)
        dropped = self.submissions.abort(ids)
        assert set(dropped) == set(ids) - held
        assert set(ids) & held <= self.client.aborted
        self.dropped += dropped

    @invariant()
    def no_place_is_free_while_a_call_below_its_share_waits(self) -> None:
        held = Counter(map(call_of, self.client.held))
        assert len(self.client.held) == PLACES - self.submissions.free <= PLACES
        assert max(held.values(), default=0) <= SHARE
        able = [one for one in self.waiting() if held[call_of(one)] < SHARE]
        assert not self.submissions.free or not able, able

    @invariant()
    def none_is_submitted_twice_or_after_it_was_dropped(self) -> None:
        assert max(Counter([*self.client.submitted, *self.dropped]).values(), default=1) == 1

    def teardown(self) -> None:
        while self.client.held:
            self.submissions.ended([self.client.held.pop(0)])
        assert sorted(self.client.submitted + self.dropped) == sorted(self.added)


TestSubmissions = SubmissionsMachine.TestCase
TestSubmissions.settings = settings(max_examples=150, stateful_step_count=25)
