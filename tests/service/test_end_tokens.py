"""The tokens of the tokenizer's files and of the chat template end completions, beside those that the engine knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from chained import ids_of, write_chained_model
from served import OPTIONS, texts_with, tiny_info, write_model
from tiny_tokenizers import byte_level, byte_level_json

from truffula import LLM, SamplingParams
from truffula.errors import InvalidRequest, NoTokenizer
from truffula.items import Message, Text, Tool
from truffula.service.core import Service
from truffula.service.files import LoadedTexts
from truffula.text.tokenizer import Tokenizer, load_tokenizer
from truffula.types import EndToken, GenerateRequest, TokenEvent

BEGIN, END, ROLE = 0, 1, 2
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|role|>\n{% endfor %}"
QUESTION = [Message(role="user", items=[Text("x")])]


def named(config: bytes) -> Tokenizer:
    found = load_tokenizer({"tokenizer.json": byte_level_json(), "tokenizer_config.json": config})
    assert found is not None
    return found


def test_the_engine_gets_the_end_tokens_that_it_does_not_know() -> None:
    core = Service(tiny_info(), texts=texts_with(named(b'{"eos_token": "<|role|>"}')), templates={"default": TEMPLATE})
    for params, ends in (
        (SamplingParams(), (ROLE,)),
        (SamplingParams(stop_token_ids=(9,)), (9, ROLE)),
        (SamplingParams(stop_token_ids=(ROLE,)), (ROLE,)),
        (SamplingParams(ignore_eos=True), ()),
        (SamplingParams(ignore_eos=True, stop_token_ids=(9,)), (9,)),
    ):
        state = core.open(GenerateRequest(prompt=[5], params=params))
        assert [one.params.stop_token_ids for one in state.engine_requests] == [ends]


def test_an_end_of_the_tokenizer_is_the_models_end() -> None:
    core = Service(tiny_info(), texts=texts_with(named(b'{"eos_token": "<|role|>"}')))
    state = core.open(GenerateRequest(prompt=[5], params=SamplingParams(n=2)))
    for request in state.engine_requests:
        event = TokenEvent(request_id=request.request_id, token_ids=[ROLE], finish_reason="stop", stop_reason=ROLE)
        (delta,) = state.push(event)
        assert (delta.finish_reason, delta.stop_reason, delta.eos, delta.text) == ("stop", None, True, "")


def test_the_turn_end_of_the_template_counts_in_chats_alone() -> None:
    core = Service(
        tiny_info(), texts=texts_with(byte_level()), templates={"default": TEMPLATE, "tool_use": "{{ messages }}"}
    )

    def ends(**request: object) -> tuple[int, ...]:
        return core.open(GenerateRequest(**request)).engine_requests[0].params.stop_token_ids  # type: ignore[arg-type]

    assert ends(prompt="x") == ()
    assert ends(messages=QUESTION) == (ROLE,)
    assert ends(messages=QUESTION, chat_template="default") == (ROLE,)
    assert ends(messages=QUESTION, tools=[Tool(name="f")]) == ()
    assert ends(messages=QUESTION, chat_template="{{ messages[0].content }}") == ()
    assert ends(messages=QUESTION, params=SamplingParams(ignore_eos=True)) == ()


def test_the_info_names_every_end_token() -> None:
    core = Service(tiny_info(), texts=texts_with(named(b'{"eos_token": "<|begin|>"}')), templates={"default": TEMPLATE})
    assert core.info.end_tokens == [
        EndToken(BEGIN, "tokenizer_config.json eos_token", "<|begin|>"),
        EndToken(END, "config.json eos_token_id", "<|end|>"),
        EndToken(ROLE, "the chat template; in chat requests", "<|role|>"),
    ]
    assert core.info.eos_token_ids == [BEGIN, END]


def test_a_model_that_never_ends_is_warned_of() -> None:
    core = Service(tiny_info(eos_token_ids=[], end_tokens=[]), texts=texts_with(named(b"{}")))
    assert core.info.end_tokens == []
    assert any("No file of the model names an end token" in text for text in core.info.warnings)


def test_a_tokenizer_with_more_tokens_than_the_model_has_ids(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", vocab_size=byte_level().vocab_size - 1)  # "née token" is beyond
    with LLM(str(model), **OPTIONS) as llm:
        assert any(f"The tokenizer has {byte_level().vocab_size} tokens" in text for text in llm.info.warnings)
        assert llm.generate("hello", SamplingParams(max_tokens=1))[0].token_ids
        with pytest.raises(InvalidRequest, match="token id 401"):
            llm.generate("a née token", SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["tokenizer.model"], "tokenizer.model is not read"),
        (["vocab.json", "merges.txt"], "vocab.json and merges.txt are not read"),
        (["qwen.tiktoken"], "qwen.tiktoken is not read"),
        ([], "Copy it"),
    ],
)
def test_why_there_is_no_tokenizer_and_what_to_do(files: list[str], words: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", tokenizer=False)
    for name in files:
        (model / name).write_bytes(b"{}")
    with LLM(str(model), **OPTIONS) as llm:
        (warning,) = (text for text in llm.info.warnings if "tokenizer.json" in text)
        assert words in warning and "token ids" in warning
        assert ("AutoTokenizer.from_pretrained('DIR').save_pretrained('DIR')" in warning) is bool(files)
        with pytest.raises(NoTokenizer) as caught:
            llm.generate("hello")
        assert words in caught.value.message and "tokenizer.json" in caught.value.message
        assert llm.info.no_tokenizer in caught.value.message
        assert llm.generate([5, 6], SamplingParams(max_tokens=1))[0].token_ids


def test_the_refusal_of_text_where_no_reason_is_known() -> None:
    with pytest.raises(NoTokenizer, match="no tokenizer"):
        Service(tiny_info(), texts=LoadedTexts()).open(GenerateRequest(prompt="x"))


def test_completions_and_chats_end_where_the_files_say(tmp_path: Path) -> None:
    """The model writes fox, <|role|>, lzy, <|end|>: only the second is an end of its config."""
    written = [*ids_of("Qfox"), ROLE, *ids_of("lzy"), END]
    params = SamplingParams(temperature=0, max_tokens=12)
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}Q"
    marked = "{% for m in messages %}{{ m.content }}<|role|>{% endfor %}Q"
    for name, config, completion, chat in (
        ("eos_token", {"eos_token": "<|role|>", "chat_template": plain}, "fox", "fox"),
        ("template", {"chat_template": marked}, "foxlzy", "fox"),
        ("neither", {"chat_template": plain}, "foxlzy", "foxlzy"),
    ):
        with LLM(str(write_chained_model(tmp_path / name, written, eos=END, **config)), **OPTIONS) as llm:
            for (answer,), text in ((llm.generate("aQ", params), completion), (llm.chat(QUESTION, params), chat)):
                assert (answer.text, answer.choices[0].eos) == (text, True), name
                assert len(answer.token_ids) == {"fox": 4, "foxlzy": 8}[text]
