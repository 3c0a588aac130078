"""The load's client against a real server, and the coding of its connections."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import MODEL, Live, serving, write_adapters, write_model

from truffula.bench.client import Dechunker, Target, closed_loop, open_loop
from truffula.bench.dialects import OpenAI
from truffula.bench.load import Load, arrivals


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    model = write_model(tmp_path_factory.mktemp("bench") / "llama")
    adapters = write_adapters(tmp_path_factory.mktemp("adapters"), model)
    with serving(model, adapters={"pirate": str(adapters["pirate"])}, max_model_len=160) as found:
        yield found


def test_a_closed_loop_counts_every_token(live: Live) -> None:
    load = Load(3, 2, 9, 5, ("pirate", None), 300)
    measured = asyncio.run(closed_loop(Target(live.url, OpenAI(MODEL)), load))
    assert measured.failures == []
    assert [stream.output_tokens for stream in measured.streams] == [5] * 6
    assert [stream.prompt_tokens for stream in measured.streams] == [9] * 6
    assert all(stream.sent <= stream.tokens[0] <= stream.tokens[-1] for stream in measured.streams)
    assert measured.summary()["prefix_hit_rate"] == 0.0


def test_equal_prompts_show_in_the_prefix_hits(live: Live) -> None:
    target = Target(live.url, OpenAI(MODEL))
    load = Load(1, 1, 40, 2, (), 300, seed=77)
    asyncio.run(closed_loop(target, load))
    assert asyncio.run(closed_loop(target, load)).summary()["prefix_hit_rate"] > 0.5


def test_an_open_loop_sends_each_request_at_its_time(live: Live) -> None:
    at = arrivals(50.0, 6, seed=1)
    measured = asyncio.run(open_loop(Target(live.url, OpenAI(MODEL)), Load(6, 1, 9, 3, (), 300), at))
    due = sorted(stream.due for stream in measured.streams)
    assert [later - due[0] for later in due] == pytest.approx([later - at[0] for later in at])
    assert all(stream.sent >= stream.due for stream in measured.streams)
    assert measured.output_tokens == 18


def test_a_refused_request_is_a_failure_with_the_servers_words(live: Live) -> None:
    load = Load(1, 1, 9, 5, ("nobody",), 300)
    (said,) = asyncio.run(closed_loop(Target(live.url, OpenAI(MODEL)), load)).failures
    assert said.startswith("status 404") and "nobody" in said


def test_a_server_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    measured = asyncio.run(closed_loop(Target("http://127.0.0.1:9", OpenAI()), Load(1, 1, 3, 1, (), 300)))
    assert len(measured.failures) == 1 and measured.output_tokens == 0


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=5), st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_chunks_come_out_whole_however_they_arrive(parts: list[bytes], steps: list[int]) -> None:
    coded = b"".join(b"%x;note=1\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    dechunker, found, at = Dechunker(), b"", 0
    for step in steps * len(coded):
        found += b"".join(dechunker.feed(coded[at : at + step]))
        at += step
        if at >= len(coded):
            break
    assert found == b"".join(parts) and dechunker.ended
