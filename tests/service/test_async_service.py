"""``AsyncService`` on a real engine: streams, cancellation, draining, death. Each test runs its own loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from served import OPTIONS, complete, stats_of, write_adapter, write_model
from tiny_tokenizers import byte_level

from truffula import LLM
from truffula.config import EngineConfig
from truffula.engine.client import EngineClient, connect
from truffula.errors import (
    AdapterError,
    AdapterNotFound,
    EngineDied,
    PromptTooLong,
    QueueTimeout,
    ShuttingDown,
    TruffulaError,
)
from truffula.items import Message, Text, Tool, ToolCall
from truffula.lora.sources import AdapterDirectory
from truffula.params import SamplingParams
from truffula.service.aio import AsyncService
from truffula.service.choices import collect
from truffula.service.core import Service, ServiceLimits
from truffula.service.sync import SyncService
from truffula.service.text_sets import TextSet
from truffula.types import AdapterCommand, GenerateRequest, TokenEvent

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
LONG = SamplingParams(max_tokens=4000, ignore_eos=True)  # outlasts a busy machine's pauses
ROOM = {"max_model_len": 4096}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("async")
    model = write_model(root / "model", max_position_embeddings=4096)
    return {"model": model, "one": write_adapter(root / "one", model, 1), "root": root}


@pytest.fixture(scope="module")
def llm(folders: dict[str, Path]) -> Iterator[LLM]:
    with LLM(folders["model"], adapters={"one": folders["one"]}, **OPTIONS) as llm:
        yield llm


def run(
    folders: dict[str, Path],
    test: Callable[[AsyncService], Awaitable[None]],
    *,
    transport: str = "inline",
    wrap: Callable[[EngineClient], Any] = lambda client: client,
    **options: Any,
) -> None:
    """A service started, given to ``test`` and closed, within one loop."""

    async def main() -> None:
        client = wrap(connect(EngineConfig(model=str(folders["model"]), **(OPTIONS | options)), transport))
        directory = AdapterDirectory({"one": folders["one"], "broken": folders["model"]})
        limits = ServiceLimits(base_names=("tiny",))
        service = AsyncService(client, Service(client.info, directory=directory, limits=limits))
        await service.start()
        try:
            await asyncio.wait_for(test(service), 60)
        finally:
            await asyncio.wait_for(service.close(), 60)

    asyncio.run(main())


async def quiet(service: AsyncService) -> None:
    """Wait until the engine holds nothing of any request."""
    while True:
        stats = stats_of(service)
        if not (stats.running or stats.waiting or stats.used_blocks or service.active):
            return
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("transport", ["inline", "process"])
def test_many_requests_at_once_each_get_what_they_get_alone(folders: dict[str, Path], llm: LLM, transport: str) -> None:
    prompts = ["the Lorax spoke", "hello hello", "naïve 🌲", "x", "y y y", "trees"]
    names = [None, "one", None, "one", "tiny", ""]
    expected = [
        llm.generate(p, GREEDY, adapters=n if n == "one" else None)[0] for p, n in zip(prompts, names, strict=True)
    ]

    async def test(service: AsyncService) -> None:
        requests = [
            GenerateRequest(prompt=p, params=GREEDY, adapter=service.core.resolve_adapter(n))
            for p, n in zip(prompts, names, strict=True)
        ]
        whole = await asyncio.gather(*(complete(service, one) for one in requests))
        assert [c.choices[0].text for c in whole] == [out.text for out in expected]

        async def streamed(request: GenerateRequest) -> Any:
            async with await service.open(request) as stream:
                return collect([delta async for deltas in stream for delta in deltas])

        folded = await asyncio.gather(*map(streamed, requests))
        assert [c.choices[0].token_ids for c in folded] == [out.token_ids for out in expected]
        assert [c.choices[0].tokens for c in folded] == [c.choices[0].tokens for c in whole]
        await quiet(service)

    run(folders, test, transport=transport)


def test_errors_are_raised_from_the_first_step_of_a_stream(folders: dict[str, Path]) -> None:
    async def test(service: AsyncService) -> None:
        with pytest.raises(PromptTooLong):
            await service.open(GenerateRequest(prompt="long " * 200))
        broken = GenerateRequest(prompt="a", params=GREEDY, adapter=service.core.resolve_adapter("broken"))
        stream = await service.open(broken)
        with pytest.raises(AdapterError):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with pytest.raises(AdapterError):
            await complete(service, broken)
        with pytest.raises(AdapterNotFound):
            service.core.resolve_adapter("nobody")
        with pytest.raises(QueueTimeout):
            await complete(service, GenerateRequest(prompt="a", params=GREEDY, queue_timeout_s=0.0))
        assert service.active == 0
        assert service.healthy()

    run(folders, test)


Leaving = Callable[[AsyncService], Awaitable[None]]


async def close_it(service: AsyncService) -> None:
    stream = await service.open(GenerateRequest(prompt="a", params=LONG))
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def cancel_the_task(service: AsyncService) -> None:
    before = stats_of(service).generated_tokens
    task = asyncio.ensure_future(complete(service, GenerateRequest(prompt="b", params=LONG)))
    while stats_of(service).generated_tokens == before:  # until it runs
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_its_block(service: AsyncService) -> None:
    async with await service.open(GenerateRequest(prompt="d", params=LONG)) as stream:
        await anext(stream)


async def never_read_it(service: AsyncService) -> None:
    stream = await service.open(GenerateRequest(prompt="e", params=LONG))
    await stream.aclose()


def test_a_client_that_leaves_is_ended_within_a_step(folders: dict[str, Path]) -> None:
    """Of what the engine generates once the service returns: the step in progress is the last with a token of it."""

    async def test(service: AsyncService) -> None:
        leave: Leaving
        for leave in (close_it, cancel_the_task, leave_its_block, never_read_it):
            before = stats_of(service).generated_tokens
            await leave(service)
            assert service.active == 0
            told = stats_of(service).generated_tokens  # as of the last step that has ended
            await quiet(service)
            assert told - before < 4000, "it had ended by itself"
            assert stats_of(service).generated_tokens - told <= 1, leave.__name__

    run(folders, test, **ROOM)


def test_a_stop_string_ends_the_sequence_in_the_engine(folders: dict[str, Path], llm: LLM) -> None:
    text = llm.generate("the Lorax", GREEDY)[0].text
    stop = text[3:6]

    async def test(service: AsyncService) -> None:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, stop=(stop,))
        answer = await complete(service, GenerateRequest(prompt="the Lorax", params=params))
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (text[: text.index(stop)], "stop", stop)
        assert choice.totals.times is not None
        assert choice.totals.times.total_s >= choice.totals.times.ttft_s > 0
        await quiet(service)

    run(folders, test)


def test_draining_refuses_the_new_and_waits_for_the_running(folders: dict[str, Path]) -> None:
    async def test(service: AsyncService) -> None:
        running = asyncio.ensure_future(complete(service, GenerateRequest(prompt="a", params=GREEDY)))
        while not service.active:
            await asyncio.sleep(0)
        drained = asyncio.ensure_future(service.drain(30))
        while service.healthy():
            await asyncio.sleep(0)
        assert not service.healthy()
        with pytest.raises(ShuttingDown):
            await service.open(GenerateRequest(prompt="b"))
        assert await drained
        assert len((await running).choices[0].tokens) == 10

    run(folders, test)


def test_what_outlasts_the_drain_ends_with_an_error(folders: dict[str, Path]) -> None:
    async def test(service: AsyncService) -> None:
        stream = await service.open(GenerateRequest(prompt="a", params=LONG))
        deltas = list(await anext(stream))
        assert not await service.drain(0.0)
        deltas += [delta async for found in stream for delta in found]
        assert deltas[-1].finish_reason == "error"
        assert deltas[-1].error is not None
        assert deltas[-1].error.code == "shutting_down"
        assert service.active == 0

    run(folders, test, **ROOM)


class Dying:
    """A client whose events break off after some: what a bug in a transport would look like."""

    def __init__(self, client: EngineClient, after: int) -> None:
        self._client = client
        self._left = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def events(self, timeout: float | None) -> list[TokenEvent]:
        if not self._left:
            raise ConnectionError("broken pipe")
        self._left -= 1
        return self._client.events(timeout)


def test_when_events_break_off_every_request_ends(folders: dict[str, Path]) -> None:
    async def test(service: AsyncService) -> None:
        requests = [complete(service, GenerateRequest(prompt=p, params=LONG)) for p in ("a", "b")]
        found = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(error) for error in found] == [EngineDied, EngineDied]
        assert not service.healthy()
        with pytest.raises(EngineDied):
            await service.open(GenerateRequest(prompt="c"))

    run(folders, test, wrap=lambda client: Dying(client, 3), **ROOM)


def test_text_of_unknown_size_is_not_worked_on_in_the_loop(folders: dict[str, Path]) -> None:
    """Seen by the threads that a template or tokenizer ran in."""
    call = Message(role="assistant", items=[ToolCall("c", "f", "{}")])
    chat = [Message(role="user", items=[Text("hi")])]
    cases: list[dict[str, Any]] = [
        {"messages": chat, "documents": [{"text": "d"}]},
        {"messages": chat, "template_kwargs": {"notes": "n"}},
        {"messages": chat, "tools": [Tool(name="f")]},
        {"messages": [*chat, call]},
        {"messages": [Message(role="user", items=[Text("hi")], extra={"note": "n" * 5000})]},
    ]

    async def test(service: AsyncService) -> None:
        seen: list[str] = []
        make = service.core.prompt

        def watched(request: GenerateRequest, texts: TextSet) -> Any:
            seen.append(threading.current_thread().name)
            return make(request, texts)

        service.core.prompt = watched  # type: ignore[method-assign]
        for case in cases:
            await (await service.open(GenerateRequest(params=GREEDY, truncate=9, **case))).aclose()
        assert all(name.startswith("truffula-text") for name in seen), seen

    run(folders, test)


def test_a_token_needs_no_thread_between_the_transport_and_the_loop(folders: dict[str, Path]) -> None:
    """Each would cost every token a switch; a thread asks only an engine that steps while it is asked."""

    async def names(service: AsyncService) -> set[str]:
        await complete(service, GenerateRequest(prompt="a", params=GREEDY))
        return {thread.name for thread in threading.enumerate() if thread not in before}

    before = threading.enumerate()
    seen: dict[str, set[str]] = {}
    for transport in ("process", "inline"):

        async def test(service: AsyncService, transport: str = transport) -> None:
            seen[transport] = await names(service)

        run(folders, test, transport=transport)
    assert "truffula-events" not in seen["process"]
    assert "truffula-events" in seen["inline"]


class Garbling(Dying):
    """A client whose events for one request make no sense: a logprob for no token."""

    def events(self, timeout: float | None) -> list[TokenEvent]:
        found = self._client.events(timeout)
        return [
            msgspec.structs.replace(e, token_ids=e.token_ids * 2 or [3], logprobs=[-1.0])
            if e.request_id.startswith("bad") else e
            for e in found
        ]  # fmt: skip


@pytest.mark.parametrize("best_of", [None, 3])
def test_an_event_that_makes_no_sense_ends_its_request_alone(folders: dict[str, Path], best_of: int | None) -> None:
    async def test(service: AsyncService) -> None:
        params = SamplingParams(max_tokens=100, ignore_eos=True, n=2, best_of=best_of)
        bad = GenerateRequest(prompt="a", params=params, request_id="bad")
        good = [complete(service, GenerateRequest(prompt=p, params=GREEDY)) for p in ("a", "b")]
        found = await asyncio.gather(complete(service, bad), *good, return_exceptions=True)
        assert isinstance(found[0], TruffulaError)
        assert found[0].code == "internal_error"
        assert [len(answer.choices[0].tokens) for answer in found[1:]] == [10, 10]  # type: ignore[union-attr]
        await quiet(service)
        assert service.healthy()

    run(folders, test, wrap=lambda client: Garbling(client, -1))


def test_it_ends_alone_in_the_callers_thread_too(folders: dict[str, Path]) -> None:
    client = connect(EngineConfig(model=str(folders["model"]), **OPTIONS), "inline")
    service = SyncService(Garbling(client, -1))
    try:
        params = SamplingParams(max_tokens=100, ignore_eos=True, n=2)
        bad = GenerateRequest(prompt="a", params=params, request_id="bad")
        found = dict(service.completions([bad, GenerateRequest(prompt="b", params=GREEDY)], return_errors=True))
        assert isinstance(found[0], TruffulaError)
        assert found[0].code == "internal_error"
        assert not isinstance(found[1], TruffulaError)
        assert len(found[1].choices[0].tokens) == 10
    finally:
        service.close()


@pytest.mark.slow
def test_a_dead_engine_ends_every_request_and_the_next_one_is_served(folders: dict[str, Path]) -> None:
    """The process is killed; the supervisor starts another."""
    import os
    import signal

    async def test(service: AsyncService) -> None:
        streams = [await service.open(GenerateRequest(prompt=p, params=LONG)) for p in ("a", "b")]
        for stream in streams:
            await anext(stream)
        os.kill(service._client.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        for stream in streams:
            last = [delta async for deltas in stream for delta in deltas][-1]
            assert last.error is not None
            assert last.error.code == "engine_died"
        while not service.healthy():
            await asyncio.sleep(0.05)
        answer = await complete(service, GenerateRequest(prompt="a", params=GREEDY))
        assert len(answer.choices[0].tokens) == 10

    run(folders, test, transport="process", **ROOM)


def test_long_texts_are_worked_on_beside_the_loop(folders: dict[str, Path]) -> None:
    async def test(service: AsyncService) -> None:
        text = "the Lorax " * 40_000
        with pytest.raises(PromptTooLong):
            await service.open(GenerateRequest(prompt=text))
        stream = await service.open(GenerateRequest(prompt=text, truncate=50, params=GREEDY))
        assert stream.state.prompt_tokens == 50
        await stream.aclose()
        rendered = await service.texts.prompt(
            GenerateRequest(messages=[Message(role="user", items=[Text("hi")])], echo=True), service.core.base
        )
        assert rendered.text == "<|role|>user\nhi<|role|>assistant\n"
        assert rendered.ids == byte_level().encode(rendered.text)
        assert service.core.has_chat_template()

    run(folders, test)


def test_adapters_are_administered_without_holding_up_the_loop(folders: dict[str, Path]) -> None:
    async def test(service: AsyncService) -> None:
        assert service.core.directory.names() == ["broken", "one"]
        ref = service.core.resolve_adapter("one")
        (state,) = await service.adapters(AdapterCommand(action="load", ref=ref))
        assert (state.name, state.status) == ("one", "resident")
        with pytest.raises(AdapterError):
            await service.adapters(AdapterCommand(action="load", ref=service.core.resolve_adapter("broken")))
        await service.adapters(AdapterCommand(action="unload", ref=ref))

    run(folders, test)


def test_an_idle_service_does_not_poll_an_engine_in_line(folders: dict[str, Path]) -> None:
    """It waits inside ``events``, which returns with events only."""
    calls: list[float | None] = []

    class Counting(Dying):
        def events(self, timeout: float | None) -> list[TokenEvent]:
            calls.append(timeout)
            return self._client.events(timeout)

    async def test(service: AsyncService) -> None:
        await complete(service, GenerateRequest(prompt="a", params=GREEDY))
        await quiet(service)
        before = len(calls)
        await asyncio.sleep(0.05)
        assert len(calls) - before <= 1

    run(folders, test, transport="inline", wrap=lambda client: Counting(client, -1))


def test_an_engine_that_has_failed_is_not_asked_again(folders: dict[str, Path]) -> None:
    def fail() -> None:
        raise RuntimeError("the step failed")

    async def test(service: AsyncService) -> None:
        client: Any = service._client
        client._engine.step = fail
        with pytest.raises(TruffulaError):
            await complete(service, GenerateRequest(prompt="a", params=GREEDY))
        assert service._thread is not None
        await asyncio.to_thread(service._thread.join, 30)
        assert not service._thread.is_alive()
        with pytest.raises(TruffulaError, match="the step failed"):
            await asyncio.wait_for(complete(service, GenerateRequest(prompt="b", params=GREEDY)), 30)

    run(folders, test, transport="inline")
