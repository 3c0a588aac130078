"""Scenario files: the built-in one is sound, and what is wrong in another is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from comparison.scenarios import BUILT_IN, chosen, read_scenarios
from truffula.errors import ConfigError

ROW = 'name = "r"\nwhat = "w"\nmeasure = "throughput"\n'
PEER = 'contestant = [{ peer = "truffula", model = "m" }]\n'
REFUSED = [
    ("", "missing required field `row`"),
    ("[[row]\n", "can't be read"),
    ("[row]\n" + ROW, r"Expected `array`, got `object` - at `\$\.row`"),
    ("[[row]]\n" + ROW + 'contestant = "vllm"\n', r"Expected `array`, got `str` - at `\$\.row\[0\]\.contestant`"),
    ('[[row]]\nname = "r"\nwhat = "w"\n' + PEER, "missing required field `measure`"),
    ("[[row]]\n" + ROW, "missing required field `contestant`"),
    ("[[row]]\n" + ROW + "contestant = []\n", r"length >= 1 - at `\$\.row\[0\]\.contestant`"),
    ("[[row]]\n" + ROW + "client = 3\n" + PEER, r"unknown field `client` - at `\$\.row\[0\]`"),
    ("[[row]]\n" + ROW + 'clients = "3"\n' + PEER, r"Expected `int`, got `str` - at `\$\.row\[0\]\.clients`"),
    ("[[row]]\n" + ROW + "clients = true\n" + PEER, "Expected `int`, got `bool`"),
    ("[[row]]\n" + ROW + "clients = 0\n" + PEER, "Expected `int` >= 1"),
    ("[[row]]\n" + ROW + 'adapters = "some"\n' + PEER, "Invalid enum value 'some'"),
    ("[[row]]\n" + ROW + 'contestant = [{ peer = "tgi", model = "m" }]', "Invalid enum value 'tgi'"),
    ("[[row]]\n" + ROW + 'contestant = [{ peer = "openai", model = "m" }]', "url is ''"),
    ("[[row]]\n" + ROW + 'contestant = [{ peer = "vllm", model = "m", url = "http://x" }]', "url is 'http://x'"),
    ("[[row]]\n" + ROW + 'contestant = [{ peer = "vllm" }]', "needs a model"),
    ("[[row]]\n" + ROW + 'contestant = [{ peer = "vllm", model = "m", options = { dtype = "x" } }]', "options are"),
    ("[[row]]\n" + ROW + 'contestant = [{ peer = "hf-peft", model = "m", flags = ["-x"] }]', "does not accept flags"),
    ("[[row]]\n" + ROW + 'contestant = [{ peer = "llama-bench", model = "m" }]', "can't be measured of llama-bench"),
    ("[[row]]\n" + ROW + PEER.replace("}]", '}, { peer = "truffula", model = "n" }]'), "the same name"),
    (("[[row]]\n" + ROW + PEER) * 2, "Two rows"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_scenarios(file)


def test_truffula_is_first_in_every_built_in_row() -> None:
    rows = read_scenarios()
    assert all(row.contestants[0].peer == "truffula" for row in rows)
    names = {row.scenario or row.name for row in rows}
    assert {"decode", "adapter1", "distinct8", "distinct32", "base32", "base32-q8", "base32-q4"} <= names
    assert {"distinct32-q8", "ttft", "prefill", "idle-memory", "start"} <= names


def test_rows_are_chosen_by_scenario_or_by_name() -> None:
    rows = read_scenarios(BUILT_IN)
    assert [row.name for row in chosen(rows, ["start", "decode"])] == [
        "decode-bf16", "decode-q8_0", "decode-q4_0", "start"
    ]  # fmt: skip
    assert [row.name for row in chosen(rows, ["decode-q8_0"])] == ["decode-q8_0"]
    with pytest.raises(ConfigError, match="'decod'"):
        chosen(rows, ["decod"])
