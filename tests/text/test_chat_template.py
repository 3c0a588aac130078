"""Templates render as transformers renders them; one that fails says why."""

# ruff: noqa: E501  # a template reads best on one line

from __future__ import annotations

from typing import Any

import pytest
from chats import chat

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


def templates(source: str) -> ChatTemplates:
    return ChatTemplates({"default": source}, SPECIAL)


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
            chat(messages, tools=[tool], add_generation_prompt=generation, variables={"mood": "glad"})
        )
        assert ours == theirs(source, messages, tools=[tool], add_generation_prompt=generation, mood="glad")


@pytest.mark.parametrize(
    "source", [CHATML, "{% for m in messages %}[{{ m.content }}]{% endfor %}!"], ids=["trims", "keeps"]
)
@pytest.mark.parametrize("last", ["The Lorax", "The Lorax ", "  The Lorax"])
def test_a_final_message_is_left_open_as_in_transformers(source: str, last: str) -> None:
    messages = [{"role": "user", "content": "Who speaks?"}, {"role": "assistant", "content": last}]
    ours = templates(source).render(chat(messages, add_generation_prompt=False, continue_final_message=True))
    assert ours == theirs(source, messages, continue_final_message=True)
    assert ours.rstrip().endswith("The Lorax")


def test_a_final_message_that_the_template_drops_is_refused() -> None:
    with pytest.raises(TemplateError, match="leaves the end of the final message out"):
        templates("{{ messages[0].content }}").render(
            chat(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                add_generation_prompt=False,
                continue_final_message=True,
            )
        )
    with pytest.raises(InvalidRequest, match="exclude each other"):
        templates(CHATML).render(chat(TALK[:2], continue_final_message=True))


def test_what_a_dialect_may_send_becomes_what_a_template_expects() -> None:
    source = "{% for m in messages %}{{ m.role }}={{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.x }}{% endif %};{% endfor %}"
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 3}'}}]},
        {"role": "assistant", "content": "c", "tool_calls": []},
    ]
    assert templates(source).render(chat(messages)) == "system=a\nb;assistant=3;assistant=c;"
    knows = source + "{# developer #}"
    assert templates(knows).render(chat(messages[:1])) == "developer=a\nb;"
    assert templates("{{ 'x' if 'tool_calls' in messages[0] else 'y' }}").render(chat(messages[2:])) == "y"


def test_the_template_is_chosen_by_name_and_use() -> None:
    both = ChatTemplates({"default": "plain", "tool_use": "tools", "rag": "rag"}, {})
    user = [{"role": "user", "content": "x"}]
    assert both.render(chat(user)) == "plain"
    assert both.render(chat(user, tools=[{"type": "function", "function": {"name": "f"}}])) == "tools"
    assert (
        both.render(chat(user, tools=[{"type": "function", "function": {"name": "f"}}], template="default")) == "plain"
    )
    assert both.render(chat(user, template="rag")) == "rag"
    assert both.render(chat(user, template="{{ messages[0].content }}{{ enable }}", variables={"enable": 1})) == "x1"
    with pytest.raises(TemplateError, match="name one of a, b"):
        ChatTemplates({"a": "", "b": ""}, {}).render(chat(user))
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplates({}, {}).render(chat(user))
    with pytest.raises(InvalidRequest, match="messages"):
        both.render(chat(user, variables={"messages": []}))


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
        ("(" * 10 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "compiled"),
        ("x" * 500_000, "500000 characters"),
    ],
)  # fmt: skip
def test_a_template_that_fails_says_why(source: str, says: str) -> None:
    with pytest.raises(TemplateError, match=says):
        templates(source).render(chat([{"role": "user", "content": "hi"}]))


def test_a_long_conversation_is_rendered_and_its_length_is_limited() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 400} for i in range(400)]
    text = templates(CHATML).render(chat(messages))
    assert text == theirs(CHATML, messages, add_generation_prompt=True)
    with pytest.raises(TemplateError, match="characters"):
        templates("{% for i in range(2001) %}{{ messages[0].content }}{% endfor %}").render(chat(messages))
