"""Adapter commands through the loop of an engine: a load is answered for what it was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from rig import HandLoader, Rig, request

from truffula.engine.journal import Reply
from truffula.engine.loop import LOAD_POLL_S, ROOM_PATIENCE_S, EngineLoop, outcome
from truffula.errors import TruffulaError
from truffula.types import AdapterCommand, AdapterRef, AdapterState


@dataclass(frozen=True)
class Answer:
    ticket: int
    states: list[AdapterState]
    error: TruffulaError | None


class Loop:
    """An ``EngineLoop`` on a rig's engine; ``load`` turns it until the command is answered."""

    def __init__(self, **options: object) -> None:
        self.rig = Rig(**options)  # type: ignore[arg-type]
        self.loop = EngineLoop(self.rig.engine, self.rig.clock)
        self._open: list[tuple[int, Reply]] = []

    def command(self, ticket: int, command: AdapterCommand) -> None:
        self._open.append((ticket, self.loop.command(command)))

    def turns(self, count: int) -> list[Answer]:
        """The answers to the commands that have ended after so many turns."""
        for _ in range(count):
            self.rig.clock.now += 0.01
            self.loop.turn()
        self.rig.engine.check()
        done = [pending for pending in self._open if pending[1].done()]
        self._open = [pending for pending in self._open if pending not in done]
        return [Answer(ticket, *outcome(reply)) for ticket, reply in done]

    def load(self, ref: AdapterRef) -> Answer:
        self.command(1, AdapterCommand(action="load", ref=ref))
        (answer,) = self.turns(5)
        return answer


def ref(locator: str = "a", fingerprint: str = "1", kind: str = "local") -> AdapterRef:
    return AdapterRef(name="pirate", kind=kind, locator=locator, fingerprint=fingerprint)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("broken", "mended"),
    [(ref("a", "bad"), ref("a", "2")), (ref("bad-place"), ref("b"))],
    ids=["the same folder, written again", "another folder under the same name"],
)
def test_a_mended_adapter_loads_at_once(broken: AdapterRef, mended: AdapterRef) -> None:
    loop = Loop()
    assert loop.load(broken).error is not None
    answer = loop.load(mended)
    assert answer.error is None and [s.status for s in answer.states] == ["resident"]


def test_an_explicit_load_of_a_broken_one_reads_it_again() -> None:
    """What lies on the Hub has no fingerprint: only a fresh look tells that it was mended."""
    loader = HandLoader()
    loop = Loop(loader=loader)
    for _ in range(2):
        assert loop.load(ref("bad/hub", "", "hub")).error is not None
    assert loader.started == ["bad/hub"] * 2


def test_a_load_whose_adapter_is_unloaded_meanwhile_says_so() -> None:
    loop = Loop(loader=HandLoader(automatic=False))
    loop.command(1, AdapterCommand(action="load", ref=ref()))
    assert loop.turns(2) == []
    loop.command(2, AdapterCommand(action="unload", ref=ref()))
    answers = {answer.ticket: answer for answer in loop.turns(2)}
    assert answers[2].error is None
    assert answers[1].error is not None and answers[1].error.code == "adapter_not_found"


ROOM = 24 << 10  # for one of the adapters below and some blocks


def crowded() -> Loop:
    """An engine with room for one adapter, which a running request uses."""
    loop = Loop(loader=HandLoader(nbytes=16 << 10), budget_bytes=ROOM)
    busy = AdapterRef(name="busy", locator="busy", fingerprint="1")
    loop.rig.add(request("r", [1, 2, 3], adapter=busy, max_tokens=100, ignore_eos=True))
    loop.turns(5)
    assert loop.rig.engine.stats().running == 1
    return loop


def test_a_load_waits_until_there_is_room() -> None:
    loop = crowded()
    loop.command(1, AdapterCommand(action="load", ref=ref()))
    assert loop.turns(5) == []
    loop.loop.abort(["r"])
    (answer,) = loop.turns(3)
    assert answer.error is None and [s.status for s in answer.states] == ["resident"]


def test_a_load_that_waits_for_room_is_kept_from_other_loads() -> None:
    """Several steps go by between two looks at a load command: what it read is not dropped for others meanwhile."""
    loop = crowded()
    loop.command(1, AdapterCommand(action="load", ref=ref()))
    loop.turns(3)
    other = AdapterRef(name="other", locator="other", fingerprint="1")
    loop.rig.add(request("s", [1, 2], adapter=other, max_tokens=1))
    for _ in range(30):
        loop.rig.clock.now += LOAD_POLL_S / 7
        loop.loop.turn()
    assert loop.rig.loader.started == ["busy", "a"]
    loop.loop.abort(["r"])
    (answer,) = loop.turns(5)
    assert answer.error is None and [s.status for s in answer.states] == ["resident"]
    loop.turns(20)
    assert loop.rig.engine.idle() and loop.rig.adapters.check() is None


def test_an_adapter_whose_request_left_holds_up_nobodys_load() -> None:
    loop = crowded()
    for name in ("gone", "here"):
        place = AdapterRef(name=name, locator=name, fingerprint="1")
        loop.rig.add(request(name, [1, 2], adapter=place, max_tokens=1))
        loop.turns(3)
    assert loop.rig.loader.started == ["busy", "gone"]
    loop.loop.abort(["gone"])
    loop.turns(2)
    assert loop.rig.loader.started == ["busy", "gone", "here"]


def test_a_load_without_room_is_an_error_in_the_end() -> None:
    loop = crowded()
    loop.command(1, AdapterCommand(action="load", ref=ref()))
    assert loop.turns(5) == []
    loop.rig.clock.now += ROOM_PATIENCE_S
    (answer,) = loop.turns(1)
    assert answer.error is not None and answer.error.code == "insufficient_memory"


def test_a_load_without_room_for_it_in_an_idle_engine_is_an_error_at_once() -> None:
    loop = Loop(loader=HandLoader(nbytes=16 << 10), budget_bytes=ROOM)
    pinned = AdapterCommand(action="load", ref=AdapterRef(name="pinned", locator="p", fingerprint="1"), pinned=True)
    loop.command(1, pinned)
    assert [answer.error for answer in loop.turns(3)] == [None]
    answer = loop.load(ref())
    assert answer.error is not None and answer.error.code == "insufficient_memory"


def test_loads_asked_for_under_one_ticket_are_all_answered() -> None:
    """As after an engine's death, when nobody waits for its pinned adapters: none may stay claimed for ever."""
    loop = Loop()
    for place in ("a", "b"):
        loop.command(0, AdapterCommand(action="load", ref=ref(place), pinned=True))
    answers = loop.turns(5)
    assert [answer.ticket for answer in answers] == [0, 0]
    assert all(answer.error is None for answer in answers)
