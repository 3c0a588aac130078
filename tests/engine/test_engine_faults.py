"""A fault stays with its request: steps that raise, rows that are not finite, adapters that the backend refuses."""

from __future__ import annotations

import pytest
from rig import Clock, HandLoader, Rig, alone, capacity_of, limits, request

from truffula.engine.runner import ModelRunner
from truffula.errors import ConfigError, KernelError
from truffula.kernels.backend import AdapterImage
from truffula.testing.executable import Faults, HashModel
from truffula.types import AdapterCommand, AdapterRef

PROMPT = list(range(1, 12))


class Faulty(HashModel):
    """The hash model with faults at will."""

    def __init__(self, lim, **faults) -> None:
        super().__init__(capacity_of(lim), lim.vocab_size)
        self.faults = Faults(**faults)
        self.refuses_adapters = False

    def adapter(self, image: AdapterImage) -> int:
        if self.refuses_adapters:
            raise RuntimeError("out of device memory")
        return super().adapter(image)


@pytest.mark.parametrize("error", [KernelError("scripted"), MemoryError(), RuntimeError("device lost")])
@pytest.mark.parametrize("when", [1, 2, 5])
def test_a_step_that_raises_ends_its_requests_and_nobody_else(when, error):
    lim = limits()
    model = Faulty(lim, raise_on_step=when, error=error)
    rig = Rig(lim, executable=model)
    rig.engine.command(AdapterCommand(action="load", ref=AdapterRef(name="red", locator="red")))
    rig.step()
    for i in range(3):
        rig.add(request(f"in{i}", [i + 20, *PROMPT], max_tokens=8, ignore_eos=True, adapter="red" if i else None))
    while model.steps < when:
        rig.step()
    for i in range(3):
        assert (rig.answers[f"in{i}"].code, rig.answers[f"in{i}"].finish_reason) == ("generation_failed", "error")
        assert type(error).__name__ in rig.answers[f"in{i}"].final.error.message
    rig.assert_clean()
    after = [request(f"after{i}", [i + 20, *PROMPT], max_tokens=8, ignore_eos=True) for i in range(3)]
    rig.run(after)
    for req in after:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids


def test_those_outside_a_failed_step_go_on():
    lim = limits(max_running=2)
    model = Faulty(lim, raise_on_step=2)
    rig = Rig(lim, executable=model)
    crowd = [request(f"r{i}", [i + 20, *PROMPT], max_tokens=6, ignore_eos=True) for i in range(5)]
    rig.run(crowd)
    assert [rig.answers[f"r{i}"].code for i in range(5)] == ["generation_failed"] * 2 + [None] * 3
    for req in crowd[2:]:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids


def test_a_row_that_is_not_finite_ends_that_request_alone():
    lim = limits()
    rig = Rig(lim, executable=Faulty(lim, nan_on_token=50))
    good = [request(f"good{i}", [i, i, i], max_tokens=9, ignore_eos=True, logit_bias={50: -100.0}) for i in range(3)]
    rig.run([*good, request("bad", [1, 2, 3, 4, 5, 50], max_tokens=9)])
    assert rig.answers["bad"].code == "generation_failed"
    assert rig.answers["bad"].token_ids == []
    for req in good:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids


def test_blocks_of_a_poisoned_request_are_not_found_again():
    lim = limits(step_tokens=8)
    rig = Rig(lim, executable=Faulty(lim, nan_on_token=50))
    rig.run([request("bad", [*range(1, 20), 50], max_tokens=9)])
    again = rig.run([request("again", [*range(1, 20), 51], max_tokens=2)])["again"]
    assert again.final.cached_tokens == 0


def test_a_prompt_score_that_is_not_finite_ends_that_request():
    lim = limits()
    rig = Rig(lim, executable=Faulty(lim, nan_on_token=50))
    answer = rig.run([request("r", [1, 50, 3, 4], max_tokens=2, prompt_logprobs=1)])["r"]
    assert answer.code == "generation_failed"
    assert answer.prompt_logprobs is None


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
    rig = Rig(limits(kv_block_bytes=10), loader=HandLoader(nbytes=600), budget_bytes=1200)
    crowd = [request(f"r{i}", PROMPT, adapter=f"a{i % 4}", max_tokens=5, ignore_eos=True) for i in range(8)]
    rig.run(crowd)
    for req in crowd:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids
    assert rig.engine.stats().adapter_evictions > 0


def test_cached_blocks_make_way_for_an_adapter_and_idle_adapters_for_blocks():
    rig = Rig(limits(kv_block_bytes=100), loader=HandLoader(nbytes=800), budget_bytes=2000)
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
    rig = Rig(limits(kv_block_bytes=100), loader=HandLoader(nbytes=1500), budget_bytes=2000)
    ref = AdapterRef(name="big", locator="big")
    rig.engine.command(AdapterCommand(action="load", ref=ref, pinned=True))
    rig.step()
    answer = rig.run([request("r", [1] * 40, max_tokens=2)])["r"]
    assert answer.code == "insufficient_memory"


def test_a_model_too_long_for_the_executable_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="max_model_len"):
        ModelRunner(HashModel(capacity_of(limits()), 97), 4, 1000)


def test_clock_is_the_engines_only_clock():
    rig = Rig()
    rig.add(request("r", PROMPT, max_tokens=2, ignore_eos=True))
    assert isinstance(rig.engine._clock, Clock)
    rig.drain()
    assert rig.engine.stats().monotonic == rig.clock.now


def test_a_lease_without_room_for_the_blocks_is_given_back():
    # The adapter fits beside the running request, and its first blocks would, but not both.
    rig = Rig(limits(kv_block_bytes=100), loader=HandLoader(nbytes=900), budget_bytes=2000)
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
