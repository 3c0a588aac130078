"""Tool calls and reasoning: what the published chat templates write is parsed back, whatever the pieces."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from answers import MODELS, TOOLS, Answer, Call, Model, format_of, parse, rendered, template
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from truffula.errors import ConfigError
from truffula.items import Text, Tool, ToolCallPart
from truffula.text.output_parser import make_parser
from truffula.text.tool_formats import REASONING_FORMATS, TOOL_FORMATS, OutputFormat, detect_format

HARD: dict[str, Any] = {
    "city": 'A "b" \\ {c} [d] \' \n é 😀 </tool_call> <tool_call> ``` <|call|> </think>\n',
    "days": -3,
    "ratio": 2.5e-7,
    "flag": True,
    "opts": {"a": [1, True, None, "}", {}], "b_2": {"c": "]]"}},
    "items": [[], {}, "x"],
    "maybe": None,
    "kind": "a",
}
by_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
FORMATS = {(model.tools, model.reasoning): model.name for model in reversed(MODELS)}
# Properties of a format: of the models that share one, only the first is in the fast suite.
by_format = pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id=model.name, marks=[pytest.mark.slow] * (model.name not in FORMATS.values()))
        for model in MODELS
    ],
)


def example_of(model: Model, arguments: dict[str, Any]) -> tuple[str, str, Answer]:
    """The prompt, the answer, and what it is parsed to."""
    calls: list[Call] = [("get_weather", arguments), ("ping", {})]
    calls = calls if model.several else calls[:1]
    text = "Some text: 1 < 2, [x] and {y}." if model.text else ""
    thought = "I think\n\nso <b>." if model.thinks else ""
    prompt, answer = rendered(model, text, thought, calls)
    return prompt, answer, Answer(text, thought, [[name, json.dumps(given)] for name, given in calls])


def same(found: Answer, expected: Answer) -> bool:
    return (found.text, found.reasoning, found.parsed) == (expected.text, expected.reasoning, expected.parsed)


def joined(answer: Answer) -> tuple[str, str, list[list[str]]]:
    return answer.text, answer.reasoning, answer.calls


@by_model
def test_the_format_of_a_template_is_detected(model: Model) -> None:
    found = format_of(model)
    names = found.tools and found.tools.name, found.reasoning and found.reasoning.name
    assert names == (model.tools, model.reasoning)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=OutputFormat) == found


def test_every_tool_format_has_a_template() -> None:
    # The template of Granite 3.3 describes calls in its system message, and writes none.
    assert {model.tools for model in MODELS} | {"granite"} == set(TOOL_FORMATS)
    assert detect_format(template("granite_3_3")[0]).described == "tool calls granite, reasoning granite"


@by_model
@pytest.mark.parametrize("whole", [False, True])
def test_an_answer_is_parsed_in_every_split(model: Model, whole: bool) -> None:
    prompt, answer, expected = example_of(model, HARD)
    fmt = format_of(model)
    first = parse(fmt, [answer], prompt, whole=whole)
    assert same(first, expected)
    assert joined(parse(fmt, answer, prompt, whole=whole)) == joined(first)
    for at in range(0, len(answer), 7 if whole else 1):
        assert joined(parse(fmt, [answer[:at], answer[at:]], prompt, whole=whole)) == joined(first), at


fragments = st.sampled_from(
    ['"', "\\", "{", "}", "[", "]", "'", "\n", ":", ",", "é", "😀", "</tool_call>", "<tool_call>", "</parameter>",
     "<parameter=x>", "</function>", "</arg_value>", "```", "<|call|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>",
     "<｜tool▁call▁end｜>", "<|tool_call_end|>", "<tool_call|>", "null", "12", "\\u0041", "\\n"]
)  # fmt: skip
characters = st.characters(exclude_categories=["Cs", "Cc"])
texts = st.lists(fragments | st.text(characters, max_size=3), max_size=6).map("".join)
keys = st.from_regex(r"[a-z][a-z0-9_]{0,4}", fullmatch=True)
floats = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**70), 2**70)
scalars = st.none() | st.booleans() | integers | floats | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
arguments_strategy = st.fixed_dictionaries(
    {},
    optional={
        "city": texts,
        "days": integers,
        "ratio": floats,
        "flag": st.booleans(),
        "opts": st.dictionaries(keys, values, max_size=3),
        "items": st.lists(values, max_size=3),
        "maybe": st.none() | texts,
        "kind": st.sampled_from(["a", "b"]),
    },
)
AMBIGUOUS = re.compile(r"</(parameter|arg_value)>\s*(<|</)(parameter|function|tool_call|arg_key|seed|invoke|/)")


@by_format
@settings(max_examples=20, deadline=None)
@given(arguments=arguments_strategy, data=st.data())
def test_any_arguments_in_any_pieces(model: Model, arguments: dict[str, Any], data: st.DataObject) -> None:
    form = TOOL_FORMATS[model.tools or ""]
    if form.syntax == "tagged":
        # These formats have no escapes: text that looks like the end of the value, or like another type, is that.
        assume(not AMBIGUOUS.search(json.dumps(arguments, ensure_ascii=False).replace("\\n", "\n")))
        assume(str(arguments.get("maybe", "")).strip().lower() not in ("null", "none") or arguments["maybe"] is None)
        if model.name in ("seed_oss",):
            assume("\\" not in json.dumps(arguments, ensure_ascii=False))
    if form.values == "gemma":
        arguments = json.loads(json.dumps(arguments, sort_keys=True))
    prompt, answer, expected = example_of(model, arguments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert same(parse(format_of(model), pieces, prompt), expected)


@by_format
def test_an_answer_that_is_cut_loses_nothing(model: Model) -> None:
    """An incomplete call is text as a whole, or, in a stream, what was sent of it remains a call."""
    prompt, answer, _ = example_of(model, HARD)
    fmt = format_of(model)
    for end in range(0, len(answer), 2):
        whole = parse(fmt, [answer[:end]], prompt, whole=True)
        assert all(isinstance(arguments, dict) for _, arguments in whole.parsed)
        streamed = parse(fmt, [answer[:end]], prompt)
        assert whole.calls == streamed.calls[: len(whole.calls)]
        if not whole.calls and not fmt.reasoning:
            assert whole.text.rstrip() == answer[:end].rstrip()


def words_of(text: str) -> list[str]:
    return re.findall(r"zq\d+z", text)


def pieces_of(model: Model) -> list[str]:
    """Fragments of the format: its markers, and those of JSON."""
    fmt = format_of(model)
    marks = [value for row in (fmt.tools, fmt.reasoning) if row for value in msgspec.structs.astuple(row)]
    found = [text for value in marks for text in (value if isinstance(value, tuple) else [value])]
    harmony = ["<|start|>assistant", "<|channel|>", "analysis", "final", "commentary", "<|message|>", "<|end|>"]
    extra = [" to=functions.ping", "<|call|>"] if model.tools == "harmony" else []
    plain = [
        '{"name": "',
        '"arguments": ',
        '", ',
        "{",
        "}",
        "[",
        "]",
        '"',
        "ping",
        "get_weather",
        "(",
        ")",
        "city=",
        "\n",
    ]
    return [text for text in [*found, *plain, *extra, *(harmony if extra else [])] if isinstance(text, str) and text]


@by_format
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_answer_is_lost_or_fails(model: Model, data: st.DataObject) -> None:
    fmt = format_of(model)
    chosen = data.draw(st.lists(st.sampled_from(pieces_of(model)) | st.just("zq"), max_size=14))
    answer = "".join(f"zq{i}z" if piece == "zq" else piece for i, piece in enumerate(chosen))
    for whole in (False, True):
        found = parse(fmt, [answer], whole=whole)
        assert joined(parse(fmt, answer, whole=whole)) == joined(found)
        kept = found.text + found.reasoning + "".join(name + given for name, given in found.calls)
        if not found.calls:
            assert set(words_of(answer)) <= set(words_of(kept))
        if whole:
            assert all(isinstance(arguments, dict) for _, arguments in found.parsed)


HERMES = OutputFormat(TOOL_FORMATS["hermes"])
THINK = OutputFormat(TOOL_FORMATS["hermes"], REASONING_FORMATS["think"])
LLAMA = OutputFormat(TOOL_FORMATS["llama_json"])
HARMONY = OutputFormat(TOOL_FORMATS["harmony"], REASONING_FORMATS["harmony"])
PING = ["ping", "{}"]


@pytest.mark.parametrize(
    ("fmt", "answer", "text", "calls"),
    [
        ("hermes", "plain", "plain", []),
        ("hermes", "  two  spaces  ", "  two  spaces  ", []),
        ("hermes", "a <tool_call> b", "a <tool_call> b", []),
        ("hermes", '<tool_call>{"name": "ping"}</tool_call> after', "after", [PING]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "ping"}</tool_call>', "", [["ping", '{"a": 1}']]),
        ("hermes", '<tool_call>{"name": "ping", "arguments": "{\\"a\\": 1}"}', "", [["ping", '{"a": 1}']]),
        ("hermes", '<tool_call>{"name": "ping", "arguments": null, "id": [1]}', "", [PING]),
        ("hermes", '<tool_call>{"name": "ping", "arguments": 5}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "ping", "arguments": "x"}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>[{"name": "ping", "arguments": {}}]</tool_call>', "", [PING]),
        ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [["other", "{}"]]),
        ("hermes", '<tool_call>{"name": "ping", "arguments": {}', "", [PING]),
        ("granite", '<|tool_call|>[{"name": "ping", "arguments": {}}]', "", [PING]),
        ("granite", "<|tool_call|>[]", "<|tool_call|>[]", []),
        ("mistral", '[TOOL_CALLS][{"name": "ping", "arguments": {}}]', "", [PING]),
        ("mistral_json", '[TOOL_CALLS]{"name": "ping", "arguments": {}}', "", [PING]),
        ("llama_json", '<|python_tag|>{"name": "ping", "parameters": {}}', "", [PING]),
        ("llama_json", '{"type": "function", "name": "ping", "parameters": {}}', "", [PING]),
        ("llama_json", '{"name": "ping", "parameters": {}}; {"name": "ping", "arguments": {}}', "", [PING, PING]),
        ("llama_json", '{"name": "ping", "parameters": {}}; that', "; that", [PING]),
        ("llama_json", '{"name": "unknown", "parameters": {}}', None, []),
        ("llama_json", '{"name": "ping"}', None, []),
        ("llama_json", '{"city": "Paris"}', None, []),
        ("llama_json", 'See {"name": "ping", "parameters": {}}', None, []),
        ("llama_pythonic", "[ping()] then", "then", [PING]),
        ("llama_pythonic", "[1, 2, 3]", None, []),
        ("llama_pythonic", "[unknown()]", None, []),
        ("llama_pythonic", "<|python_start|>[ping(a='\\x41\\u00e9\\U0001F600\\'')]<|python_end|>", "",
         [["ping", '{"a": "\\u0041\\u00e9😀\'"}']]),
        ("qwen3_coder", "<tool_call><function=ping></tool_call>", "", [PING]),
        ("qwen3_coder", "<tool_call>\n<function=ping>\n<parameter=a>\n[1, 'x']\n</parameter></function>", "",
         [["ping", '{"a": [1, "x"]}']]),
        ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>ping<|tool_call_argument_begin|><|tool_call_end|>",
         "", [PING]),
        ("kimi_k2", "<|tool_calls_section_begin|>x", "<|tool_calls_section_begin|>x", []),
        ("harmony", "no channel", "no channel", []),
        ("harmony", "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|message|>Then",
         "First.\nThen", []),
        ("harmony", "<|channel|>commentary to=functions.ping <|constrain|>json<|message|>{}<|call|>", "", [PING]),
        ("harmony", "<|channel|>commentary to=browser.open<|message|>{}<|call|>", None, []),
        ("harmony", "<|channel|>analysis to=functions.ping<|message|>print", None, []),
    ],
)  # fmt: skip
def test_unusual_answers(fmt: str, answer: str, text: str | None, calls: list[list[str]]) -> None:
    """``text`` None: the answer itself."""
    for whole in (False, True):
        found = parse(OutputFormat(TOOL_FORMATS[fmt]), answer, whole=whole)
        expected = answer.removesuffix("<|call|>") if text is None else text
        assert (found.text, found.calls) == (expected, calls)
        assert all(re.fullmatch(r"call_[0-9a-f]{24}", id) for id in found.ids)
        assert len(set(found.ids)) == len(found.ids)


def test_arguments_are_streamed() -> None:
    parser = make_parser(HERMES, TOOLS, prompt_tail="")
    assert parser.feed('Hi <tool_call>{"name": "get_weather", "arg') == [Text("Hi")]
    (started, opened) = parser.feed('uments": {"ci')
    assert isinstance(started, ToolCallPart) and (started.name, started.arguments) == ("get_weather", "")
    assert opened == ToolCallPart(0, '{"ci')
    assert parser.feed('ty": "Pa') == [ToolCallPart(0, 'ty": "Pa')]
    assert parser.feed('ris"}}') == [ToolCallPart(0, 'ris"}')]
    parser = make_parser(OutputFormat(TOOL_FORMATS["qwen3_coder"]), TOOLS, prompt_tail="")
    parser.feed("<tool_call><function=get_weather><parameter=city>")
    assert parser.feed('\nPa"') == [ToolCallPart(0, 'Pa\\"')]


def test_a_call_that_breaks_off_in_a_stream_stays_and_the_rest_is_text() -> None:
    answer = '<tool_call>{"name": "ping", "arguments": {"a": tru'
    streamed = parse(HERMES, answer)
    assert (streamed.text, streamed.calls) == ("tru", [["ping", '{"a": ']])
    assert joined(parse(HERMES, answer, whole=True)) == (answer, "", [])


@pytest.mark.parametrize(
    ("fmt", "prompt", "answer", "reasoning", "text"),
    [
        ("think", "", "<think>\nHm.\n</think>\n\nYes. ", "Hm.", "Yes. "),
        ("think", "", "<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("think", "", "  Yes, </think> is a tag and <think> too", "", "  Yes, </think> is a tag and <think> too"),
        ("think", "x<think>\n", "Hm.\n</think>Yes.", "Hm.", "Yes."),
        ("think", "x<think>\n", "Hm. Cut", "Hm. Cut", ""),
        ("think", "x<think>\n\n</think>\n\n", "Yes.", "", "Yes."),
        ("think", "x</think>", "</think>Yes.", "", "Yes."),
        ("think", "<think> in the question", "Yes.", "", "Yes."),
        ("deepseek_r1", "", "Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", "", "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", "x<think></think>", "Yes.", "", "Yes."),
        ("granite", "", "<think>Hm.</think><response>Yes.</response>", "Hm.", "Yes."),
        ("granite_3_2", "", "Here is my thought process: Hm. Here is my response: Yes.", "Hm.", "Yes."),
        ("mistral", "", "[THINK]Hm.[/THINK]Yes.[THINK]Ho.[/THINK]", "Hm.Ho.", "Yes."),
        ("gemma4", "", "<|channel>thought\nHm.\n<channel|>Yes.", "Hm.", "Yes."),
        ("seed_oss", "", "<seed:think>Hm.</seed:think>Yes.", "Hm.", "Yes."),
    ],
)
def test_reasoning(fmt: str, prompt: str, answer: str, reasoning: str, text: str) -> None:
    for tools in (TOOLS, []):
        for whole in (False, True):
            if whole and answer.startswith("  Yes"):
                continue
            output = OutputFormat(TOOL_FORMATS["hermes"], REASONING_FORMATS[fmt])
            found = parse(output, answer, prompt, tools, whole=whole)
            assert (found.reasoning, found.text.rstrip()) == (reasoning, text.rstrip())
            assert joined(parse(output, [answer], prompt, tools, whole=whole)) == joined(found)


def test_text_before_an_end_of_reasoning_that_nothing_opened() -> None:
    answer = "Hm.\n</think>\n\nYes."
    assert joined(parse(THINK, answer, whole=True)) == ("Yes.", "Hm.", [])
    assert joined(parse(THINK, answer)) == ("Hm.\n</think>\n\nYes.", "", [])  # it was sent


def test_calls_end_reasoning_where_the_format_says_so() -> None:
    answer = "Hm. <|tool_calls_section_begin|><|tool_call_begin|>functions.ping:0<|tool_call_argument_begin|>{}"
    found = parse(OutputFormat(TOOL_FORMATS["kimi_k2"], REASONING_FORMATS["think"]), answer, "<think>")
    assert joined(found) == ("", "Hm.", [PING])
    assert parse(THINK, "Hm. <tool_call> x", "<think>").reasoning == "Hm. <tool_call> x"


def test_harmony() -> None:
    answer = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant to=functions.ping<|channel|>commentary json<|message|>{}<|call|>"
    )
    assert joined(parse(HARMONY, answer)) == ("I look.", "Hm.", [PING])
    assert parse(HARMONY, answer, tools=[]).text.endswith("<|channel|>commentary json<|message|>{}")
    final = "<|channel|>final<|message|>Yes.<|return|>"
    assert joined(parse(HARMONY, final)) == ("Yes.", "", [])
    assert joined(parse(OutputFormat(TOOL_FORMATS["harmony"]), answer)) == ("Hm.\nI look.", "", [PING])


def test_special_tokens_are_left_out_except_markers() -> None:
    special = ["<|im_end|>", "<tool_call>", "<think>", "</think>", "<pad>"]
    answer = '<think>a<pad>b</think>c<pad>d <tool_call>{"name": "ping", "arguments": {"a": "<pad>"}}<|im_end|>'
    assert joined(parse(THINK, answer, special=special)) == ("cd", "ab", [["ping", '{"a": "<pad>"}']])


def test_without_tools_calls_are_text() -> None:
    answer = '<tool_call>{"name": "ping", "arguments": {}}</tool_call>'
    assert joined(parse(HERMES, answer, tools=[])) == (answer, "", [])
    assert joined(parse(OutputFormat(), answer)) == (answer, "", [])


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": "integer"}, "12.0", 12),
        ({"type": "integer"}, "12.5", "12.5"),
        ({"type": "integer"}, "12345678901234567890123", 12345678901234567890123),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "1", "1"),
        ({"type": ["integer", "null"]}, "None", None),
        ({"type": ["integer", "string"]}, "7", 7),
        ({"type": ["string", "integer"]}, "7", "7"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": True}, "true", True),
        ({"$ref": "#/$defs/whole"}, "7", 7),
        ({"$ref": "#/$defs/loop"}, "7", 7),
        ({"$ref": "#/nowhere"}, "x", "x"),
        ({"type": "object"}, "{'a': None}", {"a": None}),
        ({"type": "object"}, "{'a': ", "{'a': "),
        ({"type": "array"}, '["\\u00e9"]', ["é"]),
        ({}, "[1]", [1]),
        ({}, "word", "word"),
        ({"type": "integer", "nullable": True}, "null", None),
        (True, "7", 7),
    ],
)
def test_the_schema_tells_the_type_of_tagged_values(schema: Any, text: str, value: Any) -> None:
    definitions = {"whole": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}
    tool = Tool(name="f", parameters={"type": "object", "properties": {"a": schema}, "$defs": definitions})
    answer = f"<tool_call>f<arg_key>a</arg_key><arg_value>{text}</arg_value></tool_call>"
    ((_, found),) = parse(OutputFormat(TOOL_FORMATS["glm4_7"]), answer, tools=[tool]).parsed
    assert found == {"a": value} and type(found["a"]) is type(value)


def tags(begin: str, end: str, **more: Any) -> dict[str, Any]:
    fields = {"tool_calls": {"open": begin, "close_pattern": end, "repeats": True, **more}}
    return {"start_anchor": "x", "fields": {**fields, "content": {"close_pattern": r"<\|im_end\|>\s*"}}}


@pytest.mark.parametrize(
    ("spec", "tools"),
    [
        (tags("<tool_call>", r"</tool_call>\s*", content="json"), "hermes"),
        (tags("<calls>", r"</calls>\s*", content="json"), "response_template"),
        ({"fields": {"tool_calls": {"open_pattern": r"<\|tool_call>call:(?P<name>\w+)", "content": "json"}}}, "gemma4"),
        ({"fields": {"tool_calls": {"open_pattern": r"<tool_call>\s*<function=(?P<name>[^\n>]+)>",
                                    "content_args": {"tag_pattern": "<parameter=(?P<key>x)>"}}}}, "qwen3_coder"),
        ({"fields": []}, "llama_json"),
        ({"fields": {"tool_calls": 5, "content": {}}}, "llama_json"),
        ({}, "llama_json"),
    ],
)  # fmt: skip
def test_a_response_template_decides(spec: dict[str, Any], tools: str) -> None:
    found = detect_format(template("llama_3_1")[0], spec)
    assert found.tools is not None and found.tools.name == tools
    if tools == "response_template":
        answer = '<calls>{"name": "ping", "arguments": {}}</calls>'
        assert parse(found, answer).calls == [PING]


def test_reasoning_tags_of_a_response_template() -> None:
    spec = {"fields": {"thinking": {"open": "<mind>", "close_pattern": r"</mind>\s*"}}}
    found = detect_format("", spec)
    assert joined(parse(found, "<mind>Hm.</mind> Yes.")) == ("Yes.", "Hm.", [])


def test_the_documentation_lists_the_formats() -> None:
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
    tables = page.partition("### Formats of tool calls and reasoning")[2].partition("## Completions")[0]
    tools, _, reasoning = tables.partition("| `--reasoning-format` |")
    for names, rows in ((tools, TOOL_FORMATS), (reasoning, REASONING_FORMATS)):
        first = [line.split("|")[1] for line in names.splitlines() if line.startswith("| `")]
        listed = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
        assert listed == set(rows)


def test_options_override_the_detection() -> None:
    source = "<tool_call> <think></think>"
    assert detect_format(source).described == "tool calls hermes, reasoning think"
    assert detect_format(source, None, "none", "none") == OutputFormat()
    assert detect_format(source, None, "auto", "mistral").described == "tool calls hermes, reasoning mistral"
    with pytest.raises(ConfigError, match="--tool-format is 'hermez'; it must be one of auto, none, harmony, "):
        detect_format(source, None, "hermez")
    with pytest.raises(ConfigError, match="--reasoning-format is 'x'; it must be one of auto, none, "):
        detect_format(source, None, None, "x")
    assert detect_format("plain") == OutputFormat()


def test_a_response_template_that_is_nested_deeply_is_read() -> None:
    deep: Any = "<tool_call>"
    for _ in range(5000):
        deep = [deep]
    assert detect_format("", {"fields": {"tool_calls": {"x": deep}}}) is not None
