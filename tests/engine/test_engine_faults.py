"""A fault stays with its request: steps that raise, rows that are not finite, adapters that the backend refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hash_model import Faults, HashModel, HashStep
from rig import DEPTHS, Clock, HandLoader, Rig, alone, capacity_of, limits, request

from truffula.engine.runner import ModelRunner
from truffula.errors import ConfigError, DeviceLost, KernelError
from truffula.kernels.backend import AdapterImage
from truffula.types import AdapterCommand, AdapterRef, EngineRequest

PROMPT = list(range(1, 12))


class Faulty(HashModel):
    """The hash model with faults at will. ``refused_token``: ``submit`` raises for a step with that id."""

    def __init__(self, lim, *, depth: int = 1, refused_token: int | None = None, **faults) -> None:
        super().__init__(capacity_of(lim), lim.vocab_size, depth=depth)
        self.faults = Faults(**faults)
        self.refused_token = refused_token
        self.refuses_adapters = False

    def submit(self, wait_for_masks: Any = None) -> HashStep:
        if self.refused_token in self.inputs.token_ids[: self.inputs.T]:
            raise ValueError("scripted")
        return super().submit(wait_for_masks)

    def adapter(self, image: AdapterImage) -> int:
        if self.refuses_adapters:
            raise RuntimeError("out of device memory")
        return super().adapter(image)


def crowd_of(count: int, *, banned: int = 50) -> list[EngineRequest]:
    """Requests of every kind that never draw the id ``banned``."""
    return [
        request(
            f"r{i}", [i + 20, *PROMPT], max_tokens=6 + i % 5, adapter=[None, "red", "green"][i % 3], seed=i,
            temperature=[0.0, 1.0][i % 2], frequency_penalty=[0.0, 1.5][i % 4 // 2], logprobs=2,
            repetition_penalty=[1.0, 1.3][i % 2], prompt_logprobs=None if i % 5 else 1, logit_bias={banned: -100.0},
        )
        for i in range(count)
    ]  # fmt: skip


def assert_as_alone(rig: Rig, crowd: list[EngineRequest]) -> None:
    for req in crowd:
        got, expected = rig.answers[req.request_id], alone(req)
        assert (got.token_ids, got.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert (got.logprobs, got.top_logprobs) == (expected.logprobs, expected.top_logprobs)
        assert got.prompt_logprobs == expected.prompt_logprobs


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("where", ["result", "submit"])
def test_of_sixteen_the_one_that_fails_alone_ends_and_the_others_are_unchanged(where, depth):
    lim = limits(max_running=16, step_tokens=64, step_logit_rows=64, num_blocks=400)
    fault = {"refused_token": 50} if where == "submit" else {"raise_on_token": 50}
    rig = Rig(lim, executable=Faulty(lim, depth=depth, **fault))
    crowd = crowd_of(15)
    bad = request("bad", [3, 4, 50, 5], max_tokens=9, adapter="red")
    rig.run([*crowd[:7], bad, *crowd[7:]])
    assert (rig.answers["bad"].code, rig.answers["bad"].token_ids) == ("generation_failed", [])
    assert "scripted" in rig.answers["bad"].final.error.message
    assert_as_alone(rig, crowd)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_failure_in_the_middle_of_streams_ends_one_of_them(depth):
    bad = request("bad", [3, 4, 5], max_tokens=20, ignore_eos=True)
    expected = alone(bad).token_ids
    poison = next(
        token for place, token in enumerate(expected) if place > 4 and token not in [*bad.prompt_ids, *expected[:place]]
    )
    lim = limits(max_running=16, step_tokens=64, step_logit_rows=64, num_blocks=400)
    rig = Rig(lim, executable=Faulty(lim, depth=depth, raise_on_token=poison))
    crowd = [req for req in crowd_of(15, banned=poison) if poison not in req.prompt_ids]
    rig.run([*crowd, bad])
    assert rig.answers["bad"].code == "generation_failed"
    assert rig.answers["bad"].token_ids == expected[: expected.index(poison) + 1]
    assert_as_alone(rig, crowd)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("error", [KernelError("scripted"), MemoryError(), RuntimeError("scripted")])
@pytest.mark.parametrize("when", [1, 2, 5])
def test_a_failure_that_does_not_recur_ends_nothing(when, error, depth):
    lim = limits(max_running=16, step_tokens=64, step_logit_rows=64, num_blocks=400)
    rig = Rig(lim, executable=Faulty(lim, depth=depth, raise_on_step=when, error=error))
    crowd = crowd_of(9)
    for adapter in ("red", "green"):
        rig.engine.command(AdapterCommand(action="load", ref=AdapterRef(name=adapter, locator=adapter)))
    rig.step()
    rig.run(crowd)
    assert_as_alone(rig, crowd)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_sequence_whose_step_fails_alone_ends_with_the_error(depth):
    lim = limits()
    rig = Rig(lim, executable=Faulty(lim, depth=depth, raise_on_step=3, error=MemoryError("no room")))
    rig.run([request("r", PROMPT, max_tokens=9, ignore_eos=True)])
    assert (rig.answers["r"].code, len(rig.answers["r"].token_ids)) == ("generation_failed", 2)
    assert "MemoryError: no room" in rig.answers["r"].final.error.message
    again = request("again", PROMPT, max_tokens=9, ignore_eos=True)
    rig.run([again])
    assert_as_alone(rig, [again])


@pytest.mark.parametrize("depth", DEPTHS)
def test_when_all_fail_all_end(depth):
    lim = limits(max_running=16, step_tokens=64, step_logit_rows=64, num_blocks=400)
    rig = Rig(lim, executable=Faulty(lim, depth=depth, raise_on_token=50))
    rig.run([request(f"r{i}", [i, 50, 3], max_tokens=4, adapter="red" if i % 2 else None) for i in range(11)])
    assert {answer.code for answer in rig.answers.values()} == {"generation_failed"}


@pytest.mark.parametrize("depth", DEPTHS)
def test_what_is_aborted_while_a_failed_step_runs_again_in_parts_ends_by_the_abort(depth):
    lim = limits(max_running=16, step_tokens=64, step_logit_rows=64, num_blocks=400)
    model = Faulty(lim, depth=depth, raise_on_token=50)
    rig = Rig(lim, executable=model)
    crowd = crowd_of(15)
    for req in [*crowd, request("bad", [50, 3], max_tokens=4)]:
        rig.add(req)
    while not model.steps:
        rig.step()
    for name in ("bad", "r2", "r3"):
        rig.engine.abort(name)
    rig.drain()
    rig.assert_clean()
    assert [rig.answers[name].finish_reason for name in ("bad", "r2", "r3")] == ["abort"] * 3
    assert_as_alone(rig, [req for req in crowd if req.request_id not in ("r2", "r3")])


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_lost_device_is_not_handled_here(depth):
    lim = limits()
    rig = Rig(lim, executable=Faulty(lim, depth=depth, lost_on_step=3))
    rig.add(request("r", PROMPT, max_tokens=9, ignore_eos=True))
    with pytest.raises(DeviceLost):
        rig.drain()
    assert rig.answers["r"].final is None
    events = rig.engine.close()
    assert [event.error.code for event in events] == ["shutting_down"]


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_row_that_is_not_finite_ends_that_request_alone(depth):
    lim = limits()
    rig = Rig(lim, executable=Faulty(lim, depth=depth, nan_on_token=50))
    good = [request(f"good{i}", [i, i, i], max_tokens=9, ignore_eos=True, logit_bias={50: -100.0}) for i in range(3)]
    rig.run([*good, request("bad", [1, 2, 3, 4, 5, 50], max_tokens=9)])
    assert rig.answers["bad"].code == "generation_failed"
    assert rig.answers["bad"].token_ids == []
    for req in good:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids


@pytest.mark.parametrize("depth", DEPTHS)
def test_blocks_of_a_poisoned_request_are_not_found_again(depth):
    lim = limits(step_tokens=8)
    rig = Rig(lim, executable=Faulty(lim, depth=depth, nan_on_token=50))
    rig.run([request("bad", [*range(1, 20), 50], max_tokens=9)])
    again = rig.run([request("again", [*range(1, 20), 51], max_tokens=2)])["again"]
    assert again.final.cached_tokens == 0


def test_a_prompt_score_that_is_not_finite_ends_that_request():
    lim = limits()
    rig = Rig(lim, executable=Faulty(lim, nan_on_token=50))
    answer = rig.run([request("r", [1, 50, 3, 4], max_tokens=2, prompt_logprobs=1)])["r"]
    assert answer.code == "generation_failed"
    assert answer.prompt_logprobs is None


def test_a_row_that_is_not_finite_with_an_adapter_is_that_adapters_error():
    lim = limits()
    rig = Rig(lim, executable=Faulty(lim, nan_on_token=50))
    rig.run([request("bad", [1, 2, 50], adapter="red"), request("base", [1, 2, 50])])
    assert (rig.answers["bad"].code, rig.answers["base"].code) == ("adapter_invalid", "generation_failed")
    assert "'red'" in rig.answers["bad"].final.error.message


class SlowUploads(HashModel):
    """The hash model whose uploads end after ``polls`` polls; a step that names one before fails."""

    polls = 4

    def __init__(self, lim, depth: int) -> None:
        super().__init__(capacity_of(lim), lim.vocab_size, depth=depth)
        self.looks: dict[int, int] = {}

    def adapter_ready(self, slot: int) -> bool:
        self.looks[slot] = self.looks.get(slot, 0) + 1
        return self.looks[slot] > self.polls

    def submit(self, wait_for_masks: Any = None) -> HashStep:
        assert all(self.looks[slot] > self.polls for slot in self.inputs.seg[: self.inputs.G, 2].tolist())
        return super().submit(wait_for_masks)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("crowd", [1, 4])
def test_an_upload_in_progress_does_not_count_as_lack_of_memory(crowd, depth):
    lim = limits()
    rig = Rig(lim, executable=SlowUploads(lim, depth))
    requests = [request(f"r{i}", PROMPT, adapter=f"red{i}", max_tokens=3, ignore_eos=True) for i in range(crowd)]
    rig.run(requests)
    for req in requests:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids


def test_an_adapter_that_the_backend_refuses_fails_its_own_requests():
    lim = limits()
    model = Faulty(lim)
    model.refuses_adapters = True
    rig = Rig(lim, executable=model)
    rig.run([request("red", PROMPT, adapter="red"), request("base", PROMPT, max_tokens=3, ignore_eos=True)])
    assert rig.answers["red"].finish_reason == "error"
    assert rig.answers["base"].finish_reason == "length"


def test_an_adapter_that_can_never_fit_is_refused_with_the_numbers():
    rig = Rig(limits(), loader=HandLoader(nbytes=5000), budget_bytes=2000)
    answer = rig.run([request("r", PROMPT, adapter="red")])["r"]
    assert answer.code == "insufficient_memory"
    assert answer.final.error.data["limit_bytes"] == 2000


def test_adapters_that_do_not_fit_together_take_turns():
    rig = Rig(limits(kv_block_bytes=(10,)), loader=HandLoader(nbytes=600), budget_bytes=1200)
    crowd = [request(f"r{i}", PROMPT, adapter=f"a{i % 4}", max_tokens=5, ignore_eos=True) for i in range(8)]
    rig.run(crowd)
    for req in crowd:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids
    assert rig.engine.stats().adapter_evictions > 0


def test_cached_blocks_make_way_for_an_adapter_and_idle_adapters_for_blocks():
    rig = Rig(limits(kv_block_bytes=(100,)), loader=HandLoader(nbytes=800), budget_bytes=2000)
    rig.run([request("one", [1] * 60, max_tokens=2)])
    assert rig.engine.stats().cached_blocks == 15
    rig.run([request("two", PROMPT, adapter="red", max_tokens=2)])
    assert rig.answers["two"].finish_reason in ("stop", "length")
    assert rig.engine.stats().adapters_resident == 1
    rig.clock.now += 60.0
    rig.run([request("three", [2] * 75, max_tokens=2)])
    assert rig.answers["three"].finish_reason in ("stop", "length")
    assert rig.engine.stats().adapters_resident == 0


def test_a_pinned_adapter_that_leaves_too_little_is_named_not_waited_for():
    rig = Rig(limits(kv_block_bytes=(100,)), loader=HandLoader(nbytes=1500), budget_bytes=2000)
    ref = AdapterRef(name="big", locator="big")
    rig.engine.command(AdapterCommand(action="load", ref=ref, pinned=True))
    rig.step()
    answer = rig.run([request("r", [1] * 40, max_tokens=2)])["r"]
    assert answer.code == "insufficient_memory"


def test_a_model_too_long_for_the_executable_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="max_model_len"):
        ModelRunner(HashModel(capacity_of(limits()), 97), limits(max_model_len=1000))


@pytest.mark.parametrize("depth", DEPTHS)
def test_state_rows_that_suffice_for_no_sequence_are_refused_at_the_start(depth):
    enough = limits(num_states=depth + 2)
    few = limits(num_states=depth + 1)
    ModelRunner(HashModel(capacity_of(enough), 97, depth=depth), enough)
    with pytest.raises(ConfigError, match=f"num_states is {depth + 1}; .* alone needs {depth + 2}"):
        ModelRunner(HashModel(capacity_of(few), 97, depth=depth), few)


def test_clock_is_the_engines_only_clock():
    rig = Rig()
    rig.add(request("r", PROMPT, max_tokens=2, ignore_eos=True))
    assert isinstance(rig.engine._clock, Clock)
    rig.drain()
    assert rig.engine.stats().monotonic == rig.clock.now


def test_a_lease_without_room_for_the_blocks_is_released():
    # The adapter fits beside the running request, and its first blocks would, but not both.
    rig = Rig(limits(kv_block_bytes=(100,)), loader=HandLoader(nbytes=700), budget_bytes=2000)
    rig.add(request("running", [1] * 16, max_tokens=4, ignore_eos=True))
    rig.step()
    rig.add(request("waits", [2] * 30, adapter="red", max_tokens=2, ignore_eos=True))
    waited = 0
    while rig.answers["running"].final is None:
        rig.step()  # the lease must not be there while it waits: check() counts
        waited += rig.engine.stats().waiting
    assert waited
    rig.drain()
    rig.assert_clean()
    assert rig.answers["waits"].finish_reason == "length"
