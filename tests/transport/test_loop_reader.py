"""An event loop reads the frames of an engine's process, and of the one that follows it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence

import psutil
import pytest
from following import PATIENCE_S, Answer, ask, fold, run

from truffula.engine.process import ProcessClient

Start = Callable[..., ProcessClient]


class Loop:
    """What a loop that listens to ``client`` hears. Made on the loop."""

    def __init__(self, client: ProcessClient) -> None:
        self._client = client
        self._heard = asyncio.Event()
        self._answers: dict[str, Answer] = {}
        assert client.listen(self._heard.set, asyncio.get_running_loop())

    async def answer(self, name: str, prompt: Sequence[int]) -> list[int]:
        self._client.submit([ask(name, prompt)])
        while name not in self._answers or self._answers[name].finish is None:
            await asyncio.wait_for(self._heard.wait(), PATIENCE_S)
            self._heard.clear()
            fold(self._answers, self._client.events(0))
        assert self._answers[name].finish == "length"
        return self._answers[name].token_ids


@pytest.mark.slow  # 3 s
def test_the_loop_reads_an_engine_and_the_one_that_replaces_it(start: Start):
    client = start("process")

    async def go() -> list[list[int]]:
        loop = Loop(client)
        before = await loop.answer("before", [3, 4, 5])
        first, files = client.pid, psutil.Process().num_fds()
        assert first is not None
        os.kill(first, signal.SIGKILL)
        while client.pid in (None, first):
            await asyncio.sleep(0.01)
        after = await loop.answer("after", [3, 4, 5])
        assert psutil.Process().num_fds() == files
        client.listen(None)
        assert psutil.Process().num_fds() == files - 1
        return [before, after]

    before, after = asyncio.run(go())
    assert before == after == run(client, [ask("without the loop", [3, 4, 5])])["without the loop"].token_ids


@pytest.mark.slow  # 4 s
def test_a_busy_loop_does_not_make_the_engine_look_silent(start: Start):
    client = start("process", heartbeat_timeout_s=1.2, hang_timeout_s=0.5)

    async def go() -> None:
        loop = Loop(client)
        await loop.answer("before", [3, 4, 5])
        first = client.pid
        for _ in range(10):
            time.sleep(0.3)
            assert client.alive()
        await loop.answer("after", [3, 4, 5])
        assert client.pid == first and client.restarts().count == 0

    asyncio.run(go())
