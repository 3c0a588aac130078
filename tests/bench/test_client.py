"""The load's client against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import MODEL, Live, serving, write_adapters, write_model

from truffula.bench.load import Load, OpenAI, arrivals, run_load
from truffula.bench.server import truffula_server
from truffula.config import EngineConfig


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    model = write_model(tmp_path_factory.mktemp("bench") / "llama")
    adapters = write_adapters(tmp_path_factory.mktemp("adapters"), model)
    with serving(model, adapters={"pirate": str(adapters["pirate"])}, max_model_len=160) as found:
        yield found


def test_a_closed_loop_counts_every_token(live: Live) -> None:
    load = Load(3, 2, 9, 5, ("pirate", None), 300)
    measured = run_load(live.url, load, OpenAI(MODEL))
    assert measured.errors == []
    assert [stream.output_tokens for stream in measured.streams] == [5] * 6
    assert [stream.prompt_tokens for stream in measured.streams] == [9] * 6
    assert all(stream.sent <= stream.tokens[0] <= stream.tokens[-1] for stream in measured.streams)
    assert measured.summary()["prefix_hit_rate"] == 0.0


def test_equal_prompts_show_in_the_prefix_hits(live: Live) -> None:
    load = Load(1, 1, 40, 2, (), 300, seed=77)
    run_load(live.url, load, OpenAI(MODEL))
    assert run_load(live.url, load, OpenAI(MODEL)).summary()["prefix_hit_rate"] > 0.5


def test_an_open_loop_sends_each_request_at_its_time(live: Live) -> None:
    at = arrivals(50.0, 6, seed=1)
    measured = run_load(live.url, Load(6, 1, 9, 3, (), 300), OpenAI(MODEL), at=at)
    due = sorted(stream.due for stream in measured.streams)
    assert [later - due[0] for later in due] == pytest.approx([later - at[0] for later in at])
    assert all(stream.sent >= stream.due for stream in measured.streams)
    assert measured.output_tokens == 18


def test_a_refused_request_is_a_failure_with_the_servers_words(live: Live) -> None:
    load = Load(1, 1, 9, 5, ("nobody",), 300)
    (said,) = run_load(live.url, load, OpenAI(MODEL)).errors
    assert said.startswith("status 404") and "nobody" in said


def test_a_server_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    measured = run_load("http://127.0.0.1:9", Load(1, 1, 3, 1, (), 300))
    assert len(measured.errors) == 1 and measured.output_tokens == 0


def test_a_measured_server_has_the_options_of_the_command_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag wins over a variable in the child too, and the load sends no key."""
    config = EngineConfig(model=str(write_model(tmp_path / "llama")), max_model_len=32)
    monkeypatch.setenv("TRUFFULA_API_KEYS", "sesame")
    monkeypatch.setenv("TRUFFULA_STEP_TOKENS", "many")  # the command's flag says the default
    with truffula_server(config) as server:
        measured = run_load(server.wait(), Load(1, 1, 9, 2, (), 300))
    assert measured.errors == []
