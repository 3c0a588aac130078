"""What a request is before it is submitted: limits with numbers, refusals by field, the prompt given back."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import TEMPLATE, VOCAB, texts_with, tiny_info
from tiny_tokenizers import byte_level, byte_level_json, load, sentence_piece, word_piece

from truffula.errors import InvalidRequest, NoTokenizer, PromptTooLong, TemplateError, TruffulaError
from truffula.items import Message, Text
from truffula.lora.sources import AdapterDirectory
from truffula.params import SamplingParams
from truffula.service.choices import collect
from truffula.service.core import Service, ServiceLimits
from truffula.service.files import LoadedTexts
from truffula.types import GenerateRequest, TokenEvent


def service(tokenizer: Any = None, **info: Any) -> Service:
    return Service(tiny_info(**info), texts=texts_with(byte_level() if tokenizer is None else tokenizer))


def ids_of(core: Service, **request: Any) -> list[int]:
    return core.open(GenerateRequest(**request)).engine_requests[0].prompt_ids


CHAT = [Message(role="user", items=[Text("a")])]
REFUSED = [
    ({}, InvalidRequest, "prompt"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, InvalidRequest, "prompt"),
    ({"prompt": []}, InvalidRequest, "prompt"),
    ({"prompt": 5}, InvalidRequest, "prompt"),
    ({"prompt": [1, VOCAB]}, InvalidRequest, "prompt"),
    ({"prompt": [1, -1]}, InvalidRequest, "prompt"),
    ({"prompt": [True]}, InvalidRequest, "prompt"),
    ({"prompt": "ab\ud83c"}, InvalidRequest, "prompt"),
    ({"prompt": "a", "params": SamplingParams(stop=("\udfff",))}, InvalidRequest, "stop"),
    ({"prompt": "a", "params": SamplingParams(stop_token_ids=(VOCAB,))}, InvalidRequest, "stop_token_ids"),
    ({"prompt": "a", "params": SamplingParams(logit_bias={VOCAB: 1.0})}, InvalidRequest, "logit_bias"),
    ({"prompt": "a", "truncate": 0}, InvalidRequest, "truncate"),
    ({"prompt": "a", "params": SamplingParams(n=129)}, InvalidRequest, "n"),
    ({"prompt": "a", "params": SamplingParams(best_of=129)}, InvalidRequest, "best_of"),
    ({"prompt": [5] * 64, "params": SamplingParams(max_tokens=None)}, PromptTooLong, "prompt"),
    ({"prompt": [5] * 60, "params": SamplingParams(max_tokens=5)}, PromptTooLong, "max_tokens"),
    ({"messages": []}, InvalidRequest, "messages"),
    ({"messages": CHAT, "template_kwargs": {"messages": 1}}, InvalidRequest, "template_kwargs"),
]  # fmt: skip


@pytest.mark.parametrize(("request_fields", "error", "param"), REFUSED)
def test_refusals_name_the_field(request_fields: dict[str, Any], error: type[TruffulaError], param: str) -> None:
    core = Service(tiny_info(), texts=texts_with(byte_level()), templates={"default": TEMPLATE})
    with pytest.raises(error) as caught:
        core.open(GenerateRequest(**request_fields))
    assert caught.value.param == param
    assert str(caught.value)


def test_what_just_fits_is_taken() -> None:
    core = service()
    assert len(ids_of(core, prompt=[5] * 60, params=SamplingParams(max_tokens=4))) == 60
    assert len(ids_of(core, prompt=[5] * 63, params=SamplingParams(max_tokens=None))) == 63
    assert len(ids_of(core, prompt=[5] * 64, params=SamplingParams(max_tokens=0))) == 64


def test_a_huge_text_is_refused_before_it_is_tokenised() -> None:
    """By its number of characters: the numbers say why, and no tokeniser has seen it."""
    core = service()
    with pytest.raises(PromptTooLong) as caught:
        core.open(GenerateRequest(prompt="é" * 50_000_000))
    assert caught.value.data["prompt_chars"] == 50_000_000
    assert "prompt_tokens" not in caught.value.data
    longest = max(len(byte_level().id_to_token(i) or "") for i in range(byte_level().vocab_size))
    assert caught.value.data["max_chars"] >= 64 * longest


def test_truncate_keeps_the_last_tokens_and_comes_before_the_limit() -> None:
    core = service()
    text = "the Lorax spoke " * 40
    ids = byte_level().encode(text)
    assert ids_of(core, prompt=text, truncate=20) == ids[-20:]
    assert ids_of(core, prompt=ids, truncate=20) == ids[-20:]
    with pytest.raises(PromptTooLong):
        ids_of(core, prompt=text)


def test_an_empty_text_begins_a_document_where_there_is_a_token_for_that() -> None:
    assert ids_of(service(), prompt="") == [byte_level().bos_id]
    assert ids_of(service(sentence_piece(), vocab_size=400), prompt="") == [1]
    with pytest.raises(InvalidRequest, match="empty"):
        ids_of(service(word_piece()), prompt="")


def test_special_tokens_are_added_to_text_and_not_to_a_chat() -> None:
    core = Service(
        tiny_info(vocab_size=400),
        texts=texts_with(sentence_piece()),
        templates={"default": "<s>the {{ messages[0].content }}"},
    )
    the = sentence_piece().encode("the or", add_special_tokens=False)
    chat = [Message(role="user", items=[Text("or")])]
    assert ids_of(core, prompt="the or") == [1, *the]
    assert ids_of(core, prompt="the or", add_special_tokens=False) == the
    assert ids_of(core, messages=chat).count(1) == 1
    assert ids_of(core, messages=chat, add_special_tokens=True).count(1) == 2


def test_a_model_without_tokenizer_serves_ids_and_says_so_for_text() -> None:
    core = Service(tiny_info(), texts=LoadedTexts())
    assert ids_of(core, prompt=[5, 6]) == [5, 6]
    for fields in (
        {"prompt": "a"},
        {"messages": [Message(role="user", items=[Text("a")])]},
        {"prompt": [5], "params": SamplingParams(stop=("x",))},
    ):
        with pytest.raises(NoTokenizer):
            core.open(GenerateRequest(**fields))


def test_messages_without_a_template_are_a_template_error() -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        service().open(GenerateRequest(messages=[Message(role="user", items=[Text("a")])]))


def test_an_absent_seed_is_drawn_and_told_and_a_given_one_kept() -> None:
    core = service()

    def seed(**params: Any) -> tuple[int, int | None]:
        """The engine's, and the one that the client is told."""
        state = core.open(GenerateRequest(prompt=[5], params=SamplingParams(**params)))
        (sent,) = state.engine_requests
        (end,) = state.push(TokenEvent(request_id=sent.request_id, finish_reason="length"))
        assert end.totals is not None
        return sent.params.seed, end.totals.seed

    drawn = [seed() for _ in range(3)]
    assert len(set(drawn)) == 3
    assert all(sent == told for sent, told in drawn)
    assert seed(seed=2**64 - 1) == (2**64 - 1, 2**64 - 1)
    assert seed(temperature=0)[1] is None


def test_request_ids_of_clients_may_repeat_and_those_of_the_engine_never_do() -> None:
    core = service()
    states = [core.open(GenerateRequest(prompt=[5], request_id="same", params=SamplingParams(n=2))) for _ in range(3)]
    assert [state.request_id for state in states] == ["same"] * 3
    assert len({one.request_id for state in states for one in state.engine_requests}) == 6


def test_times_count_from_acceptance() -> None:
    core = Service(tiny_info(), texts=LoadedTexts(), clock=lambda: 100.0)
    (one,) = core.open(GenerateRequest(prompt=[5], queue_timeout_s=3, deadline_s=7)).engine_requests
    assert (one.arrival, one.queue_deadline, one.deadline) == (100.0, 103.0, 107.0)
    (two,) = core.open(GenerateRequest(prompt=[5])).engine_requests
    assert (two.queue_deadline, two.deadline) == (None, None)


def test_words_for_the_base_and_for_adapters(tmp_path) -> None:
    directory = AdapterDirectory({"pirate": "org/pirate"})
    core = Service(
        tiny_info(), texts=LoadedTexts(), directory=directory, limits=ServiceLimits(base_names=("tiny", "tgi"))
    )
    assert [core.resolve_adapter(word) for word in (None, "", "tiny", "tgi")] == [None] * 4
    found = core.resolve_adapter("pirate")
    assert found is not None
    assert found.locator == "org/pirate"
    with pytest.raises(TruffulaError) as caught:
        core.resolve_adapter("other")
    assert caught.value.code == "adapter_not_found"


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    kind=st.sampled_from(["byte-level", "sentence-piece", "word-piece"]),
    keep=st.none() | st.integers(1, 5),
)
def test_the_prompt_is_given_back_exactly_piece_by_piece(text: str, kind: str, keep: int | None) -> None:
    """Whatever the tokenizer normalises away, joined pieces are the text; truncated, its end."""
    tokenizer = {"byte-level": byte_level, "sentence-piece": sentence_piece, "word-piece": word_piece}[kind]()
    core = service(tokenizer, max_model_len=512)
    request = GenerateRequest(
        prompt=text, echo=True, truncate=keep, params=SamplingParams(prompt_logprobs=1, max_tokens=1)
    )
    try:
        state = core.open(request)
    except InvalidRequest:
        assert kind == "word-piece", "only there may a text have no tokens at all"
        return
    (one,) = state.engine_requests
    scores: list[Any] = [None, *[(-1.0, [(5, -1.0)])] * (len(one.prompt_ids) - 1)]
    deltas = state.push(
        TokenEvent(request_id=one.request_id, token_ids=[9], finish_reason="length", prompt_logprobs=scores)
    )
    prompt = collect(deltas).prompt
    assert prompt is not None
    assert [piece.id for piece in prompt.tokens] == one.prompt_ids
    assert "".join(piece.text for piece in prompt.tokens) == prompt.text
    assert prompt.text == text if keep is None else text.endswith(prompt.text)
    assert [piece.logprob for piece in prompt.tokens] == [None] + [-1.0] * (len(one.prompt_ids) - 1)
    if keep is None and tokenizer.encode("")[:1] == [tokenizer.bos_id]:
        assert (prompt.tokens[0].text, prompt.tokens[0].special) == ("", True)


def test_a_prompt_of_ids_is_given_back_as_their_text() -> None:
    tokenizer = load(byte_level_json(), bos_token="<|begin|>")
    ids = [0, *tokenizer.encode("naïve 🌲")]
    state = service(tokenizer).open(GenerateRequest(prompt=ids, return_prompt_tokens=True))
    deltas = state.push(TokenEvent(request_id=state.engine_requests[0].request_id, token_ids=[9]))
    assert deltas[0].prompt is not None
    assert deltas[0].prompt.text == "<|begin|>naïve 🌲"


def test_prompt_scores_are_bounded_by_their_number() -> None:
    params = SamplingParams(prompt_logprobs=1024, max_tokens=1)
    at_most = ServiceLimits().max_prompt_scores // 1025
    core = service(max_model_len=2 * at_most)
    core.open(GenerateRequest(prompt=[3] * at_most, params=params))
    for length, choices in ((at_most + 1, 1), (at_most, 2)):
        asked = msgspec.structs.replace(params, n=choices)
        with pytest.raises(InvalidRequest) as caught:
            core.open(GenerateRequest(prompt=[3] * length, params=asked))
        assert caught.value.param == "prompt_logprobs"


def test_prompt_scores_of_one_call_are_bounded_together() -> None:
    core = Service(tiny_info(), texts=texts_with(byte_level()), limits=ServiceLimits(max_prompt_scores=100))
    request = GenerateRequest(prompt=[3] * 25, params=SamplingParams(prompt_logprobs=1, n=2))
    states = [core.open(request) for _ in range(5)]
    core.check_scores_of_call(states[:4])
    with pytest.raises(InvalidRequest, match=r"500 scores .* the limit is 400") as caught:
        core.check_scores_of_call(states)
    assert caught.value.param == "prompt_logprobs"
