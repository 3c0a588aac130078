"""Activated LoRA acts from the last invocation in the prompt on; virtual tokens come before a prompt, unseen."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from rig import DEPTHS, FACTS, INVOCATION, VOCAB, Rig, alone, composed, limits, request

from truffula.lora.image import AdapterFacts

PLAIN = [1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14]
CALLED = [*PLAIN, *INVOCATION, 15, 16, 17]


@pytest.mark.parametrize(
    ("ids", "part", "first"),
    [
        ([1, 2, 3], [2], 1),
        ([1, 2, 1, 2, 3], [1, 2], 2),
        ([1, 1, 1], [1, 1], 1),
        ([1, 2], [1, 2, 3], None),
        ([2, 1], [1, 2], None),
        ([256, 0], [1, 0], None),
    ],
)
def test_the_last_occurrence(ids, part, first) -> None:
    assert AdapterFacts(invocation=tuple(part)).acts_from(ids) == first


def test_without_an_invocation_in_the_prompt_the_base_answers() -> None:
    base = alone(request("r", PLAIN, max_tokens=9, ignore_eos=True))
    # The bias makes the completion invoke, which counts for nothing.
    spoken = request("r", PLAIN, max_tokens=9, ignore_eos=True, logit_bias=dict.fromkeys(INVOCATION, 50.0))
    assert alone(request("r", PLAIN, max_tokens=9, ignore_eos=True, adapter="call")).token_ids == base.token_ids
    assert set(alone(spoken).token_ids) == set(INVOCATION)
    called = msgspec.structs.replace(spoken, adapter=request("r", [1], adapter="call").adapter)
    assert alone(called).token_ids == alone(spoken).token_ids


def test_the_rows_before_the_invocation_are_the_bases() -> None:
    rig = Rig(limits(step_tokens=64))
    rig.add(request("called", CALLED, max_tokens=3, adapter="call"))
    segments = []
    rig.step()  # its adapter is loaded
    for _ in range(3):
        rig.step()
        i = rig.executable._inputs[0]
        segments.append((i.T, i.G, int(i.position[0])))
    assert segments == [(len(PLAIN), 0, 0), (5, 1, len(PLAIN)), (1, 1, len(CALLED))]
    rig.drain()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("num_states", [0, 40])
def test_blocks_before_the_invocation_are_shared_with_the_base_both_ways(depth, num_states) -> None:
    for first, then in ((None, "call"), ("call", None), ("call", "call2")):
        rig = Rig(limits(num_states=num_states), depth=depth)
        prompts = {None: [*PLAIN, 1], "call": CALLED, "call2": CALLED}
        rig.run([request("first", prompts[first], adapter=first, max_tokens=3)])
        req = request("then", prompts[then], adapter=then, max_tokens=5)
        answer = rig.run([req])["then"]
        assert answer.final.cached_tokens == len(PLAIN)
        assert answer.token_ids == alone(req, num_states=min(num_states, 4)).token_ids


def test_a_generated_invocation_does_not_give_its_block_to_a_prompt_with_the_same_ids() -> None:
    """The block's ids and generation are equal, but the adapter acts from another of its tokens on."""
    rig = Rig(limits(block_size=8))
    rig.run([request("first", [1, 2, 3, 4, 5, 6, 5], adapter="call", max_tokens=6, logit_bias={6: 90.0})])
    assert rig.answers["first"].token_ids[0] == 6
    then = request("then", [1, 2, 3, 4, 5, 6, 5, 6, 9], adapter="call", max_tokens=6, ignore_eos=True)
    answer = rig.run([then])["then"]
    assert answer.final.cached_tokens == 0
    assert answer.token_ids == alone(then).token_ids


def test_a_request_waits_for_the_base_that_computes_its_prefix() -> None:
    prompt = [*range(20, 50), *PLAIN]
    rig = Rig(limits(step_tokens=8))
    rig.add(request("base", prompt, max_tokens=4))
    rig.add(request("call", [*prompt, *INVOCATION], adapter="call", max_tokens=4))
    rig.drain()
    assert rig.answers["call"].final.cached_tokens == 40


# A vocabulary of its own

FEWER = FACTS["fewer"].vocab_size


def test_only_ids_of_its_own_vocabulary_are_drawn() -> None:
    """Beside the base, whose rows draw any; bans and top lists are of these ids, too."""
    asked = {"temperature": 5.0, "max_tokens": 90, "ignore_eos": True, "logprobs": VOCAB, "min_tokens": 5}
    rig = Rig(limits(max_model_len=256))
    rig.run([request("mine", [1, 2], adapter="fewer", **asked), request("base", [1, 2], **asked)])
    mine, base = rig.answers["mine"], rig.answers["base"]
    assert max(mine.token_ids) < FEWER <= max(base.token_ids)
    for answer, count in ((mine, FEWER), (base, VOCAB)):
        assert {len(tops) for tops in answer.top_logprobs} == {count}
        weights = [sum(np.exp(logprob) for _, logprob in tops) for tops in answer.top_logprobs]
        np.testing.assert_allclose(weights, 1.0, rtol=1e-5)
    assert alone(request("mine", [1, 2], adapter="fewer", **asked), max_model_len=256).token_ids == mine.token_ids


@pytest.mark.parametrize("asked", [{"logit_bias": {FEWER: 1.0}}, {"stop_token_ids": (FEWER,)}, {}])
def test_ids_beyond_it_are_refused(asked) -> None:
    prompt = [1] if asked else [1, FEWER]
    answer = alone(request("r", prompt, adapter="fewer", max_tokens=3, **asked))
    assert answer.code == "invalid_request" and f"{FEWER}, outside 0 .. {FEWER - 1}" in answer.final.error.message
    assert alone(request("r", prompt, max_tokens=3, **asked)).code is None


def test_it_acts_with_others_of_its_vocabulary_only() -> None:
    answer = alone(request("r", [1], adapter=composed({"fewer": 0.5, "call": 1.0}), max_tokens=2))
    assert answer.code == "invalid_request" and "vocabulary of its own" in answer.final.error.message
    assert alone(request("r", [1], adapter=composed({"fewer": 0.5}), max_tokens=2)).code is None


# Virtual tokens

COUNT = len(FACTS["soft"].virtual_ids)


def test_virtual_tokens_are_computed_and_never_seen() -> None:
    rig = Rig()
    prompt = list(range(1, 12))
    req = request("soft", prompt, adapter="soft", max_tokens=6, ignore_eos=True, prompt_logprobs=1, logprobs=1)
    rig.add(req)
    rig.step()  # its adapter is loaded
    rig.step()
    i = rig.executable._inputs[0]
    assert i.token_ids[: i.T].tolist() == [*FACTS["soft"].virtual_ids, *prompt]
    assert i.position[: i.T].tolist() == list(range(COUNT + len(prompt)))
    rig.drain()
    rig.assert_clean()
    answer = rig.answers["soft"]
    assert max(answer.token_ids) < VOCAB
    assert answer.final.prompt_tokens == len(prompt) == len(answer.prompt_logprobs)
    assert rig.engine.stats().prompt_tokens == len(prompt)
    penalised = request("soft", prompt, adapter="soft", max_tokens=6, ignore_eos=True, repetition_penalty=1.3)
    assert len(alone(penalised).token_ids) == 6


def test_the_prefix_cache_holds_virtual_tokens_of_its_adapter_alone() -> None:
    rig = Rig()
    prompt = list(range(1, 17))
    rig.run([request("one", prompt, adapter="soft", max_tokens=2), request("base", prompt, max_tokens=2)])
    again = request("again", prompt, adapter="soft", max_tokens=5)
    answer = rig.run([again])["again"]
    assert answer.final.cached_tokens == 20 - COUNT
    assert answer.token_ids == alone(again).token_ids


def test_a_client_cannot_send_virtual_ids() -> None:
    virtual = FACTS["soft"].virtual_ids[0]
    rig = Rig()
    rig.run([request("a", [virtual], adapter="soft"), request("b", [1], resume_ids=[virtual], adapter="soft")])
    assert [rig.answers[name].code for name in "ab"] == ["invalid_request", "invalid_request"]


def test_virtual_tokens_count_in_the_models_length_and_in_memory() -> None:
    rig = Rig(limits(max_model_len=20))
    fits = request("fits", [1] * 14, adapter="soft", max_tokens=None, ignore_eos=True)
    long = request("long", [1] * 15, adapter="soft", max_tokens=4)
    answers = rig.run([fits, long])
    assert len(answers["fits"].token_ids) == 20 - 14 - COUNT
    assert (answers["long"].code, answers["long"].final.prompt_tokens) == ("prompt_too_long", 15)
    assert f"{COUNT} virtual tokens" in answers["long"].final.error.message
    full = Rig(limits(num_blocks=6, block_size=4))
    answers = full.run(
        [request("none", [1] * 14, adapter="soft", max_tokens=3), request("all", [1] * 14, max_tokens=3)]
    )
    assert (answers["none"].code, answers["all"].code) == ("insufficient_memory", None)
    whole = full.run([request("open", [1] * 14, adapter="soft", max_tokens=None, ignore_eos=True)])["open"]
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 2)


def test_a_request_that_was_resumed_behind_its_last_token_ends() -> None:
    lim = limits(max_model_len=20)
    whole = Rig(lim).run([request("r", [1] * 12, adapter="soft", max_tokens=9, ignore_eos=True)])["r"]
    resumed = request("r", [1] * 12, adapter="soft", max_tokens=9, ignore_eos=True, resume_ids=whole.token_ids)
    answer = Rig(lim).run([resumed])["r"]
    assert (len(whole.token_ids), answer.token_ids, answer.finish_reason) == (3, [], "length")


def test_adapters_that_begin_at_different_tokens_act_together() -> None:
    req = request("r", CALLED, adapter=composed({"call": 0.5, "later": -1.0, "red": 2.0}), max_tokens=4)
    rig = Rig(limits(step_tokens=64))
    rig.add(req)
    acting = []
    while len(acting) < 4:
        before = rig.executable.steps
        rig.step()
        i = rig.executable._inputs[0]
        if rig.executable.steps == before:  # its adapters are loaded, one a step
            continue
        acting.append((i.T, sorted(i.seg_weight[: i.G].tolist())))
    assert acting == [(12, [2.0]), (2, [0.5, 2.0]), (3, [-1.0, 0.5, 2.0]), (1, [-1.0, 0.5, 2.0])]
    rig.drain()
    again = msgspec.structs.replace(req, request_id="again")
    rig.run([again, request("red", PLAIN, adapter=composed({"red": 2.0}))])
    assert rig.answers["red"].final.cached_tokens == 8
    assert rig.answers["again"].token_ids == rig.answers["r"].token_ids == alone(req).token_ids


@pytest.mark.parametrize("weights", [{"soft": 0.5}, {"soft": 1.0, "red": 1.0}])
def test_virtual_tokens_are_not_composed(weights) -> None:
    rig = Rig()
    answers = rig.run([request("r", PLAIN, adapter=composed(weights)), request("ok", PLAIN, adapter="soft")])
    assert (answers["r"].code, answers["ok"].code) == ("invalid_request", None)
    assert "virtual tokens" in answers["r"].final.error.message


# Keys and values that an adapter gives

GIVEN = len(FACTS["prefix"].virtual_ids)


def test_given_keys_and_values_are_written_and_not_computed() -> None:
    rig = Rig()
    prompt = list(range(1, 12))
    req = request("r", prompt, adapter="prefix", max_tokens=6, ignore_eos=True, prompt_logprobs=1)
    rig.add(req)
    rig.step()  # its adapter is loaded
    rig.step()
    i = rig.executable._inputs[0]
    assert i.token_ids[: i.T].tolist() == prompt
    assert i.position[: i.T].tolist() == list(range(GIVEN, GIVEN + len(prompt)))
    rig.drain()
    rig.assert_clean()
    answer = rig.answers["r"]
    assert answer.final.prompt_tokens == len(prompt) == len(answer.prompt_logprobs)
    assert answer.token_ids != alone(request("r", prompt, max_tokens=6, ignore_eos=True)).token_ids


@pytest.mark.parametrize("depth", DEPTHS)
def test_full_blocks_of_a_prefix_are_shared_and_the_rest_is_written_again(depth) -> None:
    rig = Rig(depth=depth)
    written, write = [], rig.executable.write_kv

    def noted(op, slots, keys, values) -> None:
        written.append(len(slots))
        write(op, slots, keys, values)

    rig.executable.write_kv = noted
    reqs = [request(str(n), [n] * 9, adapter="prefix", max_tokens=4) for n in range(1, 4)]
    for req in reqs:
        rig.run([req])
    assert written == [GIVEN, GIVEN - 4, GIVEN - 4]
    again = request("again", [1] * 9, adapter="prefix", max_tokens=4)
    rig.run([again])
    assert written[3:] == []
    assert rig.answers["again"].final.cached_tokens == 12 - GIVEN
    for req in (*reqs, again):
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids


def test_a_preempted_sequence_and_a_failed_step_write_the_prefix_again() -> None:
    crowd = [request(f"r{n}", [n, n + 1], adapter="prefix", max_tokens=24, ignore_eos=True) for n in range(5)]
    rig = Rig(limits(num_blocks=16, prefix_cache=False))
    rig.executable.faults.raise_on_step = 1
    rig.run(crowd)
    assert rig.engine.stats().preemptions > 0
    for req in crowd:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids
