"""What a chat template leaves out of the prompt is found, in whatever way other templates read it."""

# ruff: noqa: E501  # a template reads best on one line

from __future__ import annotations

from typing import Any

import pytest
from chats import chat

from truffula.errors import TemplateError
from truffula.text.chat_template import ChatTemplates

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How warm is it?", "name": "ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "21 degrees", "tool_call_id": "c1", "name": "weather"},
    {"role": "user", "content": "And now?"},
]
DOCUMENTS = [{"title": "Weather", "text": "It is 21 degrees."}, {"title": "Other", "text": "Nothing."}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
EVERYTHING = (
    "{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
    "({{ c.function.arguments | tojson }}){% endfor %}\n{% endfor %}"
    "{% for d in documents %}{{ d.title }}{{ d.text }}{% endfor %}{{ tools }}"
)


def left_out(template: str, messages: Any = TALK, prompt: str = "", **more: Any) -> list[tuple[str, str]]:
    found = ChatTemplates({"default": template}, {}).left_out(chat(messages, **more), prompt)
    return [(place.kind, place.param) for place in found.places]


def test_a_template_that_writes_everything_leaves_nothing_out() -> None:
    assert left_out(EVERYTHING, documents=DOCUMENTS, tools=TOOLS) == []


def test_each_kind_is_named_with_its_place() -> None:
    found = left_out(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        documents=DOCUMENTS,
        tools=TOOLS,
    )
    assert sorted(found) == [
        ("documents", "documents[0]"),
        ("documents", "documents[1]"),
        ("name", "messages[1].name"),
        ("system message", "messages[0].content"),
        ("tool calls", "messages[2].tool_calls"),
        ("tool message", "messages[3].content"),
        ("tools", "tools[0]"),
    ]


def test_reading_is_not_writing() -> None:
    """Many templates take the content first and look at the role later."""
    template = "{% for m in messages %}{% set c = m['content'] | trim %}{% if m.role != 'tool' %}{{ c }}{% endif %}{% endfor %}"
    assert ("tool message", "messages[3].content") in left_out(template)


READS_TOOL_MESSAGES = {
    "by name": PLAIN,
    "by key": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "by get": "{% for m in messages %}{{ m.get('content', '') }}{% endfor %}",
    "by items": "{% for m in messages %}{% for k, v in m.items() %}{{ v }}{% endfor %}{% endfor %}",
    "by values": "{% for m in messages %}{{ m.values() | list }}{% endfor %}",
    "as JSON": "{{ messages | tojson }}",
    "by a filter": "{{ messages | map(attribute='content') | join(' ') }}",
    "in a macro": "{% macro one(m) %}{{ m.content | trim }}{% endmacro %}{% for m in messages %}{{ one(m) }}{% endfor %}",
    "in another case": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "in a namespace": "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.content %}{% endfor %}{{ ns.t }}",
    "as JSON in JSON": "{% for m in messages %}{{ {'result': m.content | tojson} | tojson }}{% endfor %}",
}


@pytest.mark.parametrize("way", READS_TOOL_MESSAGES)
def test_a_tool_message_is_found_however_it_is_read(way: str) -> None:
    assert ("tool message", "messages[3].content") not in left_out(READS_TOOL_MESSAGES[way])


@pytest.mark.parametrize(
    "way",
    [
        "{{ documents | tojson }}",
        "{% for d in documents %}{% for k, v in d.items() %}{{ v }}{% endfor %}{% endfor %}",
        "{% for d in documents %}{{ d['text'] }}{% endfor %}",
    ],
)
def test_documents_are_found_however_they_are_read(way: str) -> None:
    assert left_out(PLAIN + way, [TALK[-1]], documents=DOCUMENTS) == []
    assert left_out(PLAIN, [TALK[-1]], documents=DOCUMENTS) == [
        ("documents", "documents[0]"),
        ("documents", "documents[1]"),
    ]


def test_a_document_without_the_field_that_the_template_writes() -> None:
    assert left_out("{% for d in documents %}{{ d.text }}{% endfor %}", [TALK[-1]], documents=[{"body": "x"}]) == [
        ("documents", "documents[0]")
    ]
    assert left_out(PLAIN, [TALK[-1]], documents=[{"text": "  "}, {"score": 3}]) == [], "nothing is there to lose"


def test_only_the_messages_that_are_left_out_are_named() -> None:
    template = "{{ messages[0].content }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    talk = [TALK[0], {"role": "system", "content": "And brief."}, {"role": "user", "content": "Hi"}]
    assert left_out(template, talk) == [("system message", "messages[1].content")]
    assert left_out(template, [{"role": "user", "content": "Hi"}, {"role": "tool", "content": " "}]) == []


USERS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "template", [USERS, f"Be kind. {USERS}", PLAIN, f"Be kind. {PLAIN}", "{{ messages | tojson }}"]
)
@pytest.mark.parametrize("system", ["Be kind.", " Be kind.\n", "Hi", 'a "quoted" word'])
@pytest.mark.parametrize("user", ["Hi", "Hi. Be kind."])
def test_the_prompt_at_hand_gives_the_same_answer(template: str, system: str, user: str) -> None:
    """Where the template has the system message's words itself, or the user says them, they prove nothing."""
    talk = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    prompt = ChatTemplates({"default": template}, {}).render(chat(talk))
    expected = [("system message", "messages[0].content")] if USERS in template else []
    assert left_out(template, talk, prompt=prompt) == left_out(template, talk) == expected


def test_a_system_message_that_is_in_the_prompt_is_not_asked_about() -> None:
    template = "{% if 'kind' in messages[0].content %}{{ messages[0].content }}{% endif %}"
    prompt = ChatTemplates({"default": template}, {}).render(chat(TALK[:1]))
    assert left_out(template, TALK[:1]) == [("system message", "messages[0].content")], "no word is kind"
    assert left_out(template, TALK[:1], prompt=prompt) == []


def test_a_role_of_another_name_counts_too() -> None:
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    talk = [{"role": "developer", "content": "x"}, {"role": "function", "name": "f", "content": "5"}]
    assert sorted(kind for kind, _ in left_out(users, talk)) == ["name", "system message", "tool message"]


def test_a_template_that_refuses_the_words_is_given_the_benefit() -> None:
    template = "{% for m in messages %}{% if m.role == 'tool' and 'degrees' not in m.content %}{{ raise_exception('odd') }}{% endif %}{{ m.content }}{% endfor %}"
    assert left_out(template) == []


def test_words_that_lead_a_template_another_way_are_asked_about_by_themselves() -> None:
    """A call is written only where its function is one of the tools, and its result after it."""
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{% for t in tools %}{% if t.function.name == c.function.name %}"
        "{{ t.function.name }}: {{ (messages | last).content }}{% endif %}{% endfor %}{% endfor %}{% endfor %}"
    )
    talk = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "21 degrees"}]
    assert ("tool message", "messages[1].content") not in left_out(template, talk, tools=TOOLS)
    others = [{"type": "function", "function": {"name": "other"}}]
    assert ("tool message", "messages[1].content") in left_out(template, talk, tools=others)


def test_variables_that_a_template_never_mentions() -> None:
    template = "{% if enable_thinking is defined and not enable_thinking %}-{% endif %}{% set mine = 1 %}" + PLAIN
    variables = {"enable_thinking": True, "thinking": True, "mine": 2}
    found = ChatTemplates({"default": template}, {}).left_out(chat([TALK[-1]], variables=variables))
    assert found.fields == ("template_kwargs.thinking", "template_kwargs.mine"), "the template overwrites the last"
    assert found.places == ()


def test_the_conversation_is_not_changed() -> None:
    before = repr((TALK, DOCUMENTS, TOOLS))
    left_out(PLAIN, documents=DOCUMENTS, tools=TOOLS)
    assert repr((TALK, DOCUMENTS, TOOLS)) == before


def test_a_broken_template_is_refused_as_in_rendering() -> None:
    with pytest.raises(TemplateError, match="not valid Jinja"):
        ChatTemplates({"default": "{% if %}"}, {}).left_out(chat(TALK, variables={"x": 1}))
