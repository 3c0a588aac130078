"""Sequence states: which snapshots there are, what they save, and what they cost."""

from __future__ import annotations

import pytest
from rig import DEPTHS, HandLoader, Rig, alone, limits, request

STATES = {"num_states": 60, "state_bytes": 10}
PROMPT = list(range(1, 66))


def cached(rig: Rig, name: str) -> int:
    return rig.answers[name].final.cached_tokens


def snapshots(rig: Rig) -> int:
    return len(rig.engine._blocks.store.groups[-1].cached)


def assert_alone(rig: Rig, *requests) -> None:
    for req in requests:
        assert rig.answers[req.request_id].token_ids == alone(req, num_states=4).token_ids


def test_the_same_prompt_again_and_the_next_turn_of_a_conversation():
    rig = Rig(limits(**STATES))
    first = request("first", PROMPT[:21], max_tokens=20, ignore_eos=True)
    rig.run([first, request("other", [9, 8, 7], max_tokens=3)])
    again = request("again", PROMPT[:21], max_tokens=3)
    turn = request("turn", PROMPT[:21] + rig.answers["first"].token_ids + [4, 5], max_tokens=3)
    rig.run([again, turn])
    assert cached(rig, "first") == 0 and cached(rig, "again") == 20
    assert cached(rig, "turn") == 40  # 21 + 20 tokens, the last of which was never fed
    assert_alone(rig, first, again, turn)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_sequence_leaves_three_snapshots_at_most(depth):
    rig = Rig(limits(**STATES), depth=depth)
    rig.run([request("long", PROMPT, max_tokens=60, ignore_eos=True)])
    assert snapshots(rig) == 2  # of its prompt, and the newest
    rig.run([request("parts from it", [*PROMPT[:30], 3, 3, 3, 3, 3], max_tokens=30, ignore_eos=True)])
    assert snapshots(rig) == 2 + 3


@pytest.mark.parametrize("depth", DEPTHS)
def test_where_prompts_part_a_snapshot_stays(depth):
    rig = Rig(limits(**STATES), depth=depth)
    tails = [request(str(i), PROMPT[:30] + [50 + i] * 9, max_tokens=3) for i in range(4)]
    for req in tails:
        rig.run([req])
    assert [cached(rig, str(i)) for i in range(4)] == [0, 0, 28, 28]
    assert_alone(rig, *tails)


@pytest.mark.parametrize("depth", DEPTHS)
def test_prompts_that_wait_for_a_common_beginning_use_its_snapshot(depth):
    rig = Rig(limits(step_tokens=16, **STATES), depth=depth)
    tails = [request(str(i), PROMPT[:50] + [70 + i] * 9, max_tokens=3) for i in range(5)]
    rig.run(tails)
    assert [cached(rig, str(i)) for i in range(5)] == [0, 48, 48, 48, 48]
    assert_alone(rig, *tails)


def test_choices_of_one_prompt_compute_it_once():
    rig = Rig(limits(step_tokens=16, **STATES))
    choices = [request(f"c{i}", PROMPT, choice=i, temperature=1.0, seed=9, max_tokens=4) for i in range(6)]
    rig.run(choices)
    assert [cached(rig, f"c{i}") for i in range(6)] == [0] + [64] * 5
    assert_alone(rig, *choices)


def test_other_adapters_and_tenants_do_not_hit_a_snapshot():
    rig = Rig(limits(**STATES))
    rig.run([request("base", PROMPT, max_tokens=3)])
    crowd = [request("red", PROMPT, adapter="red", max_tokens=3), request("salted", PROMPT, salt="x", max_tokens=3)]
    rig.run(crowd)
    rig.run([request("red again", PROMPT, adapter="red", max_tokens=3)])
    assert (cached(rig, "red"), cached(rig, "salted"), cached(rig, "red again")) == (0, 0, 64)
    assert_alone(rig, *crowd)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_preempted_sequence_continues_from_its_newest_snapshot(depth):
    rig = Rig(limits(max_running=2, patience=2, step_tokens=8, **STATES), depth=depth)
    crowd = [
        request("older", PROMPT[:5], max_tokens=60, ignore_eos=True),
        request("newer", PROMPT[9:50], max_tokens=30),
    ]
    for req in crowd:
        rig.add(req)
    while len(rig.answers["newer"].token_ids) < 10:
        rig.step()
    crowd.append(request("another adapter", [1, 2, 3], adapter="red", max_tokens=2))
    rig.add(crowd[-1])
    while not rig.engine.stats().preemptions:
        rig.step()
    while [s.request_id for s in rig.running()] != ["older", "newer"]:
        rig.step()
    # A step computes 8 tokens, so it did not begin with the first of its 51.
    assert rig.running()[-1].num_computed >= 48
    rig.drain()
    assert_alone(rig, *crowd)


def test_states_are_part_of_the_budget_and_of_admission():
    # Each of 3 sequences needs 2 rows of 100 bytes, and 3 blocks of 10 bytes.
    lim = limits(num_states=60, state_bytes=100, kv_block_bytes=(10,), max_running=3, prefix_cache=False)
    crowd = [request(str(i), [i, 2, 3, 4, 5], max_tokens=5, ignore_eos=True) for i in range(3)]
    most = 0
    for room, expected in ((229, 0), (460, 2), (700, 3)):
        rig = Rig(lim, budget_bytes=room)
        for req in crowd:
            rig.add(req)
        most = 0
        while not rig.engine.idle():
            rig.step()
            most = max(most, len(rig.running()))
        assert most == expected
        if expected:
            assert_alone(rig, *crowd)
        else:
            assert {rig.answers[str(i)].code for i in range(3)} == {"insufficient_memory"}


def test_snapshots_are_evicted_for_blocks_and_adapters():
    lim = limits(num_states=60, state_bytes=100, kv_block_bytes=(100,))
    rig = Rig(lim, loader=HandLoader(nbytes=1500), budget_bytes=4000)
    crowd = []
    for place, color in enumerate((None, "red", "blue", None, "green")):
        for n in range(2):
            crowd.append(request(f"{place} {n}", [n] * 20, max_tokens=9, ignore_eos=True, adapter=color))
            rig.add(crowd[-1])
        rig.drain()
    rig.assert_clean()
    assert_alone(rig, *crowd)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("step", [1, 2, 4, 7])
def test_a_failed_step_is_run_again_from_the_states_before_it(depth, step):
    rig = Rig(limits(step_tokens=16, **STATES), depth=depth)
    crowd = [request(str(i), [i] * (5 + 7 * i), max_tokens=8, ignore_eos=True) for i in range(4)]
    rig.executable.faults.raise_on_step = step
    rig.run(crowd)
    assert_alone(rig, *crowd)


def test_without_a_prefix_cache_there_are_no_snapshots():
    rig = Rig(limits(prefix_cache=False, **STATES))
    rig.run([request("r", PROMPT, max_tokens=9)])
    assert snapshots(rig) == 0


def test_snapshots_of_a_sequence_with_infinite_logits_are_forgotten():
    rig = Rig(limits(**STATES))
    rig.executable.faults.nan_on_token = 65
    rig.run([request("r", PROMPT, max_tokens=9)])
    assert rig.answers["r"].finish_reason == "error" and snapshots(rig) == 0
