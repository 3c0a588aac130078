"""Batches larger than the engine's queue: the engine gets them as it drains, and memory stays bounded."""

from __future__ import annotations

import asyncio
import gc
import io
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import OPTIONS, complete, stats_of, write_model

from truffula import LLM, SamplingParams
from truffula.config import EngineConfig
from truffula.engine.client import EngineClient, connect
from truffula.errors import Overloaded, PromptTooLong
from truffula.service.aio import AsyncService
from truffula.service.core import RequestState
from truffula.service.progress import ProgressBar
from truffula.service.sync import SyncService
from truffula.types import EngineRequest, GenerateRequest, TokenEvent

SHORT = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
FEW = {"max_running": 8, "max_waiting": 24}
PLACES, SHARE = 32, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("many") / "model")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **OPTIONS) as llm:
        yield llm


class Counting:
    """A client that records how many sequences it was given and has not ended, at most and now."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self.now = self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self.now += len(requests)
        self.most = max(self.most, self.now)
        self._client.submit(requests)

    def events(self, timeout: float | None) -> list[TokenEvent]:
        found = self._client.events(timeout)
        self.now -= sum(event.finish_reason is not None for event in found)
        return found


def prompts(count: int) -> list[list[int]]:
    return [[2 + n % 7, 3 + n % 5] for n in range(count)]


def test_more_prompts_than_the_queue_holds_are_answered_in_order(llm: LLM) -> None:
    """By default 1,024 sequences may wait."""
    alone = {tuple(p): llm.generate(p, SHORT)[0].token_ids for p in prompts(35)}
    found = llm.generate(prompts(1200), SHORT)
    assert [out.token_ids for out in found] == [alone[tuple(p)] for p in prompts(1200)]


def test_the_engine_and_this_process_hold_a_bounded_number_of_requests(model: Path) -> None:
    client = Counting(connect(EngineConfig(model=str(model), **OPTIONS | FEW), "inline"))
    service = SyncService(client)
    try:
        most = seen = looked = 0
        for _, deltas in service.stream([GenerateRequest(prompt=p, params=SHORT) for p in prompts(300)]):
            assert isinstance(deltas, list)
            seen += sum(delta.finish_reason is not None for delta in deltas)
            if seen >= looked + 50:  # a look at all objects takes long
                looked = seen
                most = max(most, sum(type(thing) is RequestState for thing in gc.get_objects()))
        assert seen == 300
        assert client.now == 0
        assert client.most <= SHARE
        assert most <= 2 * SHARE
    finally:
        service.close()


def test_one_request_of_more_choices_than_places_is_answered(model: Path) -> None:
    with LLM(model, **OPTIONS | {"max_running": 2, "max_waiting": 1}) as few:
        (out,) = few.generate([5, 6], SamplingParams(n=9, seed=3, max_tokens=3, ignore_eos=True))
        (same,) = few.generate([5, 6], SamplingParams(n=2, seed=3, max_tokens=3, ignore_eos=True))
    assert len(out.choices) == 9
    assert [c.token_ids for c in out.choices[:2]] == [c.token_ids for c in same.choices]


def test_a_refused_prompt_is_raised_before_any_is_computed_or_returned_in_its_place(llm: LLM) -> None:
    batch: list[Any] = [*prompts(400), [5] * 200]
    steps = llm.stats().steps
    with pytest.raises(PromptTooLong):
        llm.generate(batch, SHORT)
    assert llm.stats().steps == steps
    found = llm.generate(batch, SHORT, errors="return")
    assert isinstance(found[-1], PromptTooLong)
    assert all(len(out.token_ids) == 2 for out in found[:-1])


def test_threads_that_share_an_engine_each_get_every_delta(model: Path) -> None:
    """Each of them reads the others' events; none may leave before its last one was passed on."""
    interval = sys.getswitchinterval()
    with LLM(model, **OPTIONS | FEW) as shared, ThreadPoolExecutor(6) as pool:
        expected = [shared.generate(p, SHORT)[0].token_ids for p in prompts(35)]
        try:
            sys.setswitchinterval(1e-5)
            calls = [pool.submit(shared.generate, prompts(35), SHORT) for _ in range(18)]
            assert [[out.token_ids for out in call.result(100)] for call in calls] == [expected] * 18
        finally:
            sys.setswitchinterval(interval)


def test_a_waiting_thread_takes_over_when_the_reading_one_leaves(model: Path) -> None:
    """A paused iterator reads nothing; the others' events are read by those that wait."""
    with LLM(model, **OPTIONS) as shared:
        paused = shared.stream([5, 6], SamplingParams(max_tokens=100, ignore_eos=True))
        first = next(paused)
        done = threading.Event()

        def other() -> None:
            shared.generate(prompts(3), SHORT)
            done.set()

        thread = threading.Thread(target=other)
        thread.start()
        assert done.wait(60)
        thread.join()
        # Without a fixed seed the first token may be part of a character: then its delta holds no token yet.
        assert sum(len(delta.tokens) for delta in [first, *paused]) == 100


def service_test(model: Path, test: Any, **options: Any) -> Counting:
    client = Counting(connect(EngineConfig(model=str(model), **OPTIONS | FEW | options), "inline"))

    async def main() -> None:
        service = AsyncService(client)
        await service.start()
        try:
            await asyncio.wait_for(test(service), 60)
        finally:
            await asyncio.wait_for(service.close(), 60)

    asyncio.run(main())
    return client


def test_several_prompts_are_submitted_together_or_not_at_all(model: Path) -> None:
    async def test(service: AsyncService) -> None:
        good, bad = GenerateRequest(prompt=[5, 6], params=SHORT), GenerateRequest(prompt=[5] * 200)
        with pytest.raises(PromptTooLong):
            await service.open_all([good, good, bad])
        assert service.active == 0
        assert stats_of(service).steps == 0
        streams = await service.open_all([good, good])
        found = [[d async for deltas in stream for d in deltas] for stream in streams]
        assert [sum(len(d.tokens) for d in deltas) for deltas in found] == [2, 2]

    service_test(model, test)


def test_a_call_of_any_size_leaves_places_for_others_and_only_a_full_engine_refuses(model: Path) -> None:
    long = SamplingParams(max_tokens=100, ignore_eos=True, n=100)

    async def test(service: AsyncService) -> None:
        large = [await service.open(GenerateRequest(prompt=[5, 6], params=long)) for _ in range(3)]
        answer = await complete(service, GenerateRequest(prompt=[5, 6], params=SHORT))
        assert len(answer.choices[0].tokens) == 2
        large.append(await service.open(GenerateRequest(prompt=[5, 6], params=long)))
        with pytest.raises(Overloaded):
            await service.open(GenerateRequest(prompt=[5, 6], params=SHORT))
        for stream in large:
            await stream.aclose()
        while service._submissions.free <= 0:  # until the engine has reported the first end
            await asyncio.sleep(0)
        await complete(service, GenerateRequest(prompt=[5, 6], params=SHORT))

    client = service_test(model, test)
    assert client.most == PLACES
    assert client.now == 0


def test_choices_beyond_the_places_are_streamed_to_their_ends(model: Path) -> None:
    params = SamplingParams(n=50, seed=1, max_tokens=3, ignore_eos=True)

    async def test(service: AsyncService) -> None:
        streams = await service.open_all([GenerateRequest(prompt=p, params=params) for p in prompts(3)])
        for stream in streams:
            deltas = [delta async for found in stream for delta in found]
            assert sorted(d.choice for d in deltas if d.finish_reason == "length") == list(range(50))
        assert service.active == 0

    assert service_test(model, test).most <= PLACES


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_written_on_a_terminal_when_it_takes_longer_than_a_second() -> None:
    now = [0.0]
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        bar = ProgressBar(stream, clock=lambda: now[0])
        for now[0], done in ((0.5, 10), (2.0, 50), (2.1, 60), (4.0, 100)):
            bar(done, 100, 4 * done)
        bar.close()
        now[0] = 0.0
    lines = terminal.getvalue().split("\r\x1b[2K")
    assert lines == [
        "",
        "[##########..........] 50/100 requests, 100 tokens/s, 0:02",
        "[####################] 100/100 requests, 100 tokens/s, 0:04\n",
    ]
    assert pipe.getvalue() == ""


def test_a_short_batch_leaves_nothing_on_the_terminal() -> None:
    terminal = Terminal()
    bar = ProgressBar(terminal, clock=lambda: 0.0)
    bar(1, 1, 5)
    bar.close()
    assert terminal.getvalue() == ""


INTERRUPTED = """
import os, random, signal, sys, threading
from truffula import LLM, SamplingParams
llm = LLM(sys.argv[1], transport=sys.argv[2], max_model_len=128, memory_bytes=1 << 28, dtype="float32", threads=1)
short = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
expected = [out.token_ids for out in llm.generate([[5, 6], [7]], short)]
rng = random.Random(0)
for turn in range(25):
    begun, pause = threading.Event(), rng.random() / 50

    def strike():
        begun.wait()
        threading.Event().wait(pause)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        begun.set()
        llm.generate([[5, 6]] * 3000, SamplingParams(max_tokens=100, ignore_eos=True))
    except KeyboardInterrupt:
        pass
    else:
        sys.exit("not interrupted")
    thread.join()
    assert [out.token_ids for out in llm.generate([[5, 6], [7]], short)] == expected, turn
stats = llm.stats()
llm.close()
print("usable", stats.used_blocks if sys.argv[2] == "inline" else 0)
"""


@pytest.mark.parametrize("transport", ["inline", "process"])
def test_an_engine_is_usable_after_each_ctrl_c(model: Path, transport: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(model), transport]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stdout) == (0, "usable 0\n"), ended.stderr[-3000:]
