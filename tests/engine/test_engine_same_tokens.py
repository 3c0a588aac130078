"""Same answer in any company: tokens don't depend on batch, budget, prefix hits, preemption or resumption.

Over the hash model, where one wrong block, position or adapter changes everything; equality is exact.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import DEPTHS, VOCAB, HandLoader, Rig, alone, composed, limits, request

from truffula.types import AdapterCommand, AdapterRef

SHARED = [list(range(1, 30)), [7] * 22, [5, 6] * 13]

sampling = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        "top_k": st.integers(0, 20),
        "top_p": st.floats(0.3, 1.0),
        "min_p": st.floats(0.0, 0.3),
        "typical_p": st.floats(0.3, 1.0),
        "repetition_penalty": st.sampled_from([1.0, 0.7, 1.4]),
        "frequency_penalty": st.sampled_from([0.0, -1.0, 1.5]),
        "presence_penalty": st.sampled_from([0.0, 0.8]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9), max_size=3),
        "min_tokens": st.integers(0, 1),
        "logprobs": st.integers(0, 4),
        "prompt_logprobs": st.integers(0, 3),
        "logprobs_of": st.sampled_from(["raw", "warped"]),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=4),
        "seed": st.integers(0, 2**64 - 1),
    },
)


several = st.dictionaries(
    st.sampled_from(["red", "green", "blue"]), st.sampled_from([1.0, 0.5, -0.3, 0.0]), min_size=1, max_size=3
)


@st.composite
def requests(draw, name: str = "r", params=sampling):
    shared = draw(st.sampled_from(SHARED))
    prompt = shared[: draw(st.integers(0, len(shared)))] + draw(st.lists(st.integers(0, VOCAB - 1), max_size=12))
    adapters = st.sampled_from([None, None, "red", "green", "blue", "call", "soft"]) | several.map(composed)
    return request(
        name, prompt or [3], adapter=draw(adapters),
        choice=draw(st.integers(0, 2)), max_tokens=draw(st.integers(1, 14)), **draw(params),
    )  # fmt: skip


@st.composite
def crowds(draw, most: int = 7):
    return [draw(requests(f"r{i}")) for i in range(draw(st.integers(1, most)))]


@st.composite
def engines(draw):
    size = draw(st.sampled_from([1, 2, 4, 16]))
    return limits(
        step_tokens=draw(st.integers(1, 48)), step_logit_rows=draw(st.integers(1, 24)),
        max_running=draw(st.integers(1, 8)), block_size=size,
        # From barely enough for one request (so that preemption is the rule) to plenty.
        num_blocks=draw(st.integers(2 + 64 // size, 2 + 256 // size)),
        prefix_cache=draw(st.booleans()), patience=draw(st.sampled_from([1, 16])),
        kv_windows=draw(st.sampled_from([(None,), (None,), (None, 7), (3,), (20, 5)])),
        # Of a model with states: from barely enough for one request (at any depth) to snapshots of all.
        num_states=draw(st.sampled_from([0, 0, 5, 6, 11, 100])),
    )  # fmt: skip


def assert_same(got, expected) -> None:
    assert got.token_ids == expected.token_ids
    assert got.finish_reason == expected.finish_reason
    assert got.final.stop_reason == expected.final.stop_reason
    assert got.logprobs == pytest.approx(expected.logprobs)
    assert got.top_logprobs == expected.top_logprobs
    assert got.prompt_logprobs == expected.prompt_logprobs


@settings(max_examples=20, deadline=None)
@given(crowds(), engines(), st.data())
def test_any_company_any_budget_any_memory(crowd, lim, data):
    hold_company(crowd, lim, data)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=300, deadline=None)
@given(crowds(most=10), engines(), st.data())
def test_any_company_at_length(crowd, lim, data):
    hold_company(crowd, lim, data)


def hold_company(crowd, lim, data) -> None:
    rig = Rig(lim, depth=data.draw(st.sampled_from(DEPTHS), label="depth"))
    for req in crowd:
        rig.add(req)
        for _ in range(data.draw(st.integers(0, 3), label="steps between")):
            rig.step()
    rig.drain()
    rig.assert_clean()
    for req in crowd:
        assert_same(rig.answers[req.request_id], alone(req, **same_model(lim)))


@settings(max_examples=10, deadline=None)
@given(crowds(), engines(), st.data())
def test_given_keys_and_values_in_any_company(crowd, lim, data):
    """Instead of virtual tokens that are computed: only models without states and windows are given any."""
    ref = request("r", [1], adapter="prefix").adapter
    given = [msgspec.structs.replace(r, adapter=ref) if r.adapter and r.adapter.name != "red" else r for r in crowd]
    hold_company(given, replace(lim, num_states=0, kv_windows=(None,)), data)


def same_model(lim) -> dict:
    return {"kv_windows": lim.kv_windows, "num_states": 4 if lim.num_states else 0}


@settings(max_examples=40, deadline=None)
@given(requests(), engines(), st.data())
def test_resumed_behind_any_of_its_tokens(req, lim, data):
    whole = alone(req, **same_model(lim))
    shown = data.draw(st.integers(1, max(1, len(whole.token_ids) - 1)), label="shown")
    if shown >= len(whole.token_ids):
        return
    resumed = msgspec.structs.replace(req, resume_ids=whole.token_ids[:shown])
    depth = data.draw(st.sampled_from(DEPTHS), label="depth")
    answer = Rig(lim, depth=depth).run([resumed])[req.request_id]
    assert answer.token_ids == whole.token_ids[shown:]
    assert answer.finish_reason == whole.finish_reason
    assert answer.logprobs == pytest.approx(whole.logprobs[shown:])
    assert answer.prompt_logprobs is None


def test_preemption_did_happen_and_changed_nothing():
    crowd = [request(f"r{i}", [i, i + 1, i + 2], max_tokens=24, ignore_eos=True, adapter="red") for i in range(6)]
    rig = Rig(limits(num_blocks=12))
    rig.run(crowd)
    assert rig.engine.stats().preemptions > 0
    for req in crowd:
        assert_same(rig.answers[req.request_id], alone(req))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_adapters_that_take_the_memory_of_free_blocks_change_no_token(depth, prefix_cache):
    lim = limits(num_blocks=60, kv_block_bytes=(100,), prefix_cache=prefix_cache)
    rig = Rig(lim, loader=HandLoader(nbytes=1200), budget_bytes=5400, depth=depth)
    crowd = []
    for place, color in enumerate((None, "red", "blue", None, "green")):
        for n in range(4):
            crowd.append(request(f"{place} {n}", [n] * 20, max_tokens=9, ignore_eos=True, adapter=color))
            rig.add(crowd[-1])
        rig.drain()
    rig.assert_clean()
    assert rig.executable.blocks_released > 0
    for req in crowd:
        assert_same(rig.answers[req.request_id], alone(req))


def test_a_full_prefix_hit_leaves_one_token_to_compute():
    prompt = list(range(1, 17))  # four full blocks
    rig = Rig()
    first = rig.run([request("first", prompt, max_tokens=3)])["first"]
    again = rig.run([request("again", prompt, max_tokens=3)])["again"]
    assert first.final.cached_tokens == 0
    assert again.final.cached_tokens == 12
    assert again.token_ids == first.token_ids


def test_prefixes_of_other_adapters_and_tenants_are_not_hit():
    prompt = list(range(1, 17))
    rig = Rig()
    rig.run([request("base", prompt)])
    strangers = [request("red", prompt, adapter="red"), request("salted", prompt, salt="tenant")]
    for name, answer in rig.run(strangers).items():
        assert name == "base" or answer.final.cached_tokens == 0
    friends = [request("red2", prompt, adapter="red"), request("salted2", prompt, salt="tenant")]
    rig.run(friends)
    assert rig.answers["red2"].final.cached_tokens == rig.answers["salted2"].final.cached_tokens == 12
    assert_same(rig.answers["red2"], rig.answers["red"])


def test_prefixes_of_other_weights_are_not_hit():
    prompt = list(range(1, 17))
    rig = Rig()
    rig.run([request("one", prompt, adapter=composed({"red": 0.5, "blue": -0.3}))])
    others = [
        {"red": 0.5}, {"blue": -0.3}, {"red": 0.5, "blue": 0.3}, {"red": -0.3, "blue": 0.5}, {"red": 1.0, "blue": -0.3},
    ]  # fmt: skip
    for weights in others:
        assert (
            rig.run([request(str(weights), prompt, adapter=composed(weights))])[str(weights)].final.cached_tokens == 0
        )
    same = rig.run([request("same", prompt, adapter=composed({"blue": -0.3, "red": 0.5}))])["same"]
    assert same.final.cached_tokens == 12
    assert_same(same, rig.answers["one"])


def test_what_a_weighted_sum_equals():
    prompt = list(range(1, 17))
    red = alone(request("r", prompt, adapter="red", max_tokens=9))
    base = alone(request("r", prompt, max_tokens=9))
    for weights in ({"red": 1.0}, {"red": 1.0, "blue": 0.0}):
        assert_same(alone(request("r", prompt, adapter=composed(weights), max_tokens=9)), red)
    assert_same(alone(request("r", prompt, adapter=composed({"red": 0.0, "blue": 0.0}), max_tokens=9)), base)
    # Two sources with equal bytes are one adapter; what cancels is the base.
    loader = HandLoader()
    loader.same_bytes = {"copy": "red"}
    for weights, expected in (({"red": 0.5, "copy": 0.5}, red), ({"red": 1.0, "copy": -1.0}, base)):
        rig = Rig(loader=loader)
        got = rig.run([request("r", prompt, adapter=composed(weights), max_tokens=9)])["r"]
        assert_same(got, expected)


def test_a_sum_that_never_fits_is_refused_and_one_that_fits_waits_for_room():
    rig = Rig(loader=HandLoader(nbytes=1200), budget_bytes=4000)  # two adapters and their images' tables
    sums = [{"red": 1.0, "blue": 1.0}, {"green": 1.0, "black": 2.0}, {"red": 1.0, "green": 1.0, "blue": 1.0}]
    crowd = [
        request(f"{place} {turn}", [place, turn, 3], adapter=composed(sums[place]), max_tokens=6, ignore_eos=True)
        for turn in range(3)
        for place in range(3)
    ]
    answers = rig.run(crowd)
    for req in crowd:
        if req.request_id.startswith("2"):
            assert answers[req.request_id].code == "insufficient_memory"
        else:
            assert_same(answers[req.request_id], alone(req))
    assert rig.adapters.evictions > 0


def test_a_sum_waits_until_all_its_adapters_are_loaded_and_fails_with_the_first_that_does_not():
    loader = HandLoader(automatic=False)
    rig = Rig(loader=loader)
    rig.add(request("both", [1, 2, 3], adapter=composed({"red": 1.0, "blue": 0.5}), max_tokens=2))
    rig.add(request("bad", [1, 2, 3], adapter=composed({"red": 1.0, "bad": 0.5}), max_tokens=2))
    rig.step()
    assert sorted(loader.started) == ["bad", "blue", "red"], "one load for both requests"
    loader.finish(["red"])
    for _ in range(20):
        rig.step()
    assert rig.answers["both"].final is rig.answers["bad"].final is None
    assert rig.engine.stats().waiting_for_adapter == 2
    loader.finish()
    rig.drain()
    rig.assert_clean()
    assert rig.answers["bad"].code == "adapter_load_failed"
    assert_same(
        rig.answers["both"],
        alone(request("both", [1, 2, 3], adapter=composed({"blue": 0.5, "red": 1.0}), max_tokens=2)),
    )


def test_a_part_that_is_unloaded_while_another_loads_is_not_loaded_again():
    loader = HandLoader(automatic=False)
    rig = Rig(loader=loader)
    weights = {"red": 1.0, "blue": 0.5}
    rig.add(request("both", [1, 2, 3], adapter=composed(weights), max_tokens=2))
    rig.step()
    loader.finish(["red"])
    rig.step()
    rig.engine.command(AdapterCommand(action="unload", ref=AdapterRef(name="red", locator="red")))
    rig.step()
    loader.finish()
    rig.drain()
    rig.assert_clean()
    assert sorted(loader.started) == ["blue", "red"]
    assert_same(rig.answers["both"], alone(request("both", [1, 2, 3], adapter=composed(weights), max_tokens=2)))


def test_an_adapter_with_virtual_tokens_is_refused_in_a_sum():
    for weights in ({"soft": 0.5}, {"soft": 1.0, "red": 1.0}):
        answer = Rig().run([request("r", [1, 2], adapter=composed(weights))])["r"]
        assert answer.code == "invalid_request" and "'soft'" in answer.final.error.message
    for weights in ({"soft": 1.0}, {"soft": 1.0, "red": 0.0}):
        assert Rig().run([request("r", [1, 2], adapter=composed(weights))])["r"].code is None


def test_generated_blocks_are_hit_by_the_next_turn_of_a_conversation():
    rig = Rig()
    prompt = list(range(1, 10))
    first = rig.run([request("turn1", prompt, max_tokens=12, ignore_eos=True)])["turn1"]
    longer = prompt + first.token_ids + [4, 5, 6]
    second = rig.run([request("turn2", longer, max_tokens=4)])["turn2"]
    assert second.final.cached_tokens == 20  # 9 + 12 tokens, the last of which was never fed: five full blocks
    assert_same(second, alone(request("turn2", longer, max_tokens=4)))


def test_scoring_a_prompt_takes_no_prefix_hit():
    prompt = list(range(1, 17))
    rig = Rig()
    rig.run([request("warm", prompt)])
    scored = rig.run([request("scored", prompt, prompt_logprobs=2, max_tokens=2)])["scored"]
    assert scored.final.cached_tokens == 0
    assert scored.prompt_logprobs[0] is None
    assert len(scored.prompt_logprobs) == len(prompt)


def test_penalties_see_the_prompt_and_resumed_tokens():
    params = {"frequency_penalty": 2.0, "repetition_penalty": 3.0, "max_tokens": 60, "ignore_eos": True}
    whole = alone(request("r", [9, 9, 8, 7], **params))
    resumed = alone(request("r", [9, 9, 8, 7], resume_ids=whole.token_ids[:4], **params))
    assert resumed.token_ids == whole.token_ids[4:]
    assert whole.token_ids != alone(request("r", [9, 9, 8, 7], max_tokens=60, ignore_eos=True)).token_ids


def test_choices_of_one_prompt_compute_it_once():
    prompt = list(range(1, 66))
    rig = Rig(limits(step_tokens=16))
    choices = [request(f"c{i}", prompt, choice=i, temperature=1.0, seed=9, max_tokens=4) for i in range(6)]
    for choice in choices:
        rig.add(choice)
    rig.add(request("other", [3, 4, 5], max_tokens=4))
    rig.step()
    rig.step()
    assert rig.answers["other"].steps, "a request with another prompt need not wait for theirs"
    rig.drain()
    rig.assert_clean()
    assert [rig.answers[f"c{i}"].final.cached_tokens for i in range(6)] == [0] + [64] * 5
    for choice in choices:
        assert_same(rig.answers[choice.request_id], alone(choice))


def test_who_waited_for_a_prompt_that_was_aborted_computes_it():
    prompt = list(range(1, 66))
    rig = Rig(limits(step_tokens=16))
    rig.add(request("first", prompt, max_tokens=4))
    rig.add(request("second", prompt, max_tokens=4))
    rig.step()
    rig.engine.abort("first")
    rig.drain()
    rig.assert_clean()
    assert rig.answers["second"].final.cached_tokens == 16
    assert_same(rig.answers["second"], alone(request("second", prompt, max_tokens=4)))


def test_preempted_in_the_middle_of_scoring_it_goes_on_where_it_was():
    # The older one grows until the newer, whose prompt is scored two rows a step, has to go.
    older = request("older", [3] * 20, max_tokens=40, ignore_eos=True)
    newer = request("newer", list(range(40)), max_tokens=2, prompt_logprobs=2, ignore_eos=True)
    rig = Rig(limits(num_blocks=17, step_tokens=64, step_logit_rows=3, prefix_cache=False))
    rig.add(older)
    rig.add(newer)
    scored = 0
    while not rig.engine.stats().preemptions:
        scored = max(len(s.scores) for s in [*rig.running(), *rig.waiting()])
        rig.step()
    assert 0 < scored < 39, "it was preempted before or after scoring: the test shows nothing"
    rig.drain()
    for req in (older, newer):
        assert_same(rig.answers[req.request_id], alone(req))


def test_a_draw_depends_on_seed_choice_and_place():
    def tokens(seed: int, choice: int) -> list[int]:
        req = request("r", [1, 2, 3], temperature=2.0, seed=seed, choice=choice, max_tokens=16, ignore_eos=True)
        return alone(req).token_ids

    assert tokens(1, 0) == tokens(1, 0)
    assert len({tuple(tokens(seed, choice)) for seed in (1, 2, 2**64 - 1) for choice in (0, 1)}) == 6
    # The logits of a constant context would be the same in each place: only the place may then tell draws apart.
    flat = request("r", [1], temperature=1e6, seed=3, max_tokens=40, ignore_eos=True)
    assert len(set(alone(flat).token_ids)) > 10
