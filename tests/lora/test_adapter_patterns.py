"""Patterns mean what they mean to PEFT, and a hostile one is ended with an error of its adapter."""

from __future__ import annotations

import re
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from truffula.errors import AdapterError
from truffula.lora.patterns import PatternTable, compiled, matching_limit


@settings(max_examples=examples(100, 200), deadline=None)
@given(st.text("ab._-1", max_size=6), st.text("ab._-1\n", max_size=8))
def test_plain_suffixes_agree_with_pefts_expression(source: str, module: str) -> None:
    expected = re.match(rf"(.*\.)?({source})$", module) is not None
    assert PatternTable({source: True}, "rank_pattern").value(module, False) == expected


@pytest.mark.parametrize("source", [r"(a+)+$", r"(.*.*.*.*.*.*.*)x", r"(a|aa|aaa)*c", r"(.|a|b)*?c"])
def test_a_pattern_that_backtracks_without_end_is_an_error(source: str) -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(AdapterError, match=r"more than 0\.05 seconds") as caught, matching_limit(0.05):
        compiled(source, "target_modules").match("a" * 50 + "!")
    assert caught.value.param == "target_modules"
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (r"(unclosed", "not a valid regular expression"),
        (r"a{2,1}", "not a valid regular expression"),
        (r"a{99999999999999}", "not a valid regular expression"),
        ("(" * 5000 + ")" * 5000, "not a valid regular expression"),
        ("a" * 20_000, "characters"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(source: str, says: str) -> None:
    with pytest.raises(AdapterError, match=says) as caught:
        compiled(source, "target_modules")
    assert caught.value.param == "target_modules"


def test_the_first_hit_in_file_order_wins_and_conflicts_are_reported() -> None:
    table = PatternTable({".*q_proj": 3, "layers.1.self_attn.q_proj": 100, "other": 5}, "alpha_pattern")
    assert table.value("model.layers.1.self_attn.q_proj", 8) == 3
    assert table.value("model.layers.0.mlp.up_proj", 8) == 8
    assert table.conflicts == [("model.layers.1.self_attn.q_proj", ".*q_proj", "layers.1.self_attn.q_proj")]
    assert table.unused() == ["other"]
