"""Adapter commands to an engine between its steps: each is answered once, with the state of its own adapter."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import pytest
from invariants import check_engine
from rig import HandLoader, Rig, request

from truffula.engine.journal import outcome
from truffula.errors import TruffulaError
from truffula.lora.pool import ROOM_TIMEOUT_S
from truffula.types import AdapterCommand, AdapterRef, AdapterState


@dataclass(frozen=True)
class Answer:
    states: list[AdapterState]
    error: TruffulaError | None


class Loop:
    """A rig's engine; ``load`` steps it until the command is answered."""

    def __init__(self, **options: object) -> None:
        self.rig = Rig(**options)  # type: ignore[arg-type]
        self.engine = self.rig.engine
        self._open: list[Future[list[AdapterState]]] = []

    def begin(self, ref: AdapterRef, action: str = "load", pinned: bool = False) -> None:
        self._open.append(self.engine.command(AdapterCommand(action=action, ref=ref, pinned=pinned)))  # type: ignore[arg-type]

    def turns(self, count: int) -> list[Answer]:
        """The answers of the commands that are done after some turns."""
        for _ in range(count):
            self.rig.clock.now += 0.01
            self.engine.step()
        check_engine(self.rig.engine)
        done = [command for command in self._open if command.done()]
        self._open = [command for command in self._open if command not in done]
        return [Answer(*outcome(command)) for command in done]

    def load(self, ref: AdapterRef) -> Answer:
        self.begin(ref)
        (answer,) = self.turns(5)
        return answer


def ref(locator: str = "a", fingerprint: str = "1", kind: str = "local") -> AdapterRef:
    return AdapterRef(name="pirate", kind=kind, locator=locator, fingerprint=fingerprint)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("broken", "mended"),
    [(ref("a", "bad"), ref("a", "2")), (ref("bad-source"), ref("b"))],
    ids=["the same folder, written again", "another folder under the same name"],
)
def test_a_mended_adapter_loads_immediately(broken: AdapterRef, mended: AdapterRef) -> None:
    loop = Loop()
    assert loop.load(broken).error is not None
    answer = loop.load(mended)
    assert answer.error is None and [s.status for s in answer.states] == ["resident"]


def test_an_explicit_load_of_a_broken_one_reads_it_again() -> None:
    """An adapter on the Hub has no fingerprint: only another load shows that it was mended."""
    loader = HandLoader()
    loop = Loop(loader=loader)
    for _ in range(2):
        assert loop.load(ref("bad/hub", "", "hub")).error is not None
    assert loader.started == ["bad/hub"] * 2


def test_a_load_whose_adapter_is_unloaded_meanwhile_fails_with_that_reason() -> None:
    loop = Loop(loader=HandLoader(automatic=False))
    loop.begin(ref())
    assert loop.turns(2) == []
    loop.begin(ref(), "unload")
    load, unload = loop.turns(2)
    assert unload.error is None
    assert load.error is not None and load.error.code == "adapter_not_found"


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
    loop.begin(ref())
    assert loop.turns(5) == []
    loop.engine.abort("r")
    (answer,) = loop.turns(3)
    assert answer.error is None and [s.status for s in answer.states] == ["resident"]


def test_a_load_that_waits_for_room_is_kept_from_other_loads() -> None:
    """What it read is not dropped for others meanwhile."""
    loop = crowded()
    loop.begin(ref())
    loop.turns(3)
    other = AdapterRef(name="other", locator="other", fingerprint="1")
    loop.rig.add(request("s", [1, 2], adapter=other, max_tokens=1))
    assert loop.turns(30) == []
    assert loop.rig.loader.started == ["busy", "a"]
    loop.engine.abort("r")
    (answer,) = loop.turns(5)
    assert answer.error is None and [s.status for s in answer.states] == ["resident"]
    loop.turns(20)
    assert loop.rig.engine.idle() and loop.rig.adapters.check() is None


def test_an_adapter_whose_request_left_delays_no_load() -> None:
    loop = crowded()
    for name in ("gone", "here"):
        adapter = AdapterRef(name=name, locator=name, fingerprint="1")
        loop.rig.add(request(name, [1, 2], adapter=adapter, max_tokens=1))
        loop.turns(3)
    assert loop.rig.loader.started == ["busy", "gone"]
    loop.engine.abort("gone")
    loop.turns(4)
    assert loop.rig.loader.started == ["busy", "gone", "here"]


def test_a_load_without_room_is_an_error_in_the_end() -> None:
    loop = crowded()
    loop.begin(ref())
    assert loop.turns(5) == []
    loop.rig.clock.now += ROOM_TIMEOUT_S
    (answer,) = loop.turns(1)
    assert answer.error is not None and answer.error.code == "insufficient_memory"


def test_a_load_without_room_for_it_in_an_idle_engine_is_an_error_at_once() -> None:
    loop = Loop(loader=HandLoader(nbytes=16 << 10), budget_bytes=ROOM)
    loop.begin(AdapterRef(name="pinned", locator="p", fingerprint="1"), pinned=True)
    assert [answer.error for answer in loop.turns(3)] == [None]
    answer = loop.load(ref())
    assert answer.error is not None and answer.error.code == "insufficient_memory"


def test_concurrent_loads_are_all_answered() -> None:
    """As after an engine's restart, which loads the pinned adapters again."""
    loop = Loop()
    for locator in ("a", "b"):
        loop.begin(ref(locator), pinned=True)
    answers = loop.turns(5)
    assert len(answers) == 2 and all(answer.error is None for answer in answers)


def test_at_most_one_adapter_is_uploaded_per_step() -> None:
    """However many loads finish together: the streams of the others wait for it between two steps."""
    loop = Loop(loader=HandLoader(automatic=False))
    loop.rig.add(request("stream", [1, 2, 3], max_tokens=100, ignore_eos=True))
    for name in "abcd":
        adapter = AdapterRef(name=name, locator=name, fingerprint="1")
        loop.rig.add(request(name, [1, 2, 3], adapter=adapter, max_tokens=1))
    loop.turns(1)
    loop.rig.loader.finish()
    for step in range(1, 9):
        loop.turns(1)
        stats = loop.rig.engine.stats()
        assert stats.adapter_loads <= step and stats.adapters_resident <= step
    assert stats.adapter_loads == 4 and stats.generated_tokens >= 4 + 8


def test_an_idle_engine_waits_for_calls_alone_and_a_loading_one_for_its_loader() -> None:
    loop = Loop(loader=HandLoader(automatic=False))
    assert loop.engine.poll_timeout() is None
    loop.begin(ref())
    assert loop.engine.poll_timeout() == loop.rig.loader.poll_timeout()
    loop.rig.loader.finish()
    (answer,) = loop.turns(3)
    assert answer.error is None and loop.engine.poll_timeout() is None
