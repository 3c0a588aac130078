"""Whatever a random model draws under a constraint, a text that ends is valid by an independent judge."""

import json
import re

import pytest
from corpus import GRAMMARS, REGEXES, SCHEMAS, compiled_suite
from oracle import is_valid
from walker import compiled, small

from truffula.errors import InvalidRequest

SEEDS = 4
# Python's \s and \S mean other characters than ECMAScript's, and it has no \p.
OTHER_SYNTAX = ("optional-ecmascript-regex", "optional-non-bmp-regex")
# Rust's classes in Python's syntax; its letters and marks are more than Python's.
CLASSES = {
    r"\p{Lu}": r"\w",
    r"\p{Ll}": r"\w",
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\S": r"[\S\x1c-\x1f]",
    r"\z": r"\Z",
}


def texts_of(source: str, seeds: int) -> list[str]:
    found = [small().walk(source, seed) for seed in range(seeds)]
    return [text for text in found if text is not None]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:70])
def test_answers_to_a_schema_are_valid(schema):
    texts = texts_of(compiled("json_schema", schema), SEEDS)
    for text in texts:
        assert is_valid(schema, text), text
    assert texts, "no walk came to an end"


def test_answers_to_the_suites_schemas_are_valid():
    walked = ended = 0
    for case, source in compiled_suite():
        if (
            isinstance(source, InvalidRequest)
            or case.name.startswith(OTHER_SYNTAX)
            or r"\\p{" in json.dumps(case.schema)
        ):
            continue
        walked += 1
        for text in texts_of(source, 2):
            ended += 1
            assert is_valid(case.schema, text), f"{case.name}: {text}"
    assert walked > 180
    assert ended > 300


@pytest.mark.parametrize("pattern", REGEXES)
def test_answers_to_a_regex_match_it(pattern):
    python = re.sub(r"\\(p\{\w+\}|.)", lambda found: CLASSES.get(found[0], found[0]), pattern, flags=re.DOTALL)
    texts = texts_of(compiled("regex", pattern), SEEDS)
    for text in texts:
        # \w holds letters of a newer Unicode than Python's
        assert re.fullmatch(python, text) or re.search(r"\\[wWp]", pattern), text
    assert texts


@pytest.mark.parametrize(("grammar", "good", "bad"), GRAMMARS, ids=lambda value: str(value)[:40])
def test_a_grammar_accepts_its_texts_and_no_others(grammar, good, bad):
    source = compiled("lark", grammar)
    assert [text for text in good if not small().accepts(source, text)] == []
    assert [text for text in bad if small().accepts(source, text)] == []
    texts = texts_of(source, SEEDS)
    assert texts
    for text in texts:
        assert small().accepts(source, text)


@pytest.mark.parametrize(
    "choices", [["a"], ["yes", "no"], ["a", "ab", "abc"], ["é", "日本", 'q"', "\\", "\n", "\x7f", "😀"]]
)
def test_answers_to_a_choice_are_members_and_every_member_is_one(choices):
    source = compiled("choice", choices)
    assert set(texts_of(source, 40)) <= set(choices)
    assert all(small().accepts(source, choice) for choice in choices)
    assert not small().accepts(source, choices[0] + "x")


def test_a_bounded_schema_ends_however_often_blanks_are_drawn():
    """Between two tokens one space, or one line break and an indentation; none around the answer."""
    source = compiled("json_schema", SCHEMAS[-4])
    accepts = small().accepts
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
    source = compiled("json_schema", schema)
    good = ['{"a":[1,2]}', '{"a": [1, 2]}', json.dumps({"a": [1, 2]}, indent=2), json.dumps({"a": [1]}, indent="\t")]
    good += ['{ "a" : [ 1 , 2 ] }']
    bad = [' {"a":[]}', '{"a":[]} ', '{  "a":[]}', '{"a":\n\n[]}', '{"a":' + "\n" + " " * 41 + "[]}", '{"a":\r[]}']
    assert [text for text in good if not accepts(source, text)] == []
    assert [text for text in bad if accepts(source, text)] == []
