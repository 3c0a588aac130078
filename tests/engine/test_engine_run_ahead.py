"""A step is planned and submitted before the result of the one before: what that changes, and what it must not."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest
from invariants import check_engine, check_scheduler
from rig import DEPTHS, HandLoader, Rig, alone, limits, refs, request

from truffula.engine.blocks import BlockPool
from truffula.engine.constraints import GrammarCompiler
from truffula.engine.plan import ChunkResult
from truffula.engine.scheduler import Scheduler
from truffula.kernels.inputs import RELAY

PROMPT = [1, 2, 3, 4, 5]


def test_two_steps_are_unfinished_at_a_time_and_a_token_is_relayed_before_it_is_known():
    rig = Rig(depth=2)
    rig.add(request("r", PROMPT, max_tokens=4, ignore_eos=True))
    assert rig.step() == []
    assert rig.executable.unfinished == 1
    (sequence,) = rig.running()
    plan = rig.engine._scheduler.plan(rig.clock.now)
    assert (plan.chunks[0].token_ids.tolist(), plan.chunks[0].draws) == ([RELAY], (1,))
    assert (sequence.num_tokens, sequence.num_known) == (7, 5)


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_end_by_length_is_known_before_the_token_and_wastes_no_step(depth):
    rig = Rig(depth=depth)
    rig.run([request("r", PROMPT, max_tokens=4, ignore_eos=True)])
    assert rig.executable.steps == 4


def test_a_stop_id_is_found_one_step_late_and_the_wasted_row_changes_nothing():
    tokens = alone(request("r", PROMPT, max_tokens=9, ignore_eos=True)).token_ids
    place = next(i for i in range(3, 9) if tokens[i] not in tokens[:i])
    rig = Rig(depth=2)
    rig.add(request("other", [9, 9], max_tokens=20, ignore_eos=True))
    rig.add(request("r", PROMPT, max_tokens=9, ignore_eos=True, stop_token_ids=[tokens[place]]))
    rig.drain()
    rig.assert_clean()
    assert rig.answers["r"].token_ids == tokens[: place + 1]
    assert rig.answers["r"].final.stop_reason == tokens[place]
    assert rig.answers["other"].token_ids == alone(request("o", [9, 9], max_tokens=20, ignore_eos=True)).token_ids


@pytest.mark.parametrize("end", ["abort", "deadline", "not finite"])
def test_what_an_unfinished_step_uses_is_released_with_its_result(end):
    rig = Rig(limits(max_running=1), depth=2)
    deadline = rig.clock.now + 1 if end == "deadline" else None
    rig.add(request("r", PROMPT, max_tokens=50, adapter="red", ignore_eos=True, deadline=deadline))
    rig.add(request("next", [7] * 9, max_tokens=5, adapter="red", ignore_eos=True))
    while not rig.answers["r"].token_ids:
        rig.step()
    (sequence,) = rig.running()
    blocks, slot = refs(sequence.table), sequence.seq_slot
    if end == "abort":
        rig.engine.abort("r")
    elif end == "deadline":
        rig.clock.now += 2
    else:
        rig.executable.faults.nan_on_token = rig.answers["r"].token_ids[-1]
        rig.step()
    plan = rig.engine._scheduler.plan(rig.clock.now)
    assert rig.executable.unfinished == 1, "no step is unfinished: the test shows nothing"
    assert plan.chunks == [], "its only slot is used by the step that is not finished"
    assert rig.running() == []
    assert rig.engine.stats().used_blocks == len(blocks)
    assert [state.leases for state in rig.adapters.states()] == [1]
    check_engine(rig.engine)
    rig.executable.faults.nan_on_token = None
    rig.step()
    assert rig.answers["r"].final is not None
    assert rig.engine.stats().used_blocks == 0
    rig.step()
    assert [s.seq_slot for s in rig.running()] == [slot]
    rig.drain()
    rig.assert_clean()
    expected = alone(request("next", [7] * 9, max_tokens=5, adapter="red", ignore_eos=True))
    assert rig.answers["next"].token_ids == expected.token_ids


def test_a_preemption_waits_for_the_results_of_unfinished_steps():
    crowd = [request(f"r{i}", [i, i + 1, i + 2], max_tokens=24, ignore_eos=True, adapter="red") for i in range(6)]
    rig = Rig(limits(num_blocks=12), depth=2)
    for req in crowd:
        rig.add(req)
    preemptions = 0
    while not rig.engine.idle():
        unfinished = rig.executable.unfinished
        rig.step()
        if rig.engine.stats().preemptions > preemptions:
            assert unfinished == 0
            preemptions = rig.engine.stats().preemptions
    assert preemptions
    rig.assert_clean()
    for req in crowd:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids


@pytest.mark.parametrize("windows", [(None,), (None, 6), (9,)])
@pytest.mark.parametrize("depth", DEPTHS)
def test_choices_of_one_prompt_compute_it_once_at_any_depth(depth, windows):
    prompt = list(range(1, 66))
    rig = Rig(limits(step_tokens=16, kv_windows=windows), depth=depth)
    rig.run([request(f"c{i}", prompt, choice=i, temperature=1.0, seed=9, max_tokens=4) for i in range(6)])
    assert sorted(rig.answers[f"c{i}"].final.cached_tokens for i in range(6)) == [0] + [64] * 5


@pytest.mark.parametrize("depth", DEPTHS)
def test_closing_with_unfinished_steps_releases_all(depth):
    rig = Rig(depth=depth)
    for i in range(3):
        rig.add(request(f"r{i}", [i, *PROMPT], max_tokens=50, ignore_eos=True))
    rig.step()
    rig.step()
    events = rig.engine.close()
    assert {event.error.code for event in events if event.finish_reason} == {"shutting_down"}
    assert rig.engine.stats().used_blocks == 0
    assert rig.engine.idle()


def scheduler_of(rig: Rig) -> Scheduler:
    """A scheduler whose steps the test computes by hand."""
    lim = rig.limits
    return Scheduler(
        lim, BlockPool(lim.num_blocks, lim.kv_layout(1)), rig.adapters, GrammarCompiler(lim.vocab_size, ())
    )


def test_the_vector_of_a_step_comes_with_the_final_event():
    scheduler = scheduler_of(Rig())
    scheduler.add(request("r", PROMPT, max_tokens=0, prompt_logprobs=0), 0.0)
    plan = scheduler.plan(0.0)
    scheduler.commit(plan, [ChunkResult(vector=np.asarray([0.5, -2.0], np.float32))], 0.0)
    (event,) = scheduler.take_events()
    assert (event.vector, event.finish_reason) == ([0.5, -2.0], "length")


@pytest.mark.parametrize(("stop", "most", "reason"), [([8], 9, "stop"), ([], 2, "length")])
def test_of_several_tokens_of_one_step_those_behind_an_end_are_dropped(stop, most, reason):
    scheduler = scheduler_of(Rig())
    scheduler.add(request("r", PROMPT, max_tokens=most, logprobs=1, stop_token_ids=stop, ignore_eos=True), 0.0)
    tops = [[(token, -0.5)] for token in (7, 8, 9)]
    result = ChunkResult(tokens=[7, 8, 9], logprobs=[-1.0, -2.0, -3.0], tops=tops)
    scheduler.commit(scheduler.plan(0.0), [result], 0.0)
    (event,) = scheduler.take_events()
    assert (event.token_ids, event.logprobs, event.top_logprobs) == ([7, 8], [-1.0, -2.0], tops[:2])
    assert (event.finish_reason, event.stop_reason) == (reason, 8 if stop else None)
    check_scheduler(scheduler)


def instructions(call: Any) -> int:
    """Python instructions that ``call`` executes."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("adapter", [None, "red", "not loaded"])
def test_a_step_and_its_stats_cost_the_same_however_many_wait(adapter):
    costs = []
    for waiting in (50, 2000):
        rig = Rig(limits(max_running=4, max_waiting=10_000), loader=HandLoader(automatic=adapter == "red"))
        rig.engine.add(request("runs", PROMPT, max_tokens=100, ignore_eos=True))
        for i in range(waiting):
            late = rig.clock.now + 1000 + i
            rig.engine.add(request(f"r{i}", PROMPT, max_tokens=100, adapter=adapter, queue_deadline=late))
        for _ in range(8):
            rig.engine.step()
        costs.append(instructions(lambda rig=rig: (rig.engine.step(), rig.engine.stats())))
    assert costs[1] <= 1.05 * costs[0], costs
