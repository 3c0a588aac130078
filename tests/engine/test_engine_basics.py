"""What the engine promises about one request: its ends, limits, scores and times."""

from __future__ import annotations

import pytest
from rig import EOS, VOCAB, HandLoader, Rig, alone, limits, request

from truffula.errors import AdapterNotFound
from truffula.params import EngineParams
from truffula.types import AdapterCommand, AdapterRef

PROMPT = [1, 2, 3, 4, 5]


def greedy_tokens(count: int = 20, prompt=PROMPT) -> list[int]:
    return alone(request("r", prompt, max_tokens=count, ignore_eos=True)).token_ids


def test_it_ends_with_length_at_max_tokens():
    answer = Rig().run([request("r", PROMPT, max_tokens=5, ignore_eos=True)])["r"]
    assert (len(answer.token_ids), answer.finish_reason, answer.final.stop_reason) == (5, "length", None)
    assert answer.final.prompt_tokens == 5


def test_a_stop_id_ends_it_and_is_its_last_token():
    tokens = greedy_tokens()
    stop = tokens[3]
    answer = alone(request("r", PROMPT, max_tokens=20, ignore_eos=True, stop_token_ids=[stop]))
    assert answer.token_ids == tokens[: tokens.index(stop) + 1]
    assert (answer.finish_reason, answer.final.stop_reason) == ("stop", stop)


def test_a_stop_on_the_last_allowed_token_says_stop():
    tokens = greedy_tokens()
    place = tokens.index(tokens[4])
    answer = alone(request("r", PROMPT, max_tokens=place + 1, ignore_eos=True, stop_token_ids=[tokens[4]]))
    assert (answer.finish_reason, answer.final.stop_reason) == ("stop", tokens[4])


def test_every_eos_ends_it_unless_ignored():
    tokens = greedy_tokens()
    answer = alone(request("r", PROMPT, max_tokens=20), eos_token_ids=(EOS, tokens[2]))
    assert (answer.finish_reason, answer.token_ids) == ("stop", tokens[: tokens.index(tokens[2]) + 1])
    ignored = alone(request("r", PROMPT, max_tokens=20, ignore_eos=True), eos_token_ids=(EOS, tokens[2]))
    assert (ignored.finish_reason, ignored.token_ids) == ("length", tokens)


def test_min_tokens_bans_every_end_until_then():
    forced = {token: -100.0 for token in range(VOCAB) if token not in (7, EOS)}
    answer = alone(request("r", PROMPT, max_tokens=20, min_tokens=4, logit_bias={**forced, EOS: 100.0}))
    assert answer.token_ids == [7, 7, 7, 7, EOS]
    assert answer.finish_reason == "stop"
    other = alone(
        request("r", PROMPT, max_tokens=20, min_tokens=4, stop_token_ids=[7], ignore_eos=True, logit_bias=forced)
    )
    assert 7 not in other.token_ids[:4]
    assert (other.token_ids[4:], other.finish_reason) == ([7], "stop")


def test_without_max_tokens_it_fills_the_model():
    answer = alone(request("r", PROMPT, max_tokens=None, ignore_eos=True), max_model_len=40)
    assert (len(answer.token_ids), answer.finish_reason) == (35, "length")


def test_without_max_tokens_it_fills_the_memory_when_that_is_less():
    answer = alone(request("r", PROMPT, max_tokens=None, ignore_eos=True), num_blocks=5)
    assert (len(answer.token_ids), answer.finish_reason) == (4 * 4 + 1 - 5, "length")


def test_max_tokens_beyond_the_model_ends_there():
    answer = alone(request("r", PROMPT, max_tokens=10_000, ignore_eos=True), max_model_len=40)
    assert (len(answer.token_ids), answer.finish_reason) == (35, "length")


def test_prompt_logprobs_are_those_of_the_same_tokens_generated():
    generated = alone(request("r", PROMPT, max_tokens=8, ignore_eos=True, logprobs=3))
    scored = alone(request("s", PROMPT + generated.token_ids, max_tokens=0, prompt_logprobs=3))
    assert scored.token_ids == []
    assert scored.finish_reason == "length"
    assert scored.prompt_logprobs[0] is None
    tail = scored.prompt_logprobs[len(PROMPT) :]
    assert [entry[0] for entry in tail] == pytest.approx(generated.logprobs)
    assert [entry[1] for entry in tail] == generated.top_logprobs


def test_the_chosen_id_is_in_the_top_list_only_when_it_is_among_the_best():
    answer = alone(request("r", PROMPT, max_tokens=30, temperature=3.0, seed=5, ignore_eos=True, logprobs=2))
    assert all(len(top) == 2 for top in answer.top_logprobs)
    assert any(token not in dict(top) for token, top in zip(answer.token_ids, answer.top_logprobs, strict=True))


@pytest.mark.parametrize("chosen_only", [0, None])
def test_logprobs_zero_gives_the_chosen_one_and_none_gives_nothing(chosen_only):
    answer = alone(request("r", PROMPT, max_tokens=3, ignore_eos=True, logprobs=chosen_only))
    assert len(answer.logprobs) == (3 if chosen_only == 0 else 0)
    assert answer.top_logprobs == ([[], [], []] if chosen_only == 0 else [])


def test_scoring_alone_of_one_token_and_of_nothing_ends_at_once():
    scored = alone(request("r", [4], max_tokens=0, prompt_logprobs=1))
    assert (scored.prompt_logprobs, scored.finish_reason) == ([None], "length")
    nothing = alone(request("r", PROMPT, max_tokens=0))
    assert (nothing.prompt_logprobs, nothing.token_ids, nothing.finish_reason) == (None, [], "length")


def test_resumed_behind_its_last_token_it_only_ends():
    tokens = greedy_tokens(6)
    full = alone(request("r", PROMPT, max_tokens=6, ignore_eos=True, resume_ids=tokens))
    assert (full.token_ids, full.finish_reason) == ([], "length")
    stopped = alone(request("r", PROMPT, max_tokens=9, stop_token_ids=[tokens[5]], resume_ids=tokens))
    assert (stopped.token_ids, stopped.finish_reason, stopped.final.stop_reason) == ([], "stop", tokens[5])


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (request("r", []), "invalid_request", "prompt"),
        (request("r", [1, VOCAB]), "invalid_request", "prompt"),
        (request("r", [-1]), "invalid_request", "prompt"),
        (request("r", [2**70]), "invalid_request", "prompt"),
        (request("r", [1.5]), "invalid_request", "prompt"),
        (request("r", [1], resume_ids=[VOCAB]), "invalid_request", "resume_ids"),
        (request("r", [1], stop_token_ids=[VOCAB]), "invalid_request", "stop_token_ids"),
        (request("r", [1], logit_bias={VOCAB: 1.0}), "invalid_request", "logit_bias"),
        (request("r", [1] * 128), "prompt_too_long", "prompt"),
        (request("r", [1] * 129, max_tokens=0, prompt_logprobs=0), "prompt_too_long", "prompt"),
        (request("r", [1] * 30, max_tokens=90), "insufficient_memory", "max_tokens"),
    ],
)
def test_a_bad_request_is_answered_by_one_final_error(bad, code, param):
    rig = Rig(limits(num_blocks=20))
    rig.add(bad)
    assert rig.engine._scheduler.has_work()
    rig.drain()
    answer = rig.answers["r"]
    assert (answer.finish_reason, answer.code, answer.final.error.param) == ("error", code, param)
    rig.assert_clean()


def test_a_second_request_of_the_same_id_is_refused_and_the_first_goes_on():
    rig = Rig()
    rig.add(request("r", PROMPT, max_tokens=4, ignore_eos=True))
    rig.step()
    rig.engine.add(request("r", [9]))
    events = rig.engine.step()
    refused = [event for event in events if event.error is not None]
    assert [event.error.param for event in refused] == ["request_id"]
    while not rig.engine.idle():
        events += rig.engine.step()
    assert [event.finish_reason for event in events if event.finish_reason] == ["error", "length"]


def test_the_queue_has_an_end():
    rig = Rig(limits(max_waiting=2, max_running=1))
    for i in range(4):
        rig.add(request(f"r{i}", PROMPT))
    rig.drain()
    assert [rig.answers[f"r{i}"].code for i in range(4)] == [None, None, "overloaded", "overloaded"]
    assert rig.answers["r3"].final.error.data == {"waiting": 2, "limit": 2}


def test_an_aborted_request_frees_everything_at_once():
    rig = Rig()
    rig.add(request("r", PROMPT, max_tokens=100, adapter="red", ignore_eos=True))
    for _ in range(5):
        rig.step()
    assert rig.engine.stats().used_blocks
    rig.engine.abort("r")
    assert rig.engine.stats().used_blocks == 0
    assert all(state.leases == 0 for state in rig.adapters.states())
    rig.step()
    assert rig.answers["r"].finish_reason == "abort"
    rig.engine.abort("r")
    assert rig.step() == []


def test_out_of_time_in_the_queue_and_while_running():
    rig = Rig(limits(max_running=1))
    now = rig.clock.now
    rig.add(request("runs", PROMPT, max_tokens=100, ignore_eos=True, queue_deadline=now + 1, deadline=now + 5))
    rig.add(request("waits", PROMPT, queue_deadline=now + 1))
    rig.add(request("waits too", PROMPT, deadline=now + 2))
    rig.step()
    rig.clock.now = now + 1.5
    rig.step()
    assert (rig.answers["waits"].code, rig.answers["runs"].final) == ("queue_timeout", None)
    rig.clock.now = now + 2.5
    rig.step()
    assert rig.answers["waits too"].code == "queue_timeout"
    rig.clock.now = now + 5.5
    rig.step()
    assert (rig.answers["runs"].code, len(rig.answers["runs"].token_ids)) == ("deadline_exceeded", 3)
    rig.assert_clean()


def test_the_wait_for_a_load_is_not_the_wait_for_a_place():
    rig = Rig(limits(max_running=1), loader=HandLoader(automatic=False))
    now = rig.clock.now
    for name in ("first", "behind"):
        rig.add(request(name, PROMPT, adapter="red", max_tokens=50, ignore_eos=True, queue_deadline=now + 1))
    rig.add(request("out of time", PROMPT, adapter="red", queue_deadline=now + 1, deadline=now + 2))
    for second in range(1, 8):
        rig.step()
        rig.clock.now = now + second
    assert (rig.answers["first"].final, rig.answers["behind"].final) == (None, None)
    assert rig.answers["out of time"].code == "queue_timeout"
    rig.loader.finish()
    rig.step()
    rig.step()
    assert rig.answers["first"].token_ids  # and the one behind waits for its place from here on
    rig.clock.now += 8
    rig.step()
    assert rig.answers["behind"].code == "queue_timeout"
    rig.drain()
    rig.assert_clean()


def test_times_say_where_the_seconds_went():
    rig = Rig(loader=HandLoader(automatic=False))
    arrival = rig.clock.now - 1.0
    rig.add(request("r", PROMPT, adapter="red", max_tokens=3, ignore_eos=True, arrival=arrival))
    rig.step()
    assert not rig.engine._scheduler.has_work()
    assert not rig.engine.idle()
    rig.clock.now += 2.0
    rig.loader.finish()
    rig.step()
    rig.clock.now += 4.0
    rig.drain()
    times = rig.answers["r"].final.times
    assert times.load_s == pytest.approx(2.0, abs=0.1)
    assert times.queue_s == pytest.approx(3.0, abs=0.1)
    assert times.ttft_s == pytest.approx(3.0, abs=0.1)
    assert times.total_s == pytest.approx(7.0, abs=0.1)


def test_a_loading_adapter_delays_only_its_own_requests():
    rig = Rig(loader=HandLoader(automatic=False))
    rig.add(request("slow", PROMPT, adapter="slow", max_tokens=2, ignore_eos=True))
    rig.add(request("bad", PROMPT, adapter="bad", max_tokens=2))
    rig.add(request("base", PROMPT, max_tokens=50, ignore_eos=True))
    for _ in range(50):
        rig.step()
    assert rig.answers["base"].steps == list(range(1, 51))
    assert rig.loader.started == ["slow", "bad"]
    rig.loader.finish()
    rig.drain()
    assert rig.answers["bad"].code == "adapter_load_failed"
    assert rig.answers["slow"].finish_reason == "length"


def test_a_failed_load_expires():
    rig = Rig()
    first = rig.run([request("first", PROMPT, adapter="bad")])["first"]
    second = rig.run([request("second", PROMPT, adapter="bad")])["second"]
    assert first.code == second.code == "adapter_load_failed"
    assert len(rig.loader.started) == 1
    rig.clock.now += 11.0
    rig.run([request("third", PROMPT, adapter="bad")])
    assert len(rig.loader.started) == 2


def test_one_load_for_many_waiters():
    rig = Rig(loader=HandLoader(automatic=False))
    for i in range(6):
        rig.add(request(f"r{i}", PROMPT, adapter="red", max_tokens=2))
    rig.step()
    rig.loader.finish()
    rig.drain()
    assert rig.loader.started == ["red"]
    assert all(answer.finish_reason in ("stop", "length") for answer in rig.answers.values())


def test_a_preempted_request_keeps_its_generation_through_a_reload():
    def ref(fingerprint: str) -> AdapterRef:
        return AdapterRef(name="red", locator="red", fingerprint=fingerprint)

    lim = limits(num_blocks=12)
    crowd = [request(f"r{i}", [i] * 6, adapter=ref("old"), max_tokens=20, ignore_eos=True) for i in range(5)]
    rig = Rig(lim)
    for req in crowd:
        rig.add(req)
    while not rig.engine.stats().preemptions:
        rig.step()
    newer = request("new", [3] * 6, adapter=ref("new"), max_tokens=20, ignore_eos=True)
    rig.add(newer)
    rig.drain()
    for req in [*crowd, newer]:
        assert rig.answers[req.request_id].token_ids == alone(req).token_ids
    assert alone(newer).token_ids != alone(request("r3", [3] * 6, adapter=ref("old"), max_tokens=20)).token_ids


def test_adapter_commands_do_not_wait():
    rig = Rig(loader=HandLoader(automatic=False))
    red = AdapterRef(name="red", locator="red")
    loaded = rig.engine.command(AdapterCommand(action="load", ref=red, pinned=True))
    assert not loaded.done()
    assert [s.status for s in rig.engine.command(AdapterCommand(action="list")).result()] == ["loading"]
    rig.loader.finish()
    rig.step()
    (state,) = rig.engine.command(AdapterCommand(action="list")).result()
    assert loaded.result() == [state] and (state.status, state.pinned) == ("resident", True)
    assert rig.engine.command(AdapterCommand(action="unload", ref=red)).result() == []
    assert isinstance(rig.engine.command(AdapterCommand(action="unload", ref=red)).exception(), AdapterNotFound)


def test_closing_ends_every_request():
    rig = Rig()
    rig.add(request("runs", PROMPT, max_tokens=50, ignore_eos=True))
    rig.step()
    rig.add(request("waits", PROMPT))
    events = rig.engine.close()
    assert {event.request_id: event.error.code for event in events} == {
        "runs": "shutting_down",
        "waits": "shutting_down",
    }
    assert rig.engine.close() == []


def test_a_missing_seed_is_the_same_on_every_run_and_differs_by_choice():
    def tokens(choice: int) -> list[int]:
        return alone(request("r", PROMPT, temperature=1.0, max_tokens=12, ignore_eos=True, choice=choice)).token_ids

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)


def test_every_parameter_of_the_engine_is_used():
    """Every field of the engine's parameters ends a sequence or is carried to the sampler."""
    ends = {"max_tokens", "min_tokens", "stop_token_ids", "ignore_eos"}
    rows = {
        "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty",
        "presence_penalty", "logit_bias", "seed", "logprobs", "prompt_logprobs", "logprobs_of",
    }  # fmt: skip
    assert set(EngineParams.__struct_fields__) == ends | rows
