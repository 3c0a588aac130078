"""Patterns mean what they mean to Python's ``re``, and cost what they may cost."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from truffula.errors import AdapterError
from truffula.lora.patterns import MAX_STEPS, Pattern, PatternTable, Steps, Suffix

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.gate_proj",
    "model.vision.layers.3.q_proj",
    "lm_head",
    "q_proj",
    "a.b",
    "aab",
    "aaaab",
    "x\n",
    "",
    "ünï_9.q",
]
CONSTRUCTS = [
    r".*\.(q|k)_proj",
    r"^(?!.*vision).*q_proj$",
    r"(?:.*?(?:language|model).*?(?:self_attn|mlp).*?(?:q_proj|gate_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.x)",
    r"[^.]+",
    r"[^\W\d.]+\.b",
    r"[a-f.]*",
    r"(a|b)*c?",
    r"a{2,3}b",
    r"a{2}b",
    r"a{,3}b",
    r"(?:a|aa){2,}b",
    r"(?<=model).*",
    r"model(?<=model)\..*",
    r"model(?<!model)\..*",
    r".*(?<=q_)proj",
    r".*(?<!q_)proj",
    r"(?=.*layers)(?=.*mlp).*",
    r"\w+\Z",
    r"\Aq.*",
    r".+?_proj",
    r"x$",
    r"x\s",
    r"x.",
    r"",
    r"a||b",
    r"\D*\d+\D*",
    r"\bq_proj\B",
    r".*\Bproj",
    r"()*",
    r"(?:){1000}",
    r"(a*)*b?",
    r"(a+)+b",
    r"((a|ab)(c|bcd)*)*",
    r"model\.layers\.(1[01]|[0-9])\..*",
    r"(?P<name>a)a*b",
    r"(?!)|aab",
    r"[]a]+b",
    r"\x61{2}b",
    r"(?:(?=a)a)*b",
]


@pytest.mark.parametrize("source", CONSTRUCTS)
def test_every_construct_agrees_with_re(source: str) -> None:
    pattern = Pattern(source, "target_modules", Steps())
    for module in MODULES:
        assert pattern.match(module) == (re.match(source, module) is not None), module
        assert pattern.match(module, full=True) == (re.fullmatch(source, module) is not None), module


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "$", "^", r"\b", "1"])


def _more(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?", "+?"])).map(
            lambda x: f"(?:{x[0]}){x[1]}"
        ),
        inner.map(lambda x: f"({x})"),
        inner.map(lambda x: f"(?={x})"),
        inner.map(lambda x: f"(?!{x})"),
    )


@settings(max_examples=examples(150, 300), deadline=None)
@given(st.recursive(ATOMS, _more, max_leaves=6), st.text("ab.1_", max_size=6))
def test_random_patterns_agree_with_re(source: str, text: str) -> None:
    pattern = Pattern(source, "target_modules", Steps())
    assert pattern.match(text) == (re.match(source, text) is not None)
    assert pattern.match(text, full=True) == (re.fullmatch(source, text) is not None)


@settings(max_examples=examples(100, 200), deadline=None)
@given(st.text("ab._-1", max_size=6), st.text("ab._-1", max_size=8))
def test_plain_suffixes_agree_with_pefts_expression(source: str, module: str) -> None:
    expected = re.match(rf"(.*\.)?({source})$", module) is not None
    assert Suffix(source, "rank_pattern", Steps()).match(module) == expected


@pytest.mark.parametrize(
    "source", [r"(a+)+$", r"(.*.*.*.*.*.*.*)x", r"((a?){60})(a{60})", r"(a|aa|aaa)*c", r"(.|a|b)*?c"]
)
def test_patterns_that_hang_a_backtracking_engine_cost_little(source: str) -> None:
    steps = Steps()
    assert not Pattern(source, "target_modules", steps).match("a" * 50 + "!")
    assert MAX_STEPS - steps.left < 50_000


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (r"(a)\1", "back-reference"),
        (r"(a)?(?(1)b|c)", "conditional"),
        (r"(?>a)b", "atomic"),
        (r"a++", "possessive"),
        (r"(?i)q_proj", "inline flags"),
        (r"(?i:q)_proj", "inline flags"),
        (r"(unclosed", "not a valid regular expression"),
        (r"a{2,1}", "not a valid regular expression"),
        (r"a{1,100000000}", "states"),
        (r"((a{100}){100}){100}", "states"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        ("a" * 20_000, "characters"),
    ],
)
def test_what_cannot_be_bounded_is_refused_with_the_reason(source: str, says: str) -> None:
    with pytest.raises(AdapterError, match=says) as caught:
        Pattern(source, "target_modules", Steps())
    assert caught.value.param == "target_modules"


def test_matching_stops_when_its_allowance_is_spent() -> None:
    steps = Steps(left=1000)
    pattern = Pattern(r"(.*a)*(.*b)*(.*c)*x", "exclude_modules", steps)
    with pytest.raises(AdapterError, match="too long"):
        for _ in range(100):
            pattern.match("abc" * 20)


def test_the_first_hit_in_file_order_wins_and_conflicts_are_told() -> None:
    table = PatternTable({".*q_proj": 3, "layers.1.self_attn.q_proj": 100, "other": 5}, "alpha_pattern", Steps())
    assert table.value("model.layers.1.self_attn.q_proj", 8) == 3
    assert table.value("model.layers.0.mlp.up_proj", 8) == 8
    assert table.conflicts == [("model.layers.1.self_attn.q_proj", ".*q_proj", "layers.1.self_attn.q_proj")]
    assert table.unused() == ["other"]
