"""Grammars of whole answers: whatever a model writes under one is parsed into calls that meet their schemas."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import jsonschema
import pytest
from answers import Answer, parse
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from truffula.errors import InvalidRequest
from truffula.items import Tool, ToolChoice
from truffula.text.answer_grammar import answer_grammar
from truffula.text.tool_formats import REASONING_FORMATS, TOOL_FORMATS, OutputFormat

PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "unit": {"enum": ["C", "F"]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "where": {"$ref": "#/$defs/point"},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["city", "unit", "where"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "number", "minimum": 0, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
TOOLS = [Tool(name="place", parameters=PLACE, strict=True), Tool(name="stop")]
SCHEMAS = {"place": PLACE, "stop": {"type": "object", "maxProperties": 0}}
FORMATS = [*TOOL_FORMATS]
SPECIAL = ("harmony", "kimi_k2", "deepseek_v3", "deepseek_v3_1")
"""The markers of these are special tokens in all models, and mean what they mean in reasoning too."""
TEXT = ("deepseek_v3_2", "deepseek_v4")
"""The markers of these are text."""
# With markers that are text, each syntax once in the fast suite.
SYNTAXES = {TOOL_FORMATS[name].syntax: name for name in reversed(FORMATS) if name not in SPECIAL}
by_format = pytest.mark.parametrize(
    ("name", "special"),
    [(name, True) for name in FORMATS if name not in TEXT]
    + [
        pytest.param(name, False, marks=[pytest.mark.slow] * (name not in (*TEXT, *SYNTAXES.values())))
        for name in FORMATS
        if name not in SPECIAL
    ],
)
MARK = re.compile(r"<[^<>\s\"=]+>|\[[A-Z_/]+\]")


class Vocabulary:
    """Bytes, some words, and special tokens; for llguidance."""

    def __init__(self, words: Sequence[str], special: Sequence[str]) -> None:
        plain = [bytes([value]) for value in range(256)] + [word.encode() for word in words]
        self.tokens = [*plain, *(token.encode() for token in special), b"<eos>"]
        self.special_token_ids = list(range(len(plain), len(self.tokens)))
        self.eos_token_id = len(self.tokens) - 1
        self.bos_token_id = None
        self.special = {token: len(plain) + i for i, token in enumerate(special)}
        self.words = range(256, len(plain))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def vocabulary(name: str, *, marks_are_special: bool) -> tuple[Vocabulary, LLTokenizer]:
    form, thinks = TOOL_FORMATS[name], reasoning_of(name)
    harmony = "<|channel|><|message|><|start|><|end|><|constrain|><|call|>" if form.syntax == "harmony" else ""
    texts = [*(form.section or ()), form.begin, form.end, form.after_name]
    texts += [
        form.after_value,
        form.close,
        thinks.open,
        thinks.close,
        harmony,
        form.before_value,
        form.after_id,
        '<|"|>',
    ]
    marks = dict.fromkeys(mark for text in texts for mark in MARK.findall(text) + ['<|"|>'] * (form.values == "gemma"))
    # The tags of these formats are text in all models.
    special = (
        [] if not marks_are_special else [mark for mark in marks if "function" not in mark and "param" not in mark]
    )
    words = [word for word in marks if word not in special]
    words += [
        text for text in (*(form.section or ()), form.begin) if text and not any(mark in text for mark in special)
    ]
    words += ["\n" + word for word in words] + ['"}', '", "', "Paris", "é"]
    made = Vocabulary(words, special)
    return made, LLTokenizer(TokenizerWrapper(made))


def reasoning_of(name: str) -> Any:
    return REASONING_FORMATS.get({"mistral_json": "mistral"}.get(name, name), REASONING_FORMATS["think"])


def walk(grammar: str, known: tuple[Vocabulary, LLTokenizer], seed: int, longest: int = 800) -> str | None:
    """A random text that the grammar accepts; None where it does not end."""
    words, tokenizer = known
    draw = random.Random(seed)
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error() + grammar
    found = bytearray()
    for _ in range(longest):
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        assert not matcher.is_error(), matcher.get_error()
        allowed = [token for token in range(len(words.tokens)) if bits >> token & 1]
        assert allowed, bytes(found)
        common = [token for token in allowed if token >= 256]
        shown = [token for token in allowed if 32 <= token < 127 or token == 10] or allowed
        ends = [token for token in shown if token < 256 and chr(token) in '"}]),']
        first = [token for token in shown if not found and token < 256 and chr(token) in "{["]
        pool = common if common and draw.random() < 0.4 else ends if ends and draw.random() < 0.3 else shown
        pool = first if first and draw.random() < 0.6 else pool
        token = draw.choice(pool)
        if token == words.eos_token_id:
            return found.decode()
        found += words.tokens[token]
        assert matcher.consume_token(token), matcher.get_error()
        if matcher.is_stopped():
            return found.decode()
    return None


def answers(
    name: str, choice: ToolChoice, *, tools: Sequence[Tool] = TOOLS, special: bool = True, count: int = 2, **more: Any
) -> Iterator[Answer]:
    """The parsed answers of some walks."""
    always = REASONING_FORMATS["harmony"] if name == "harmony" else None
    fmt = OutputFormat(TOOL_FORMATS[name], more.pop("reasoning", always))
    known = vocabulary(name, marks_are_special=special)
    options = {"answer": None, "thinking_open": False, "thinking_budget": None, **more}
    grammar = answer_grammar(fmt, tools, choice, special_tokens=known[0].special, **options)
    assert grammar is not None
    prompt = fmt.reasoning.open if options["thinking_open"] and fmt.reasoning else ""
    found = 0
    for seed in range(6 * count):
        text = walk(grammar, known, seed)
        if text is not None and found < count:
            found += 1
            whole = parse(fmt, [text], prompt, tools, special=list(known[0].special), whole=True)
            streamed = parse(fmt, text, prompt, tools, special=list(known[0].special))
            assert (whole.calls, whole.text) == (streamed.calls, streamed.text), text
            for call, arguments in whole.parsed:
                jsonschema.validate(arguments, SCHEMAS[call])
            yield whole
    assert found


@by_format
def test_required_calls_meet_their_schemas(name: str, special: bool) -> None:
    for answer in answers(name, ToolChoice(mode="required"), special=special):
        assert answer.calls and not answer.text, answer


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_tool_is_called_once(name: str) -> None:
    choice = ToolChoice(mode="required", names=("place",), parallel=False)
    for answer in answers(name, choice, count=2):
        assert [call for call, _ in answer.calls] == ["place"] and not answer.text


@by_format
def test_a_strict_tool_may_be_called_after_text(name: str, special: bool) -> None:
    text = calls = False
    for answer in answers(name, ToolChoice(), special=special, count=12):
        text, calls = text or bool(answer.text), calls or bool(answer.calls)
        if text and calls:
            return
    pytest.fail("no walk had text, or none had calls")


@pytest.mark.parametrize("name", FORMATS)
def test_no_call_of_a_strict_tool_escapes_its_schema(name: str) -> None:
    """Whatever the parser takes for the start of a call, the grammar constrains what follows, in text too."""
    form = TOOL_FORMATS[name]
    known = vocabulary(name, marks_are_special=False)
    fmt = OutputFormat(form, REASONING_FORMATS["harmony"] if name == "harmony" else None)
    if name in SPECIAL:
        return
    for parallel in (True, False):
        choice = ToolChoice(parallel=parallel)
        grammar = answer_grammar(fmt, TOOLS, choice, None, thinking_open=False, thinking_budget=None)
        assert grammar is not None
        body = 'place" "place>city="x" {"name": "place", "arguments": {"city": 5}}'
        for start in [*(form.section or ())[:1], form.begin, "".join((form.section or ("",))[:1]) + form.begin.strip()]:
            for blank in ("", " ", "\n"):
                matcher = LLMatcher(known[1], LLMatcher.grammar_from_lark(grammar))
                text = f"Hm{blank}{start.strip()}{blank}{body}".encode()
                accepted = matcher.try_consume_tokens(list(text))
                assert accepted < len(text), text


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_or_an_answer(name: str) -> None:
    rule = 'answer: "yes" | "no"\n'
    for answer in answers(name, ToolChoice(), answer=rule, count=3):
        assert bool(answer.calls) != (answer.text in ("yes", "no"))
    for answer in answers(name, ToolChoice(mode="none"), answer=rule, count=2):
        assert not answer.calls and answer.text in ("yes", "no")


@by_format
def test_the_constraint_begins_after_the_reasoning(name: str, special: bool) -> None:
    more = {"reasoning": reasoning_of(name), "special": special, "count": 2, "answer": 'answer: "yes"\n'}
    opened = name != "harmony"
    for budget in (None, 5):
        choice = ToolChoice(mode="none")
        thoughts = list(answers(name, choice, thinking_open=opened, thinking_budget=budget, **more))
        assert all(answer.text == "yes" for answer in thoughts)
        assert any(answer.reasoning for answer in thoughts) or not opened


def test_a_budget_of_reasoning_counts_tokens() -> None:
    name = "hermes"
    more = {"reasoning": REASONING_FORMATS["think"], "tools": [], "count": 8, "thinking_open": True}
    for special in (True, False):
        for answer in answers(name, ToolChoice(), thinking_budget=3, special=special, **more):
            assert len(answer.reasoning.encode()) <= 3 * len("\n</tool_call>")
        for answer in answers(name, ToolChoice(), thinking_budget=0, special=special, **more):
            assert not answer.reasoning


def grammar_of(parameters: dict[str, Any], name: str, mode: Any = "required", strict: bool = False) -> str | None:
    tools = [Tool(name="f", parameters=parameters, strict=strict)]
    fmt = OutputFormat(TOOL_FORMATS[name])
    return answer_grammar(fmt, tools, ToolChoice(mode=mode), None, thinking_open=False, thinking_budget=None)


def test_nothing_to_enforce() -> None:
    fmt = OutputFormat(TOOL_FORMATS["hermes"], REASONING_FORMATS["think"])
    plain = [Tool(name="f")]
    for choice in (ToolChoice(), ToolChoice(mode="none"), ToolChoice(mode="none", names=("f",), parallel=False)):
        assert answer_grammar(fmt, plain, choice, None, thinking_open=True, thinking_budget=None) is None
    assert answer_grammar(OutputFormat(), [], ToolChoice(), None, thinking_open=False, thinking_budget=5) is None
    for choice in (ToolChoice(names=("f",)), ToolChoice(parallel=False), ToolChoice(mode="required")):
        assert answer_grammar(fmt, plain, choice, None, thinking_open=True, thinking_budget=None) is not None


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            {"type": "object", "minProperties": 1},
            "parameters of tool 'f' cannot be enforced: minProperties: the format q",
        ),
        ({"properties": {"a": {"type": "string", "format": "date"}}}, "format of 'a'"),
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "pattern of 'a'"),
        ({"properties": {"a>": {}}}, "the name 'a>'"),
        ({"properties": {}, "required": ["b"]}, "required: 'b' is not in properties"),
        ({"properties": {"a": {"type": "array", "items": {"$ref": "#/properties/a"}}}}, "outside of"),
        ({"properties": {"a": {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "string"}]}}}, "a string beside"),
    ],
)
def test_what_tags_cannot_express_is_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        grammar_of(parameters, "qwen3_coder")
    assert grammar_of(parameters, "hermes") is not None


@pytest.mark.parametrize("name", ["hermes", "harmony", "lfm2", "gemma4", "qwen3_coder"])
def test_keywords_that_cannot_be_enforced_are_refused_where_the_schema_is_promised(name: str) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "contains": {"type": "integer"}}}}
    with pytest.raises(InvalidRequest, match=r"The parameters of tool 'f' cannot be enforced: .*contains"):
        grammar_of(parameters, name)
    tools = [Tool(name="f", parameters=parameters), Tool(name="g", strict=True)]
    fmt, known = OutputFormat(TOOL_FORMATS[name]), vocabulary(name, marks_are_special=True)
    more = {"thinking_open": False, "thinking_budget": None, "special_tokens": known[0].special}
    loose = answer_grammar(fmt, tools, ToolChoice(), None, **more)
    assert loose is not None
    assert not LLMatcher(known[1], LLMatcher.grammar_from_lark(loose)).is_error()


def test_choices_that_cannot_be_enforced_are_refused() -> None:
    def grammar(choice: ToolChoice, tools: list[Tool], fmt: OutputFormat) -> str | None:
        return answer_grammar(fmt, tools, choice, None, thinking_open=False, thinking_budget=None)

    with pytest.raises(InvalidRequest, match="tools has no tool that it allows"):
        grammar(ToolChoice(mode="required", names=("g",)), [Tool(name="f")], OutputFormat(TOOL_FORMATS["hermes"]))
    for strict, mode in ((False, "required"), (True, "auto")):
        with pytest.raises(InvalidRequest, match="the format in which this model calls tools is not known"):
            grammar(ToolChoice(mode=mode), [Tool(name="f", strict=strict)], OutputFormat())


def test_texts_of_the_client_are_no_special_tokens() -> None:
    parameters = {"type": "object", "properties": {"a": {"enum": ["<eos>", "<tool_call>"]}}, "required": ["a"]}
    for name in ("qwen3_coder", "hermes", "gemma4"):
        known = vocabulary(name, marks_are_special=True)
        special = {**known[0].special, "<eos>": known[0].eos_token_id}
        fmt, tools = OutputFormat(TOOL_FORMATS[name]), [Tool(name="f", parameters=parameters)]
        more = {"thinking_open": False, "thinking_budget": None, "special_tokens": special}
        grammar = answer_grammar(fmt, tools, ToolChoice(mode="required", parallel=False), None, **more)
        assert grammar is not None
        text = walk(grammar, known, 1)
        assert text is not None
        ((_, found),) = parse(fmt, [text], "", tools).parsed
        jsonschema.validate(found, parameters)


def test_lengths_of_strings_between_tags() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "minLength": 2, "maxLength": 4}}}
    parameters["required"] = ["a"]
    known = vocabulary("qwen3_coder", marks_are_special=False)
    grammar = grammar_of(parameters, "qwen3_coder")
    assert grammar is not None
    for seed in range(20):
        text = walk(grammar, known, seed)
        if text is not None:
            tools = [Tool(name="f", parameters=parameters)]
            for _, arguments in parse(OutputFormat(TOOL_FORMATS["qwen3_coder"]), [text], "", tools).parsed:
                assert 2 <= len(arguments["a"]) <= 4, json.dumps(text)
