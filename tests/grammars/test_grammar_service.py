"""Constraints of requests: compiled in a process with limits, kept, and refused without harm to others."""

import asyncio
import json

import pytest
from corpus import record
from served import OPTIONS, text_set, tiny_info, write_model
from tiny_tokenizers import byte_level_json

from truffula import LLM, SamplingParams
from truffula.errors import InvalidRequest, NoTokenizer
from truffula.items import Constraint, Tool, ToolChoice
from truffula.service.core import Service
from truffula.service.grammars import ERROR_KEPT_S, MAX_KEPT, Grammars
from truffula.text.answers import Answer
from truffula.text.tokenizer import load_tokenizer
from truffula.text.tool_formats import TOOL_FORMATS, OutputFormat
from truffula.types import GenerateRequest

PERSON = record(name={"type": "string", "maxLength": 4}, adult={"type": "boolean"})


def schema(value, param="response_format"):
    return Constraint(kind="json_schema", value=json.dumps(value), param=param)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


TEXTS = text_set(load_tokenizer({"tokenizer.json": byte_level_json()}))


@pytest.fixture(scope="module")
def process():
    """One process for the tests of this module: starting one takes half a second."""
    made = Grammars(tiny_info(), lambda vocabulary: None)
    yield made._pool
    made.close()


@pytest.fixture
def grammars(process):
    given = []
    made = Grammars(tiny_info(), given.append, clock=Clock())
    made._pool = process
    made.given = given
    return made


def end_process(grammars):
    """As after an idle time."""
    grammars._pool.workers[0].close()


def process_of(grammars):
    return grammars._pool.workers[0].pid


def test_a_grammar_is_compiled_once_and_the_vocabulary_is_given_once(grammars):
    first = grammars.compile_now(schema(PERSON), TEXTS)
    assert len(first.key) == 32
    end_process(grammars)
    assert grammars.compile_now(schema(PERSON, "text.format"), TEXTS) == first
    assert process_of(grammars) is None
    assert grammars.compile_now(schema({}), TEXTS).key != first.key
    (vocabulary,) = grammars.given
    assert b"".join(vocabulary.tokens)


def test_a_refusal_is_kept_for_a_while_and_names_the_field_of_each_request(grammars):
    bad = {"not": {}}
    for param in ("response_format", "guided_json"):
        with pytest.raises(InvalidRequest, match=f"^{param}: .*not at #/not") as caught:
            grammars.compile_now(schema(bad, param), TEXTS)
        assert caught.value.param == param
    end_process(grammars)
    with pytest.raises(InvalidRequest):
        grammars.compile_now(schema(bad), TEXTS)
    assert process_of(grammars) is None
    grammars._clock.now = ERROR_KEPT_S + 1
    with pytest.raises(InvalidRequest):
        grammars.compile_now(schema(bad), TEXTS)
    assert process_of(grammars) is not None


def test_requests_on_a_loop_share_one_compilation(grammars):
    async def run():
        made = await asyncio.gather(*(grammars.compile(schema(PERSON), str(i), TEXTS) for i in range(8)))
        with pytest.raises(InvalidRequest, match="regex"):
            await grammars.compile(Constraint(kind="regex", value="(", param="regex"), "x", TEXTS)
        waiting = asyncio.ensure_future(grammars.compile(schema({"const": 1}), "y", TEXTS))
        await asyncio.sleep(0)
        waiting.cancel()  # a client that leaves
        again = await grammars.compile(schema({"const": 1}), "z", TEXTS)
        return made, again

    made, again = asyncio.run(run())
    assert len({grammar.key for grammar in made}) == 1
    assert again.source
    assert not grammars._running


def test_the_parameters_of_a_tool_may_have_integers_of_any_size(grammars):
    tool = Tool(name="f", parameters=record(x={"type": "integer", "maximum": 10**30}), strict=True)
    answer = Answer(
        form=OutputFormat(TOOL_FORMATS["hermes"]), tools=[tool], choice=ToolChoice(), constraint=None,
        thinking_open=False, thinking_budget=None,
    )  # fmt: skip
    assert grammars.compile_now(answer, TEXTS).source


def test_the_number_of_kept_grammars_is_bounded(grammars):
    for number in range(MAX_KEPT + 20):
        grammars._keep(str(number).encode(), b"x" * 100, TEXTS)
    assert len(grammars._kept) == MAX_KEPT
    assert grammars._kept_bytes == 100 * MAX_KEPT
    grammars._keep(b"large", b"x" * (33 << 20), TEXTS)
    assert len(grammars._kept) == 1


def chain(count):
    rules = [f'r{i}: "x" r{i + 1}' for i in range(count)]
    return "\n".join(['start: "x" r0', *rules, f'r{count}: "y"'])


BOMBS = [
    ("lark", chain(50_000), "characters; the limit is"),
    ("lark", chain(3_000), "rules; the limit is"),
    ("lark", chain(1_500), "stopped"),
    ("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000, "nested"),
    ("choice", json.dumps([f"choice number {i}" for i in range(100_000)]), "characters; the limit is"),
    ("choice", json.dumps([str(i) for i in range(50_000)]), "50000 strings"),
    ("regex", "x{1,1000000}", "65536"),
    ("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}", "regular expression"),
    (
        "json_schema",
        json.dumps({"enum": [f"{i * 2654435761 % 2**32:08x}" for i in range(80_000)]}),
        "#/enum has 80000 values",
    ),
    ("json_schema", '{"items":' * 400 + "{}" + "}" * 400, "60 levels"),
    ("json_schema", json.dumps({"$ref": "#"}), "requires itself"),
    ("json_schema", json.dumps(record(**{f"p{i}": {"type": "string"} for i in range(30_000)})), ""),
    (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(8)]} for i in range(12)]}),
        "",
    ),
]


@pytest.mark.parametrize(("kind", "value", "words"), BOMBS, ids=lambda value: value[:30])
def test_what_would_take_too_long_or_end_a_process_is_refused(grammars, kind, value, words):
    with pytest.raises(InvalidRequest) as caught:
        grammars.compile_now(Constraint(kind=kind, value=value), TEXTS)
    assert words in caught.value.message
    assert grammars.compile_now(schema(PERSON), TEXTS).source


def test_a_model_without_tokenizer_refuses_constraints():
    service = Service(tiny_info())
    with pytest.raises(NoTokenizer, match="response_format"):
        service.check(GenerateRequest(prompt=[1, 2], constraint=schema(PERSON)), service.base)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("grammars") / "model")
    with LLM(model, **OPTIONS) as made:
        yield made


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_llm_answers_match_the_constraint(llm, temperature):
    params = SamplingParams(max_tokens=100, temperature=temperature, n=1 if temperature == 0 else 3, seed=5)
    outputs = llm.generate(["Hello", "The trees"], params, constraint=PERSON, progress=False)
    chats = llm.chat([{"role": "user", "content": "Hi"}], params, constraint=PERSON, progress=False)
    for choice in [choice for output in [*outputs, *chats] for choice in output.choices]:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.text)
        assert list(value) == ["name", "adult"]
        assert len(value["name"]) <= 4


def test_a_constraint_holds_for_its_own_request_only(llm):
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1, ignore_eos=True)
    free, _ = (llm.generate(["Hello", "Hello"], params, progress=False)[0].text for _ in range(2))
    digits = Constraint(kind="regex", value="[0-9]{5}")
    given = [{"prompt": "Hello", "constraint": one} for one in (None, digits, None)]
    texts = [output.text for output in llm._run(given, params, None, "raise", False)]
    assert texts[0] == texts[2] == free
    assert texts[1].isdigit()
    assert len(texts[1]) == 5


def test_llm_refuses_a_constraint_by_its_argument(llm):
    for bad in ({"not": {}}, {"const": float}, {"a"}, Constraint(kind="regex", value="\ud800", param="constraint")):
        with pytest.raises(InvalidRequest, match="constraint"):
            llm.generate("Hello", constraint=bad)


def test_a_stop_string_ends_a_constrained_answer_and_pieces_stream(llm):
    params = SamplingParams(max_tokens=100, temperature=0.0, stop=("adult",))
    deltas = list(llm.stream("Hello", params, constraint=schema(PERSON)))
    text = "".join(delta.text for delta in deltas)
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].stop_reason == "adult"
    assert text.startswith("{")
    assert "adult" not in text
