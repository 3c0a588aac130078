"""Requests with a grammar: no forbidden token is drawn, in any company and whatever fails; each ends where it must."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_engine
from rig import DEPTHS, EOS, HandLoader, Rig, alone, limits, request
from test_engine_same_tokens import assert_same, engines, requests, same_model

from grammars import RULES, VOCAB, VOCABULARY, check_answer, ids_of, text_of
from truffula.engine.constraints import GrammarCompiler
from truffula.errors import InvalidRequest
from truffula.items import Grammar
from truffula.types import MAX_VOCABULARIES

GRAMMARS = {name: rule.grammar for name, rule in RULES.items()}
ENDS = {
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 3),
    "stop_token_ids": st.sampled_from([[], [EOS], ids_of(b"a"), ids_of(b"}", b"c"), [*ids_of(b" "), EOS]]),
}


@st.composite
def constrained(draw, name: str = "r"):
    req = draw(requests(name))
    params = {key: draw(values) for key, values in ENDS.items()}
    changed = msgspec.structs.replace(req.params, max_tokens=draw(st.integers(3, 20)), **params)
    grammar = GRAMMARS[draw(st.sampled_from(sorted(GRAMMARS)))]
    return msgspec.structs.replace(req, params=changed, grammar=grammar)


def check(req, answer) -> None:
    """The answer holds; the only error there may be is that of a grammar that the stop ids make impossible."""
    if answer.finish_reason == "error":
        assert (answer.code, bool(req.params.stop_token_ids)) == ("grammar_failed", True), answer.final.error
        assert "its grammar: only a stop id" in answer.final.error.message
        return
    check_answer(req, answer.token_ids, answer.finish_reason, answer.final.stop_reason)
    wanted = req.params.logprobs
    assert len(answer.logprobs) == (0 if wanted is None else len(answer.token_ids))


def hold_company(data, lim, crowd) -> None:
    rig = Rig(lim, depth=data.draw(st.sampled_from([1, 2, 3]), label="depth"))
    for req in crowd:
        rig.add(req)
        for _ in range(data.draw(st.integers(0, 2), label="steps between")):
            rig.step()
    if data.draw(st.booleans(), label="a step fails"):
        rig.executable.faults.raise_on_step = rig.executable.steps + data.draw(st.integers(1, 9), label="which")
    rig.drain()
    rig.assert_clean()
    for req in crowd:
        answer = rig.answers[req.request_id]
        if answer.code == "generation_failed" and answer.final.error.message.endswith("scripted"):
            continue  # it failed alone
        assert_same(answer, alone(req, **same_model(lim)))
        if req.grammar is not None:
            check(req, answer)


@settings(max_examples=12, deadline=None)
@given(st.data(), engines())
def test_any_company_any_budget_any_memory(data, lim):
    crowd = [data.draw(constrained(f"c{i}")) for i in range(data.draw(st.integers(1, 4)))]
    crowd += [data.draw(requests(f"r{i}")) for i in range(data.draw(st.integers(0, 2)))]
    hold_company(data, lim, data.draw(st.permutations(crowd)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=300, deadline=None)
@given(st.data(), engines())
def test_any_company_at_length(data, lim):
    crowd = [data.draw(constrained(f"c{i}")) for i in range(data.draw(st.integers(1, 7)))]
    crowd += [data.draw(requests(f"r{i}")) for i in range(data.draw(st.integers(0, 3)))]
    hold_company(data, lim, data.draw(st.permutations(crowd)))


@settings(max_examples=20, deadline=None)
@given(constrained(), st.data())
def test_resumed_behind_any_of_its_tokens(req, data):
    whole = alone(req)
    if whole.finish_reason == "error":
        return
    shown = data.draw(st.integers(1, len(whole.token_ids)), label="shown")
    resumed = msgspec.structs.replace(req, resume_ids=whole.token_ids[:shown])
    answer = Rig(depth=data.draw(st.sampled_from(DEPTHS))).run([resumed])["r"]
    assert answer.token_ids == whole.token_ids[shown:]
    assert (answer.finish_reason, answer.final.stop_reason) == (whole.finish_reason, whole.final.stop_reason)
    check(resumed, answer)


def test_a_resumed_token_that_the_grammar_forbids_is_an_error():
    answer = alone(request("r", [1, 2], grammar=GRAMMARS["choice"], resume_ids=ids_of(b"red", b"blue")))
    assert (answer.code, answer.token_ids) == ("grammar_failed", [])
    assert "cannot continue its grammar" in answer.final.error.message


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_preempted_one_continues_its_grammar(depth):
    crowd = [
        request(f"r{i}", [i, i + 1, i + 2], max_tokens=24, ignore_eos=True, temperature=1.0, seed=i,
                grammar=GRAMMARS["open"], adapter="red")
        for i in range(6)
    ]  # fmt: skip
    rig = Rig(limits(num_blocks=12), depth=depth)
    rig.run(crowd)
    assert rig.engine.stats().preemptions > 0
    for req in crowd:
        assert_same(rig.answers[req.request_id], alone(req))
        check(req, rig.answers[req.request_id])


@pytest.mark.parametrize("depth", DEPTHS)
def test_with_run_ahead_the_next_token_waits_for_the_one_before(depth):
    rig = Rig(depth=depth)
    rig.add(request("c", [1, 2], max_tokens=12, ignore_eos=True, grammar=GRAMMARS["open"]))
    rig.add(request("free", [3, 4], max_tokens=12, ignore_eos=True))
    rig.drain()
    steps = {name: answer.steps for name, answer in rig.answers.items()}
    gaps = {later - before for before, later in zip(steps["c"], steps["c"][1:], strict=False)}
    assert gaps == {depth}
    assert {later - before for before, later in zip(steps["free"], steps["free"][1:], strict=False)} == {1}


def test_choices_of_one_prompt_are_drawn_apart_and_hit_its_prefix():
    prompt = list(range(1, 66))
    params = {"temperature": 1.5, "seed": 3, "max_tokens": 30, "logprobs": 2, "grammar": GRAMMARS["object"]}
    choices = [request(f"c{i}", prompt, choice=i, **params) for i in range(6)]
    rig = Rig(limits(step_tokens=16))
    rig.run(choices)
    assert len({text_of(rig.answers[one.request_id].token_ids) for one in choices}) > 3
    assert sorted(rig.answers[one.request_id].final.cached_tokens for one in choices) == [0] + [64] * 5
    for one in choices:
        assert_same(rig.answers[one.request_id], alone(one))
        check(one, rig.answers[one.request_id])


def test_a_finished_grammar_ends_the_answer_without_another_token():
    answer = alone(request("r", [1, 2], max_tokens=40, min_tokens=39, ignore_eos=True, grammar=GRAMMARS["object"]))
    assert (answer.finish_reason, answer.final.stop_reason) == ("stop", None)
    assert text_of(answer.token_ids).endswith(b"}")


def test_an_empty_answer_is_an_end_id_even_where_it_is_ignored():
    req = request("r", [1, 2], max_tokens=4, ignore_eos=True, logit_bias={EOS: 100.0}, grammar=GRAMMARS["empty"])
    assert alone(req).token_ids != [EOS], "the grammar allows more"
    only = msgspec.structs.replace(req, grammar=Grammar(key="nothing", source='start: ""'))
    answer = alone(only)
    assert (answer.token_ids, answer.finish_reason, answer.final.stop_reason) == ([EOS], "stop", EOS)


def test_an_answer_that_cannot_continue_ends_alone_with_the_reason():
    stuck = request(
        "stuck", [1], max_tokens=9, stop_token_ids=ids_of(b"9"), grammar=Grammar(key="9", source='start: "9"')
    )
    others = [request("free", [1], max_tokens=9), request("c", [1], max_tokens=30, grammar=GRAMMARS["object"])]
    rig = Rig()
    rig.run([stuck, *others])
    assert (rig.answers["stuck"].code, rig.answers["stuck"].token_ids) == ("grammar_failed", [])
    assert "only a stop id of the request could follow" in rig.answers["stuck"].final.error.message
    for one in others:
        assert_same(rig.answers[one.request_id], alone(one))


def test_a_grammar_beyond_the_limits_of_a_step_ends_alone(monkeypatch):
    monkeypatch.setattr("truffula.engine.constraints.MAX_SLOW_S", 1e9)  # the limit of time, which may come first
    rules = 'start: x\nx: x x | x x x | x x x x | y\ny: "a" | y y | z\nz: "a" z | z "a" | "a"'
    ambiguous = Grammar(key="ambiguous", source=rules)
    longest = {"max_tokens": 120, "logit_bias": {ids_of(b"aaa")[0]: 100.0}, "ignore_eos": True}
    rig = Rig()
    rig.run([request("h", [1], grammar=ambiguous, **longest), request("free", [1], max_tokens=9)])
    assert rig.answers["h"].code == "grammar_failed" and len(rig.answers["h"].token_ids) >= 10
    assert "cannot continue its grammar: Parser Error: Current row has" in rig.answers["h"].final.error.message
    assert_same(rig.answers["free"], alone(request("free", [1], max_tokens=9)))


def test_a_grammar_that_reached_its_limit_of_states_is_compiled_again_for_later_requests(monkeypatch):
    monkeypatch.setattr("truffula.engine.constraints.MAX_LEXER_STATES", 60)
    grammar = Grammar(key="states", source="start: /[abc]*a[abc]{9}x/")
    rig = Rig()
    long = {"max_tokens": 200, "temperature": 1.0, "ignore_eos": True, "grammar": grammar}
    rig.run([request("long", [1], seed=1, **long)])
    assert rig.answers["long"].code == "grammar_failed"
    assert "too many states" in rig.answers["long"].final.error.message
    rig.run([request("short", [1], seed=1, **long | {"max_tokens": 2})])
    assert (rig.answers["short"].finish_reason, len(rig.answers["short"].token_ids)) == ("length", 2)


def test_a_grammar_whose_masks_are_slow_ends_alone_and_is_not_served_again(monkeypatch):
    monkeypatch.setattr("truffula.engine.constraints.SLOW_MASK_S", 0.0)
    slow, free = request("slow", [1], max_tokens=50, grammar=GRAMMARS["any"]), request("free", [1], max_tokens=9)
    rig = Rig()
    rig.run([slow, free])
    assert_same(rig.answers["slow"], alone(slow))  # every mask is timed, and none is too slow
    monkeypatch.setattr("truffula.engine.constraints.MAX_SLOW_S", 0.0)
    for name, count in (("first", 0), ("again", 0)):
        rig.run(
            [request(name, [1], max_tokens=50, grammar=GRAMMARS["any"]), request(f"free {name}", [1], max_tokens=9)]
        )
        answer = rig.answers[name]
        assert (answer.code, len(answer.token_ids)) == ("grammar_failed", count)
        assert "while other requests waited" in answer.final.error.message
        assert rig.answers[f"free {name}"].token_ids == rig.answers["free"].token_ids
    assert "any" in rig.engine._grammars._too_slow


@pytest.mark.parametrize("source", ["start: (", '{"grammars": 7}', '{"no": 1}', "{", "", 'start: <|nowhere|> "a"'])
def test_a_grammar_that_does_not_compile_fails_its_requests_alone(source):
    bad = [request(f"bad{i}", [1], max_tokens=5, grammar=Grammar(key="bad", source=source)) for i in range(2)]
    rig = Rig()
    rig.run([*bad, request("free", [1], max_tokens=9)])
    for one in bad:
        assert rig.answers[one.request_id].code == "grammar_failed"
        assert "The grammar cannot be compiled" in rig.answers[one.request_id].final.error.message
    assert_same(rig.answers["free"], alone(request("free", [1], max_tokens=9)))


@pytest.mark.parametrize("end", ["compiled", "aborted", "late", "closed"])
def test_a_request_waits_for_its_grammar_and_delays_no_other(end):
    rig = Rig(loader=HandLoader())
    rig.hold_grammars = True
    slow = rig.engine._grammars._vocabularies[""][0]._lock
    deadline = rig.clock.now + 5 if end == "late" else None
    waits = request("waits", [1, 2], max_tokens=30, grammar=GRAMMARS["object"], adapter="red", deadline=deadline)
    with slow:
        rig.add(waits)
        rig.add(msgspec.structs.replace(waits, request_id="unlimited", deadline=None))
        for name in ("free", "red"):
            rig.add(request(name, [3, 4], max_tokens=9, adapter=None if name == "free" else name))
        while rig.answers["free"].final is None or rig.answers["red"].final is None:
            rig.step()
        assert rig.engine.stats().waiting == 2
        assert not rig.answers["waits"].token_ids and 0 < rig.engine.poll_timeout() < 0.1
        if end == "aborted":
            rig.engine.abort("waits")
        elif end == "late":
            rig.clock.now += 10
        check_engine(rig.engine)
        rig.step()
        assert (rig.answers["waits"].finish_reason or "none") == {"aborted": "abort", "late": "error"}.get(end, "none")
    if end == "closed":
        events = rig.engine.close()
        assert {event.error.code for event in events} == {"shutting_down"} and rig.engine.idle()
        return
    rig.hold_grammars = False
    rig.drain()
    rig.assert_clean()
    assert rig.engine.poll_timeout() is None, "an idle engine looks for nothing"
    check(waits, rig.answers["unlimited"])
    if end == "compiled":
        assert rig.answers["waits"].token_ids == rig.answers["unlimited"].token_ids


def test_a_grammar_that_is_compiled_in_vain_is_not_waited_for():
    rig = Rig()
    rig.hold_grammars = True
    with rig.engine._grammars._vocabularies[""][0]._lock:
        rig.add(request("gone", [1, 2], grammar=GRAMMARS["object"]))
        rig.engine.abort("gone")
        rig.step()
        assert rig.answers["gone"].finish_reason == "abort" and rig.engine.idle()
    rig.hold_grammars = False
    rig.step()
    assert rig.engine.poll_timeout() is None and not rig.engine._grammars.is_compiling()


def test_a_grammar_that_is_compiled_is_used_again_without_waiting():
    rig = Rig()
    rig.run([request("first", [1], max_tokens=20, grammar=GRAMMARS["any"])])
    rig.hold_grammars = True
    rig.add(request("again", [1], max_tokens=20, grammar=GRAMMARS["any"]))
    assert not rig.engine._grammars.is_compiling()
    rig.step()
    assert rig.answers["again"].token_ids


def test_the_cache_of_grammars_is_bounded(monkeypatch):
    monkeypatch.setattr("truffula.engine.constraints.MAX_GRAMMARS", 2)
    rig = Rig()
    for wave in range(2):
        names = sorted(GRAMMARS)[:5]
        rig.run([request(f"{name}{wave}", [1], max_tokens=9, grammar=GRAMMARS[name]) for name in names])
    assert len(rig.engine._grammars._compiled) == 2


def test_without_a_vocabulary_or_an_end_id_a_grammar_is_refused():
    lim = limits(eos_token_ids=())
    rig = Rig(lim)
    rig.engine._grammars = rig.engine._scheduler._grammars = type(rig.engine._grammars)(lim.vocab_size, ())
    for name, means in (("none", "no vocabulary"), ("no end", "no end-of-sequence token")):
        rig.run([request(name, [1], grammar=GRAMMARS["any"]), request(f"free {name}", [1], max_tokens=2)])
        assert rig.answers[name].code == "invalid_request" and means in rig.answers[name].final.error.message
        assert rig.answers[f"free {name}"].finish_reason == "length"
        rig.engine.set_vocabulary(msgspec.structs.replace(VOCABULARY, end_ids=[]))


def test_a_request_that_draws_nothing_needs_no_grammar():
    answer = alone(request("r", [1, 2, 3], max_tokens=0, prompt_logprobs=1, grammar=GRAMMARS["any"]))
    assert answer.finish_reason == "length" and len(answer.prompt_logprobs) == 3


def test_a_grammar_keeps_the_end_ids_of_a_vocabulary_that_was_dropped():
    """A sequence waits between its grammar's compilation and its matcher, while other adapters' vocabularies come."""
    compiler = GrammarCompiler(VOCAB, ())
    compiler.set_vocabulary(VOCABULARY)
    compiler.set_vocabulary(msgspec.structs.replace(VOCABULARY, key="own", end_ids=[VOCAB - 2]))
    grammar = msgspec.structs.replace(GRAMMARS["any"], key="own any", vocabulary="own")
    assert compiler.start(grammar)
    for number in range(MAX_VOCABULARIES):
        compiler.set_vocabulary(msgspec.structs.replace(VOCABULARY, key=str(number)))
    while not list(compiler.take_finished()):
        time.sleep(0.01)
    matcher = compiler.matcher(grammar, frozenset(), ignore_eos=False, min_tokens=0)
    for token in (*ids_of(b"1"), VOCAB - 2):
        matcher.advance(token)
    assert (matcher.finished, matcher.stop_id, matcher.error) == (True, VOCAB - 2, None)
    with pytest.raises(InvalidRequest, match="no vocabulary"):
        compiler.start(grammar)
    compiler.close()
