"""Structural tags, and constraints as a part of a larger grammar."""

import json

import pytest
from walker import compiled, small

from truffula.errors import InvalidRequest
from truffula.items import Constraint
from truffula.text.constraints import rules_of

CALL = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
OLDER = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<call=one>", "schema": CALL, "end": "</call>"},
        {"begin": "<call=two>", "schema": {"type": "integer"}, "end": "</call>"},
    ],
    "triggers": ["<call="],
}


def tag(begin, content, end="</t>"):
    return {"type": "tag", "begin": begin, "content": content, "end": end}


JSON = {"type": "json_schema", "json_schema": CALL}
TAGS = [
    (
        OLDER,
        [
            "",
            "free text",
            '<call=one>{"a": true}</call>',
            'x <call=two>7</call> y <call=one>{"a":false}</call>',
            "a < b",
        ],
        ["<call=three>", "<call=one>{}</call>", "<call=two>true</call>", "text <call=two>7"],
    ),
    ({"format": {"type": "const_string", "value": "abc"}}, ["abc"], ["", "ab"]),
    ({"format": JSON}, ['{"a":true}'], ["{}"]),
    ({"format": {"type": "regex", "pattern": "[0-9]+/x"}}, ["12/x"], ["x"]),
    (
        {"format": {"type": "sequence", "elements": [{"type": "const_string", "value": "A"}, JSON]}},
        ['A{"a":true}'],
        ["A", '{"a":true}'],
    ),
    (
        {"format": {"type": "or", "elements": [{"type": "const_string", "value": "A"}, JSON]}},
        ["A", '{"a":true}'],
        ['A{"a":true}', ""],
    ),
    ({"format": tag("<t>", {"type": "any_text"})}, ["<t></t>", "<t>any\nthing</t>"], ["<t>", "<t></t>x"]),
    (
        {"format": {"type": "triggered_tags", "triggers": ["<"], "tags": [tag("<t>", JSON)], "at_least_one": True}},
        ['<t>{"a":true}</t>', 'so <t>{"a":true}</t> it is'],
        ["", "so", "<u>"],
    ),
    (
        {"format": {"type": "triggered_tags", "triggers": ["<"], "tags": [tag("<t>", JSON)], "stop_after_first": True}},
        ["", "so", 'so <t>{"a":true}</t>'],
        ['<t>{"a":true}</t>x'],
    ),
    (
        {"format": {"type": "tags_with_separator", "separator": ", ", "tags": [tag("<t>", JSON), tag("<u>", JSON)]}},
        ["", '<t>{"a":true}</t>, <u>{"a":true}</t>'],
        ['<t>{"a":true}</t><u>{"a":true}</t>', "x"],
    ),
]


@pytest.mark.parametrize(("value", "good", "bad"), TAGS, ids=lambda value: json.dumps(value)[:70])
def test_a_structural_tag_accepts_its_texts_and_no_others(value, good, bad):
    source = compiled("structural_tag", value)
    assert [text for text in good if not small().accepts(source, text)] == []
    assert [text for text in bad if small().accepts(source, text)] == []
    for seed in range(4):
        text = small().walk(source, seed)
        assert text is None or small().accepts(source, text)


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json_object", "", ["{}"], ["1"]),
        ("json_schema", json.dumps(CALL), ['{"a":true}'], ["{}"]),
        ("regex", "a/b", ["a/b"], ["a"]),
        ("choice", '["yes", "no"]', ["yes"], ["maybe"]),
        ("lark", '// start: nothing\nstart: "start" next\nnext: /start/', ["startstart"], ["start"]),
        ("lark", 'root ::= "a" other\nother ::= [0-9]', ["a1"], ["a"]),
        ("structural_tag", json.dumps(OLDER), ["x", "<call=two>7</call>"], ["<call=x>"]),
    ],
)
def test_a_constraint_can_be_a_part_of_a_larger_grammar(kind, value, good, bad):
    rules = rules_of(Constraint(kind=kind, value=value), "answer")
    source = compiled("lark", f'start: "think:" answer\n{rules}')
    assert [text for text in good if not small().accepts(source, "think:" + text)] == []
    assert [text for text in bad if small().accepts(source, "think:" + text)] == []


def test_a_grammar_with_directives_cannot_be_a_part():
    with pytest.raises(InvalidRequest, match="%ignore"):
        rules_of(Constraint(kind="lark", value='start: "a"\n%ignore " "'), "answer")
