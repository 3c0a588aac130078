"""Templates render as transformers renders them, and a bomb ends as an error, soon."""

# ruff: noqa: E501  # a template reads best on one line

from __future__ import annotations

import time
from typing import Any

import pytest

from truffula.errors import InvalidRequest, TemplateError
from truffula.text.chat_template import ChatTemplates

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
TOOLS = """
{% if tools %}
# Tools
    {% for tool in tools %}
{{ tool | tojson(indent=2) }}
    {% endfor %}
{% endif %}
{% set ns = namespace(turns=0, seen='') %}
{% for m in messages %}
    {% if m.role == 'system' %}{% continue %}{% endif %}
    {% set ns.turns = ns.turns + 1 %}
    {% set ns.seen = ns.seen ~ m.role[:1] %}
{{ bos_token }}[{{ loop.index0 }}/{{ messages | length }}] {{ m.role | upper }}: {{ m.content }}
    {% if m.tool_calls is defined %}
        {% for call in m.tool_calls %}
{{ call.function.name }}({% for k, v in call.function.arguments.items() | sort %}{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})
        {% endfor %}
    {% endif %}
{% generation %}{{ m.get('reasoning_content', '-') }}{% endgeneration %}

{% endfor %}
{% macro twice(x, times=2) %}{% for _ in range(times) %}{{ x }}{% endfor %}{% endmacro %}
{{ twice(ns.turns) }} {{ ns.seen.join(['<', '>']) }} {{ "%03d|%s" | format(7, 'é') }} {{ '{:>5}'.format('x') }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' & ') | replace('a', 'AA') }}
{{ (messages | last).content.split(' ')[1:] | list }} {{ 7 % 4 }} {{ 'a' * 3 }} {{ [1] + [2] }} {{ 2 ** 5 }}
{{ {'x': 'ü<&>'} | tojson }} {{ 'abc'[::-1] }} {{ none is none }} {{ mood | default('calm') }}
"""
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Speak for the trees."},
    {"role": "user", "content": " a tale of trees, please 🌲 "},
    {
        "role": "assistant",
        "content": "one moment",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "count", "arguments": {"b": [1, None], "a": "é"}}}
        ],
        "reasoning_content": "hm",
    },
    {"role": "tool", "content": "42", "tool_call_id": "1"},
    {"role": "user", "content": "go on then"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def templates(source: str, **limits: Any) -> ChatTemplates:
    return ChatTemplates({"default": source}, SPECIAL, **limits)


def theirs(source: str, messages: list[dict[str, Any]], **given: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([messages], chat_template=source, **SPECIAL, **given)
    return texts[0]


@pytest.mark.parametrize("source", [CHATML, TOOLS], ids=["chatml", "tools"])
@pytest.mark.parametrize("generation", [True, False])
def test_templates_render_as_in_transformers(source: str, generation: bool) -> None:
    tool = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "description": "ü<>"}}}
    for messages in (TALK, TALK[1:], TALK[:2]):
        ours = templates(source).render(
            messages, tools=[tool], add_generation_prompt=generation, variables={"mood": "glad"}
        )
        assert ours == theirs(source, messages, tools=[tool], add_generation_prompt=generation, mood="glad")


@pytest.mark.parametrize(
    "source", [CHATML, "{% for m in messages %}[{{ m.content }}]{% endfor %}!"], ids=["trims", "keeps"]
)
@pytest.mark.parametrize("last", ["The Lorax", "The Lorax ", "  The Lorax"])
def test_a_final_message_is_left_open_as_in_transformers(source: str, last: str) -> None:
    messages = [{"role": "user", "content": "Who speaks?"}, {"role": "assistant", "content": last}]
    ours = templates(source).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == theirs(source, messages, continue_final_message=True)
    assert ours.rstrip().endswith("The Lorax")


def test_a_final_message_that_the_template_drops_is_refused() -> None:
    with pytest.raises(TemplateError, match="leaves the end of the final message out"):
        templates("{{ messages[0].content }}").render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            add_generation_prompt=False,
            continue_final_message=True,
        )
    with pytest.raises(InvalidRequest, match="exclude each other"):
        templates(CHATML).render(TALK[:2], continue_final_message=True)


def test_what_a_dialect_may_send_becomes_what_a_template_expects() -> None:
    source = "{% for m in messages %}{{ m.role }}={{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.x }}{% endif %};{% endfor %}"
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 3}'}}]},
        {"role": "assistant", "content": "c", "tool_calls": []},
    ]
    assert templates(source).render(messages) == "system=a\nb;assistant=3;assistant=c;"
    knows = source + "{# developer #}"
    assert templates(knows).render(messages[:1]) == "developer=a\nb;"
    assert templates("{{ 'x' if 'tool_calls' in messages[0] else 'y' }}").render(messages[2:]) == "y"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], "messages[0].content[1]"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "messages[0].tool_calls[0]"),
        ([{"role": "user", "content": "x", "who": object()}], "messages[0]"),
    ],
)  # fmt: skip
def test_messages_that_are_no_conversation_in_text_are_refused_by_place(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        templates(CHATML).render(messages)
    assert caught.value.param == param
    assert caught.value.code == "invalid_request"


def test_the_template_is_chosen_by_name_and_use() -> None:
    both = ChatTemplates({"default": "plain", "tool_use": "tools", "rag": "rag"}, {})
    user = [{"role": "user", "content": "x"}]
    assert both.render(user) == "plain"
    assert both.render(user, tools=[{"type": "function"}]) == "tools"
    assert both.render(user, tools=[{"type": "function"}], template="default") == "plain"
    assert both.render(user, template="rag") == "rag"
    assert both.render(user, template="{{ messages[0].content }}{{ enable }}", variables={"enable": 1}) == "x1"
    with pytest.raises(TemplateError, match="name one of a, b"):
        ChatTemplates({"a": "", "b": ""}, {}).render(user)
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplates({}, {}).render(user)
    with pytest.raises(InvalidRequest, match="messages"):
        both.render(user, variables={"messages": []})


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('Roles must alternate!') }}", "Roles must alternate!"),
        ("{% if %}", "line 1"),
        ("{{ messages[0].content.nope.more }}", "nope"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include 'x' %}", "failed"),
        ("{{ 'a' | wordwrap(3) }}", "wordwrap"),
        ("{{ namespace(__html__=1) }}", "underscore"),
        ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "underscore"),
        ("(" * 10 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "compiled"),
        ("x" * 500_000, "500000 characters"),
    ],
)  # fmt: skip
def test_a_template_that_fails_says_why(source: str, says: str) -> None:
    with pytest.raises(TemplateError, match=says):
        templates(source).render([{"role": "user", "content": "hi"}])


DOUBLED = (
    "{% set ns = namespace(x=START) %}{% for _ in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x | length }}"
)
NAMES = "{% set ns = namespace(x=1) %}{% for _ in range(60) %}{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}"
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loop whose test is never true": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "range": "{% for a in range(10**9) %}{% endfor %}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "output in a macro": "{% macro m() %}{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endmacro %}{% set y = m() %}",
    "output in a block": "{% set y %}{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
    "multiplied text": "{{ 'x' * 10**10 }}",
    "multiplied list": "{{ ([1] * 10**9) | length }}",
    "multiplied list of text": "{{ ['x' * 1000000] * 1000000 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "power of powers": "{{ ((9 ** 999) ** 999) ** 999 }}",
    "doubled text by +": DOUBLED.replace("START", "'ab'").replace("STEP", "ns.x + ns.x"),
    "doubled text by ~": DOUBLED.replace("START", "'ab'").replace("STEP", "ns.x ~ ns.x"),
    "doubled list": DOUBLED.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "doubled dict": DOUBLED.replace("START", "1").replace("STEP", "{'a': ns.x, 'b': ns.x}"),
    "doubled tuple": DOUBLED.replace("START", "1").replace("STEP", "(ns.x, ns.x)"),
    "doubled by dict()": DOUBLED.replace("START", "1").replace("STEP", "dict(a=ns.x, b=ns.x)"),
    "doubled by format": DOUBLED.replace("START", "'ab'").replace("STEP", "'{0}{0}'.format(ns.x)"),
    "doubled by %": DOUBLED.replace("START", "'ab'").replace("STEP", "'%s%s' % (ns.x, ns.x)"),
    "doubled by the filter format": DOUBLED.replace("START", "'ab'").replace("STEP", "'%s%s' | format(ns.x, ns.x)"),
    "doubled by join": DOUBLED.replace("START", "'ab'").replace("STEP", "[ns.x, ns.x] | join"),
    "doubled by replace": DOUBLED.replace("START", "'ab'").replace("STEP", "ns.x.replace('a', ns.x)"),
    "nested namespaces": NAMES,
    "nested namespaces in a filter": NAMES.replace("{{ ns.x }}", "{{ ns.x | string | length }}"),
    "nested namespaces by ~": NAMES.replace("{{ ns.x }}", "{{ ns.x ~ '' }}"),
    "joined by a long separator": "{{ range(99999) | join('x' * 1000000) }}",
    "joined by the method": "{{ ('x' * 1000000).join('y' * 1000000) }}",
    "joined generator": "{{ ('x' * 1000000).join(range(99999) | map('string')) | length }}",
    "replaced by a long text": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) | length }}",
    "replaced within": "{{ ('a' * 1000000).replace('', 'b' * 1000000) | length }}",
    "centred": "{{ 'x' | center(10**10) }}",
    "justified": "{{ 'x'.ljust(10**10) }}",
    "tabs": "{{ ('\\t' * 1000000).expandtabs(99999) | length }}",
    "indented": "{{ ('\\n' * 1000000) | indent(99999) | length }}",
    "indented by text": "{{ ('\\n' * 1000000) | indent('x' * 1000000) | length }}",
    "wide format": "{{ '{:>10000000000}'.format('x') }}",
    "wide nested format": "{{ '{:>{w}}'.format('x', w=99999) * 99999 }}",
    "wide nested item": "{{ '{:>{0[0]}}'.format([10**10]) }}",
    "wide %": "{{ '%10000000000d' % 1 }}",
    "wide filter": "{{ '%10000000000d' | format(1) }}",
    "wide by star": "{{ '%*d' % (10**10, 1) }}",
    "json indents": "{{ (range(99999) | list) | tojson(indent=99999) }}",
    "summed lists": "{{ ([[1] * 900] * 900) | sum(start=[]) | length }}",
    "slow tests": "{{ range(99999) | select('in', range(99999) | list | reverse | list) | list | length }}",
    "copies by slice": "{% set ns = namespace(x=[]) %}{% set t = 'x' * 3000000 %}{% for _ in range(99999) %}{% set ns.x = ns.x + [t[1:]] %}{% endfor %}",
    "copies by method": "{% set ns = namespace(x=[]) %}{% set t = 'x' * 3000000 %}{% for _ in range(99999) %}{% set ns.x = [ns.x, t.upper()] %}{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a tree of calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% set ns = namespace(x=[]) %}{% for i in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "translated": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) | length }}",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_ends_as_a_template_error(bomb: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError):
        templates(BOMBS[bomb], seconds=0.3).render([{"role": "user", "content": "hi"}])
    # Not a measure of speed: without limits each of these runs for hours or takes the machine's memory.
    assert time.monotonic() - began < 60


def test_steps_are_counted_whatever_the_clock_says() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="500000 steps"):
        templates(source, seconds=3600).render([{"role": "user", "content": "hi"}])


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 400} for i in range(400)]
    text = templates(CHATML, seconds=60).render(messages)
    assert text == theirs(CHATML, messages, add_generation_prompt=True)
    with pytest.raises(TemplateError, match="characters"):
        templates(CHATML, max_chars=10_000).render(messages)
