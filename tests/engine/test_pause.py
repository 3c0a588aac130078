"""A paused engine computes nothing and loses nothing; a drained one ends what runs; both go on after ``resume``."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import DEPTHS, HandLoader, Rig, limits, request

from examples import examples
from truffula.errors import InvalidRequest, ShuttingDown
from truffula.types import AdapterCommand, AdapterRef

each_depth = pytest.mark.parametrize("depth", DEPTHS)


def prompts() -> list:
    adapters = [None, "pirate", "poet", None, "pirate"]
    return [request(f"r{i}", [i + 3, i + 4, 5], adapter=name, max_tokens=12) for i, name in enumerate(adapters)]


def settle(rig: Rig, action: str) -> None:
    """Begin ``action`` and step until it is in effect."""
    done = rig.engine.control(action)
    for _ in range(100):
        if done.done():
            break
        rig.step()
    assert done.result(0) == []


def tokens(rig: Rig) -> dict[str, list[int]]:
    return {name: list(answer.token_ids) for name, answer in rig.answers.items()}


ACTIONS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(["pause", "drain", "reset_prefix_cache", ""])), max_size=12
)


@each_depth
@settings(max_examples=examples(15, 300), deadline=None)
@given(actions=ACTIONS)
def test_a_pause_changes_no_token(depth: int, actions: list[tuple[int, str]]):
    """Pauses, drains and prefix resets at any time, in any order."""
    expected = tokens_of(Rig(limits(), depth=depth).run(prompts()))
    rig = Rig(limits(), depth=depth)
    left = prompts()
    for steps, action in actions:
        if left:
            rig.add(left.pop(0))
        for _ in range(steps):
            rig.step()
        if not action:
            continue
        settle(rig, action)
        if action == "pause":
            before = tokens(rig)
            for _ in range(3):
                assert rig.step() == []
            assert tokens(rig) == before and rig.engine.poll_timeout() != 0
        elif action == "drain":
            assert rig.running() == []
        settle(rig, "resume")
    assert tokens_of(rig.run(left)) == expected


def tokens_of(answers) -> dict[str, tuple]:
    return {name: (answer.token_ids, answer.finish_reason) for name, answer in answers.items()}


@each_depth
def test_deadlines_and_aborts_count_during_a_pause(depth: int):
    rig = Rig(limits(max_running=1), depth=depth)
    rig.add(request("runs", [3, 4], max_tokens=50, deadline=rig.clock.now + 5))
    rig.add(request("waits", [3, 4], queue_deadline=rig.clock.now + 3))
    rig.add(request("leaves", [3, 4]))
    rig.step()
    settle(rig, "pause")
    rig.engine.abort("leaves")
    rig.step()
    assert rig.answers["leaves"].finish_reason == "abort"
    rig.clock.now += 4
    rig.step()
    assert rig.answers["waits"].code == "queue_timeout" and rig.answers["runs"].final is None
    rig.clock.now += 4
    rig.step()
    assert rig.answers["runs"].code == "deadline_exceeded"
    assert rig.engine.stats().paused
    settle(rig, "resume")
    assert not rig.engine.stats().paused
    rig.assert_clean()


def test_adapters_load_during_a_pause_and_running_requests_keep_theirs():
    """Two versions of one adapter: what was admitted before the reload keeps the first."""
    rig = Rig(limits())
    first, second = (AdapterRef(name="policy", locator="a", fingerprint=version) for version in "12")
    alone = {
        ref.fingerprint: Rig(limits()).run([request("x", [3, 4, 5], adapter=ref, max_tokens=20)])["x"].token_ids
        for ref in (first, second)
    }
    assert alone["1"] != alone["2"]
    rig.add(request("old", [3, 4, 5], adapter=first, max_tokens=20))
    while len(rig.answers["old"].token_ids) < 5:
        rig.step()
    settle(rig, "pause")
    loaded = rig.engine.command(AdapterCommand(action="load", ref=second))
    while not loaded.done():
        rig.step()
    assert rig.engine.stats().resident_names == ["policy"]
    rig.add(request("new", [3, 4, 5], adapter=second, max_tokens=20))
    rig.step()
    assert len(rig.answers["old"].token_ids) == 5 and rig.answers["new"].token_ids == []
    settle(rig, "resume")
    rig.drain()
    assert {"1": rig.answers["old"].token_ids, "2": rig.answers["new"].token_ids} == alone


def test_a_drain_waits_for_what_runs_and_admits_nothing():
    rig = Rig(limits(max_running=2))
    for name in ("a", "b", "c"):
        rig.add(request(name, [3, 4], max_tokens=8, ignore_eos=True))
    rig.step()
    drained = rig.engine.control("drain")
    while not drained.done():
        assert len(rig.waiting()) == 1
        rig.step()
    assert {name for name, answer in rig.answers.items() if answer.final} == {"a", "b"}
    assert rig.engine.poll_timeout() != 0
    settle(rig, "resume")
    rig.drain()
    assert rig.answers["c"].finish_reason == "length"


def test_a_drain_that_is_resumed_fails_and_so_does_one_of_a_closed_engine():
    rig = Rig(limits())
    rig.add(request("a", [3, 4], max_tokens=30, ignore_eos=True))
    rig.step()
    drained = rig.engine.control("drain")
    settle(rig, "resume")
    with pytest.raises(InvalidRequest, match="resumed"):
        drained.result(0)
    drained = rig.engine.control("drain")
    rig.engine.close()
    with pytest.raises(ShuttingDown):
        drained.result(0)


def test_a_reset_index_gives_no_hits_and_frees_cached_blocks():
    rig = Rig(limits())
    prompt = list(range(3, 43))
    rig.run([request("first", prompt)])
    rig.run([request("hit", prompt)])
    assert rig.answers["hit"].final.cached_tokens > 0
    settle(rig, "reset_prefix_cache")
    assert rig.engine.stats().cached_blocks == 0
    rig.run([request("miss", prompt)])
    assert rig.answers["miss"].final.cached_tokens == 0
    assert rig.answers["miss"].token_ids == rig.answers["first"].token_ids


def test_names_of_resident_and_of_loading_adapters():
    loader = HandLoader(automatic=False)
    rig = Rig(limits(), loader=loader)
    rig.add(request("a", [3, 4], adapter="pirate"))
    rig.step()
    assert rig.engine.stats().loading_names == ["pirate"]
    loader.finish()
    rig.drain()
    rig.add(request("b", [3, 4], adapter="poet"))
    rig.step()
    loader.finish()
    rig.drain()
    stats = rig.engine.stats()
    assert (stats.resident_names, stats.loading_names) == (["poet", "pirate"], [])
