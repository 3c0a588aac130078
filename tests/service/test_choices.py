"""The machine between token events and text, by pushing events: no engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import texts_with, tiny_info
from tiny_tokenizers import byte_level, byte_level_json, metaspace, sentence_piece, word_piece
from tokenizers import Tokenizer as Library

from examples import examples
from truffula.errors import EngineDied
from truffula.params import SamplingParams
from truffula.service.choices import collect
from truffula.service.core import Service
from truffula.service.files import LoadedTexts
from truffula.text.tokenizer import Tokenizer
from truffula.types import Completion, GenerateRequest, RequestTimes, TextDelta, TokenEvent

EOS = 1


def service(tokenizer: Tokenizer | None = None, **info: object) -> Service:
    return Service(tiny_info(**info), texts=texts_with(byte_level() if tokenizer is None else tokenizer))


def play(
    params: SamplingParams,
    ids: list[int],
    *,
    tokenizer: Tokenizer | None = None,
    cuts: list[int] = (),
    end: str = "length",
) -> tuple[list[TextDelta], bool]:
    """One choice fed with ``ids`` in events of the sizes ``cuts`` (then one by one). Also says whether it asked for an
    abort.
    """
    state = service(tokenizer).open(GenerateRequest(prompt=[5, 6], params=params))
    (request,) = state.engine_requests
    sizes, at, deltas = list(cuts), 0, []
    while not state.done:
        size = max(1, sizes.pop(0)) if sizes else 1
        chunk, at = ids[at : at + size], at + size
        last = at >= len(ids)
        wants = params.logprobs is not None
        event = TokenEvent(
            request_id=request.request_id,
            token_ids=chunk,
            logprobs=[-float(i) for i in chunk] if wants else [],
            top_logprobs=[[(i, -float(i)), (7, -50.0)] for i in chunk] if wants else [],
            finish_reason=end if last else None,
            stop_reason=chunk[-1] if last and end == "stop" else None,
            prompt_tokens=2,
        )
        deltas += state.push(event)
    return deltas, bool(state.take_aborts())


def check_deltas(deltas: list[TextDelta], params: SamplingParams) -> Completion:
    """What holds for any request's deltas; returns their fold."""
    choices = {delta.choice for delta in deltas}
    for choice in choices:
        own = [delta for delta in deltas if delta.choice == choice]
        assert [delta.finish_reason is not None for delta in own] == [False] * (len(own) - 1) + [True]
        for delta in own:
            assert delta.text == "".join(piece.text for piece in delta.tokens if piece.shown)
            assert delta.tokens or delta.finish_reason or delta.prompt
        totals = own[-1].totals
        assert totals is not None
        assert totals.completion_tokens == sum(len(delta.tokens) for delta in own)
        if totals.completion_tokens and own[-1].finish_reason in ("stop", "length"):
            assert own[-1].tokens, "the last token rides on the terminal delta"
    return collect(deltas)


LIBRARY = Library.from_buffer(byte_level_json())
ids_of = st.lists(st.integers(0, 425), min_size=1, max_size=25).map(lambda ids: [i for i in ids if i != EOS] or [5])
texts = st.lists(
    st.sampled_from(["the ", "Lorax", " spoke", "🌲", "é", "ab", "aab", "<|role|>", "東京"]), min_size=1, max_size=10
).map(lambda parts: byte_level().encode("".join(parts)))
WITH_SPECIAL = ("<|role|>", "b<|role|>", "<|role|>a", "e|>é", "<|role|><|role|>", "<|role|> spoken", "x<|")
stops = st.lists(
    st.sampled_from(["a", "ab", "the L", "x s", "京", "🌲é", "aaab", "spoke", "\ufffd", *WITH_SPECIAL]),
    max_size=3,
    unique=True,
)


def runs(ids: list[int]) -> list[tuple[bool, str]]:
    """The text of ``ids`` by the library, cut where special tokens are: (is a special token, text)."""
    special = {i for i, token in LIBRARY.get_added_tokens_decoder().items() if token.special}
    groups = itertools.groupby(enumerate(ids), lambda item: item[0] if item[1] in special else -1)
    listed = [(at >= 0, [token for _, token in group]) for at, group in groups]
    return [(is_special, LIBRARY.decode(group, skip_special_tokens=False)) for is_special, group in listed]


def naive_text(ids: list[int], limit: int | None, skip: bool) -> str | None:
    """What is shown of ``ids`` up to ``limit`` characters of their text with special tokens.

    None where a special token lies within a character: then the two texts are not cut at the same places.
    """
    text, done = "", 0
    for is_special, run in runs(ids):
        if "\ufffd" in run and limit is not None and skip:
            return None
        room = len(run) if limit is None else max(0, min(len(run), limit - done))
        text += "" if is_special and skip else run[:room]
        done += len(run)
    return text


@settings(max_examples=examples(150, 400), deadline=None)
@given(
    ids=ids_of | texts,
    stop=stops,
    cuts=st.lists(st.integers(1, 5), max_size=10),
    include=st.booleans(),
    skip=st.booleans(),
    end=st.sampled_from(["length", "eos", "abort"]),
)
def test_text_is_the_decode_up_to_the_first_stop_however_events_are_cut(
    ids: list[int], stop: list[str], cuts: list[int], include: bool, skip: bool, end: str
) -> None:
    """Against a naive reading by the library: find the stop that is complete first in the text with special tokens."""
    tokenizer = byte_level()
    params = SamplingParams(
        max_tokens=None, stop=tuple(stop), include_stop=include, skip_special_tokens=skip, logprobs=1, seed=3
    )
    given_ids = [*ids, EOS] if end == "eos" else ids
    deltas, aborted = play(params, given_ids, cuts=cuts, end="stop" if end == "eos" else end)
    answer = check_deltas(deltas, params).choices[0]

    full = LIBRARY.decode(ids, skip_special_tokens=False)
    hits = sorted((full.find(s) + len(s), -len(s), s) for s in stop if s in full)
    if hits:
        stop_end, length, matched = hits[0]
        expected = naive_text(ids, stop_end if include else stop_end + length, skip)
        if expected is not None:
            assert answer.text == expected
        assert (answer.finish_reason, answer.stop_reason, answer.eos) == ("stop", matched, False)
        assert len(answer.tokens) <= len(given_ids)
        if len(answer.tokens) < len(given_ids):
            assert aborted or cuts
    else:
        written = [*ids, EOS] if end == "eos" and include else ids
        assert answer.text == LIBRARY.decode(written, skip_special_tokens=skip)
        assert answer.token_ids == given_ids
        assert answer.finish_reason == ("stop" if end == "eos" else end)
        assert (answer.eos, answer.stop_reason, aborted) == (end == "eos", None, False)
    for piece in answer.tokens:
        assert piece.special == (piece.id in tokenizer.special_ids)
        assert (piece.logprob, piece.top[0].id) == (-float(piece.id), piece.id)
    # No character of the stop text was ever out, in any prefix of the stream.
    out = ""
    for delta in deltas:
        out += delta.text
        assert answer.text.startswith(out)


@settings(max_examples=100, deadline=None)
@given(ids=ids_of, stop=stops, one=st.lists(st.integers(1, 9), max_size=9), two=st.lists(st.integers(1, 9), max_size=9))
def test_the_fold_does_not_depend_on_how_events_are_cut(
    ids: list[int], stop: list[str], one: list[int], two: list[int]
) -> None:
    params = SamplingParams(max_tokens=None, stop=tuple(stop), seed=3)
    answers = [collect(play(params, ids, cuts=cuts)[0]).choices[0] for cuts in (one, two)]
    for name in ("text", "tokens", "finish_reason", "stop_reason", "eos"):
        assert getattr(answers[0], name) == getattr(answers[1], name)


def test_an_emoji_over_four_tokens_comes_whole_and_its_tokens_stay_apart() -> None:
    tokenizer = sentence_piece(False)
    ids = [3 + byte for byte in "🌲".encode()] + tokenizer.encode("or", add_special_tokens=False)
    deltas, _ = play(SamplingParams(max_tokens=None), ids, tokenizer=tokenizer)
    answer = check_deltas(deltas, SamplingParams())
    assert [piece.text for piece in answer.choices[0].tokens[:4]] == ["", "", "", "🌲"]
    assert deltas[0].text == "🌲"
    assert len(deltas[0].tokens) == 4
    assert answer.choices[0].text == "🌲or"


@pytest.mark.parametrize("kind", [byte_level, sentence_piece, partial(sentence_piece, False), word_piece, metaspace])
@settings(max_examples=examples(60, 200), deadline=None)
@given(data=st.data(), include=st.booleans(), cuts=st.lists(st.integers(1, 5), max_size=6))
def test_the_bytes_of_shown_tokens_join_to_the_text(
    kind: Callable[[], Tokenizer], data: st.DataObject, include: bool, cuts: list[int]
) -> None:
    """Whatever ids, stops and borders of events: each token has its own bytes, and all of them decode to the text."""
    tokenizer = kind()
    texts = st.sampled_from([" the", "Lorax", "🌲", "é", "東京", "ab", "  ", "née token"])
    ids_of_texts = st.lists(texts, max_size=6).map(lambda parts: tokenizer.encode("".join(parts)))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=12) | ids_of_texts) or [5]
    stop = tuple(data.draw(st.lists(st.sampled_from(["ab", "🌲", "京", "é", "a", " "]), max_size=2, unique=True)))
    params = SamplingParams(max_tokens=None, stop=stop, include_stop=include, logprobs=1, seed=3)
    choice = check_deltas(play(params, ids, tokenizer=tokenizer, cuts=cuts)[0], params).choices[0]
    shown = [piece.raw for piece in choice.tokens if piece.shown]
    assert b"".join(raw for raw in shown if raw is not None).decode(errors="replace") == choice.text
    assert None not in shown


def test_bytes_are_not_worked_out_unless_logprobs_are_asked_for() -> None:
    choice = collect(play(SamplingParams(max_tokens=None), [5, 6])[0]).choices[0]
    assert [piece.raw for piece in choice.tokens] == [None, None]


def test_eos_is_a_token_that_is_not_shown() -> None:
    ids = [*byte_level().encode("hello"), EOS]
    deltas, aborted = play(SamplingParams(max_tokens=None), ids, end="stop")
    choice = check_deltas(deltas, SamplingParams()).choices[0]
    assert (choice.text, choice.eos, choice.stop_reason, aborted) == ("hello", True, None, False)
    last = choice.tokens[-1]
    assert (last.id, last.text, last.special, last.shown) == (EOS, "<|end|>", True, False)
    assert choice.totals.completion_tokens == len(ids)


@pytest.mark.parametrize("include", [True, False])
def test_a_stop_id_is_shown_only_with_include_stop(include: bool) -> None:
    ids = byte_level().encode("hello world")
    params = SamplingParams(max_tokens=None, stop_token_ids=(ids[-1],), include_stop=include)
    deltas, _ = play(params, ids, end="stop")
    choice = check_deltas(deltas, params).choices[0]
    assert choice.text == byte_level().decode(ids if include else ids[:-1])
    assert (choice.stop_reason, choice.eos, choice.token_ids) == (ids[-1], False, ids)


@pytest.mark.parametrize(
    ("stop", "native", "openai"),
    [
        ("<|role|>", "fox", "fox"),
        ("x<|role|>", "fox", "fo"),
        ("<|role|>l", "foxl", "fox"),
        ("ole|>", "fox", "fox"),
        ("<|role|><|begin|>", None, None),
        ("xl", None, None),
    ],
)
@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_may_be_or_hold_a_special_token(
    stop: str, native: str | None, openai: str | None, skip: bool
) -> None:
    ids = byte_level().encode("fox<|role|>lzy")
    for include, expected in ((True, native), (False, openai)):
        params = SamplingParams(max_tokens=None, stop=(stop,), include_stop=include, skip_special_tokens=skip)
        deltas, aborted = play(params, ids)
        choice = check_deltas(deltas, params).choices[0]
        if expected is None:
            assert (choice.finish_reason, choice.text) == ("length", "foxlzy" if skip else "fox<|role|>lzy")
            continue
        if not skip:  # as it was written, up to the end or the beginning of the stop string
            text = "fox<|role|>lzy"
            expected = text[: text.index(stop) + (len(stop) if include else 0)]
        assert (choice.finish_reason, choice.stop_reason, choice.text) == ("stop", stop, expected)
        assert aborted and choice.totals.completion_tokens == len(choice.tokens)
        out = "".join(delta.text for delta in deltas)
        assert out == expected


def test_an_id_that_ends_the_completion_is_the_reason_before_a_stop_string_that_it_completes() -> None:
    """As in TGI, which asks for the end id first."""
    for include in (True, False):
        params = SamplingParams(max_tokens=None, stop=("x<|end|>",), include_stop=include)
        choice = collect(play(params, [*byte_level().encode("fox"), EOS], end="stop")[0]).choices[0]
        assert (choice.text, choice.eos, choice.stop_reason) == ("fox", True, None)


@pytest.mark.parametrize("make", [word_piece, metaspace])
def test_a_special_stop_string_with_decoders_that_look_at_their_neighbours(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    special = min(tokenizer.special_ids)
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in ("the Lorax", "spoke"))
    stop = tokenizer.text_of(special).strip()
    for skip in (True, False):
        params = SamplingParams(max_tokens=None, stop=(stop,), skip_special_tokens=skip)
        choice = check_deltas(play(params, [*before, special, *after], tokenizer=tokenizer)[0], params).choices[0]
        assert (choice.finish_reason, choice.text.strip()) == ("stop", tokenizer.decode(before))
        assert choice.token_ids == [*before, special]


def test_a_stop_string_after_a_special_token_in_text_that_loses_its_first_space() -> None:
    """With special tokens the text begins " the", without them "the": the cut is the same."""
    tokenizer = sentence_piece()
    ids = [2, *tokenizer.encode("the or", add_special_tokens=False)]
    for stop, expected in ((" or", "the"), ("</s> the", ""), ("he ", "t")):
        params = SamplingParams(max_tokens=None, stop=(stop,))
        choice = collect(play(params, ids, tokenizer=tokenizer)[0]).choices[0]
        assert (choice.stop_reason, choice.text) == (stop, expected)


def test_stop_strings_wait_for_min_tokens() -> None:
    one = byte_level().encode("a")
    params = SamplingParams(max_tokens=None, min_tokens=3, stop=("a",))
    choice = collect(play(params, one * 5)[0]).choices[0]
    assert (choice.text, choice.totals.completion_tokens) == ("aa", 3)
    including = SamplingParams(max_tokens=None, min_tokens=3, stop=("a",), include_stop=True)
    assert collect(play(including, one * 5)[0]).choices[0].text == "aaa"


def test_tokens_of_a_stop_string_are_counted_but_not_shown() -> None:
    ids = [i for part in ["x", "E", "N", "D", "y"] for i in byte_level().encode(part)]
    params = SamplingParams(max_tokens=None, stop=("END",))
    deltas, aborted = play(params, ids)
    choice = check_deltas(deltas, params).choices[0]
    assert aborted
    assert [(piece.text, piece.shown) for piece in choice.tokens] == [
        ("x", True),
        ("E", False),
        ("N", False),
        ("D", False),
    ]
    assert choice.totals.completion_tokens == 4


def test_without_a_tokenizer_ids_come_back_without_text() -> None:
    core = Service(tiny_info(), texts=LoadedTexts())
    state = core.open(GenerateRequest(prompt=[5, 6], params=SamplingParams(logprobs=0), return_prompt_tokens=True))
    request_id = state.engine_requests[0].request_id
    deltas = state.push(TokenEvent(request_id=request_id, token_ids=[7], logprobs=[-1.0], top_logprobs=[[]]))
    deltas += state.push(
        TokenEvent(request_id=request_id, token_ids=[EOS], logprobs=[-2.0], finish_reason="stop", stop_reason=EOS)
    )
    answer = collect(deltas)
    assert (answer.choices[0].text, answer.choices[0].token_ids) == ("", [7, EOS])
    assert [piece.logprob for piece in answer.choices[0].tokens] == [-1.0, -2.0]
    assert answer.prompt is not None
    assert [piece.id for piece in answer.prompt.tokens] == [5, 6]


def event(request_id: str, token: int, logprob: float, finish: str | None = None) -> TokenEvent:
    return TokenEvent(
        request_id=request_id, token_ids=[token], logprobs=[logprob], top_logprobs=[[]], finish_reason=finish
    )


def test_n_choices_stream_side_by_side_each_with_its_own_end() -> None:
    state = service().open(GenerateRequest(prompt=[5], params=SamplingParams(n=3, seed=9)))
    requests = state.engine_requests
    assert [(r.choice, r.params.seed) for r in requests] == [(0, 9), (1, 9), (2, 9)]
    assert len({r.request_id for r in requests}) == 3
    words = [byte_level().encode(word)[0] for word in "abc"]
    deltas = []
    for finish in (None, "length"):
        for index in (2, 0, 1):
            deltas += state.push(
                TokenEvent(request_id=requests[index].request_id, token_ids=[words[index]], finish_reason=finish)
            )
    assert [delta.choice for delta in deltas] == [2, 0, 1, 2, 0, 1]
    answer = check_deltas(deltas, SamplingParams())
    assert [choice.text for choice in answer.choices] == ["aa", "bb", "cc"]
    assert (answer.prompt_tokens, answer.completion_tokens) == (1, 6)


def test_best_of_shows_the_likeliest_by_mean_logprob_and_nothing_before_all_ended() -> None:
    state = service().open(GenerateRequest(prompt=[5], params=SamplingParams(n=2, best_of=4, seed=1)))
    ids = [request.request_id for request in state.engine_requests]
    assert [request.params.logprobs for request in state.engine_requests] == [0] * 4
    words = [byte_level().encode(word)[0] for word in "abcd"]
    for index, logprob in enumerate([-3.0, -1.0, -2.0]):
        assert state.push(event(ids[index], words[index], logprob)) == []
        assert state.push(event(ids[index], words[index], logprob, "length")) == []
    # Longer, and its sum is the lowest of all; by its mean it is second.
    for _ in range(5):
        assert state.push(event(ids[3], words[3], -1.5)) == []
    deltas = state.push(event(ids[3], words[3], -1.5, "length"))
    assert [(d.choice, d.text) for d in deltas] == [(0, "bb"), (1, "d" * 6)]
    assert all(piece.logprob is None for delta in deltas for piece in delta.tokens), "they were not asked for"
    check_deltas(deltas, SamplingParams())


def test_best_of_with_a_failed_candidate_is_a_failure() -> None:
    state = service().open(GenerateRequest(prompt=[5], params=SamplingParams(n=1, best_of=2)))
    one, two = (request.request_id for request in state.engine_requests)
    assert state.push(event(one, 9, -0.1, "length")) == []
    (delta,) = state.push(TokenEvent(request_id=two, finish_reason="error", error=EngineDied("gone").info()))
    assert (delta.choice, delta.finish_reason) == (0, "error")


def test_what_comes_after_the_end_is_ignored_and_failing_ends_only_what_is_open() -> None:
    state = service().open(GenerateRequest(prompt=[5], params=SamplingParams(n=2, stop=("b",))))
    one = state.engine_requests[0].request_id
    b = byte_level().encode("b")[0]
    (delta,) = state.push(TokenEvent(request_id=one, token_ids=[b], times=RequestTimes(queue_s=0.25, ttft_s=0.5)))
    assert (delta.finish_reason, delta.stop_reason) == ("stop", "b")
    assert delta.totals is not None
    assert delta.totals.times is not None
    assert delta.totals.times.queue_s == 0.25
    assert state.take_aborts() == [one]
    assert state.take_aborts() == []
    assert state.push(TokenEvent(request_id=one, token_ids=[b])) == []
    assert state.push(TokenEvent(request_id=one, finish_reason="abort")) == []
    (failed,) = state.fail(EngineDied("the engine is gone").info())
    assert (failed.choice, failed.finish_reason) == (1, "error")
    assert failed.error is not None
    assert failed.error.code == "engine_died"
    assert state.done
