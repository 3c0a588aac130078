"""The load's client against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import MODEL, Live, serving, write_adapters, write_model

from truffula.bench.client import OpenAI, Target, closed_loop, open_loop
from truffula.bench.load import Load, arrivals


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    model = write_model(tmp_path_factory.mktemp("bench") / "llama")
    adapters = write_adapters(tmp_path_factory.mktemp("adapters"), model)
    with serving(model, adapters={"pirate": str(adapters["pirate"])}, max_model_len=160) as found:
        yield found


def test_a_closed_loop_counts_every_token(live: Live) -> None:
    load = Load(3, 2, 9, 5, ("pirate", None), 300)
    measured = closed_loop(Target(live.url, OpenAI(MODEL)), load)
    assert measured.errors == []
    assert [stream.output_tokens for stream in measured.streams] == [5] * 6
    assert [stream.prompt_tokens for stream in measured.streams] == [9] * 6
    assert all(stream.sent <= stream.tokens[0] <= stream.tokens[-1] for stream in measured.streams)
    assert measured.summary()["prefix_hit_rate"] == 0.0


def test_equal_prompts_show_in_the_prefix_hits(live: Live) -> None:
    target = Target(live.url, OpenAI(MODEL))
    load = Load(1, 1, 40, 2, (), 300, seed=77)
    closed_loop(target, load)
    assert closed_loop(target, load).summary()["prefix_hit_rate"] > 0.5


def test_an_open_loop_sends_each_request_at_its_time(live: Live) -> None:
    at = arrivals(50.0, 6, seed=1)
    measured = open_loop(Target(live.url, OpenAI(MODEL)), Load(6, 1, 9, 3, (), 300), at)
    due = sorted(stream.due for stream in measured.streams)
    assert [later - due[0] for later in due] == pytest.approx([later - at[0] for later in at])
    assert all(stream.sent >= stream.due for stream in measured.streams)
    assert measured.output_tokens == 18


def test_a_refused_request_is_a_failure_with_the_servers_words(live: Live) -> None:
    load = Load(1, 1, 9, 5, ("nobody",), 300)
    (said,) = closed_loop(Target(live.url, OpenAI(MODEL)), load).errors
    assert said.startswith("status 404") and "nobody" in said


def test_a_server_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    measured = closed_loop(Target("http://127.0.0.1:9", OpenAI()), Load(1, 1, 3, 1, (), 300))
    assert len(measured.errors) == 1 and measured.output_tokens == 0
