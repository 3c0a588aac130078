"""One frame is one line, whatever the text holds; keep-alives; a client that leaves ends the work."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.server.sse import CONNECTION, KEEP_ALIVE, ClientGone, EventStream, frame, unless_gone

LINE_ENDS = "\n\r\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e😀 data: [DONE]"
text = st.text(st.one_of(st.sampled_from(LINE_ENDS), st.characters(exclude_categories=["Cs"])))


@given(value=text)
@settings(max_examples=200, deadline=None)
def test_a_frame_is_one_line_for_every_way_of_splitting(value):
    raw = frame({"text": value, "n": 1})
    assert raw.startswith(b"data: {")
    assert raw.endswith(b"\n\n")
    lines = raw.decode().splitlines()
    assert lines[1:] == [""]
    assert json.loads(lines[0].removeprefix("data: ")) == {"text": value, "n": 1}


async def never():
    await asyncio.Event().wait()


class Connection:
    """That of a client that leaves when ``leave`` is called, and reads nothing of what goes past ``send``."""

    def __init__(self, *, gone=False):
        self.gone, self.written, self.written_at, self._callback = gone, [], 0.0, None

    def write(self, chunk):
        self.written.append(chunk)
        return chunk == KEEP_ALIVE

    def when_gone(self, callback):
        self._callback = callback

    def leave(self):
        self.gone = True
        if self._callback is not None:
            self._callback()


def scope_of(connection):
    return {"type": "http", "extensions": {CONNECTION: {"connection": connection}}}


async def no_more():
    raise AssertionError("the body was read")


def run_stream(frames, connection, keep_alive_s=15.0):
    sent = []

    async def send(message):
        sent.append(message)

    async def go():
        response = EventStream(b"data: 1\n\n", frames, {"x-model-id": "m"}, keep_alive_s)
        await response(scope_of(connection), no_more, send)

    asyncio.run(go())
    return sent


def test_a_stream_sends_its_headers_frames_and_end():
    async def frames():
        yield b"data: 2\n\n"

    sent = run_stream(frames(), Connection())
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream"
    assert headers[b"cache-control"] == b"no-cache"
    assert headers[b"x-accel-buffering"] == b"no"
    assert headers[b"x-model-id"] == b"m"
    assert [m["body"] for m in sent[1:]] == [b"data: 1\n\n", b"data: 2\n\n", b""]
    assert [m["more_body"] for m in sent[1:]] == [True, True, False]


def test_silence_is_filled_with_comments():
    connection = Connection()
    sent = []

    async def send(message):
        sent.append(message)

    async def frames():
        while not connection.written:
            await asyncio.sleep(0.001)
        yield b"data: 2\n\n"

    response = EventStream(b"data: 1\n\n", frames(), None, keep_alive_s=0.01)
    asyncio.run(response(scope_of(connection), no_more, send))
    assert connection.written[0] == KEEP_ALIVE
    assert connection.written[-1] == sent[-2]["body"] == b"data: 2\n\n"


def test_a_client_that_leaves_closes_the_frames():
    closed = []

    async def frames():
        try:
            await never()
            yield b""
        finally:
            closed.append(True)

    with pytest.raises(ClientGone):
        run_stream(frames(), Connection(gone=True))
    assert closed == [True]


def test_work_is_cancelled_and_awaited_when_the_client_leaves():
    ended = []

    async def work():
        try:
            await never()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    async def go():
        connection = Connection()
        task = asyncio.ensure_future(unless_gone(connection, work()))
        await asyncio.sleep(0)
        connection.leave()
        with pytest.raises(ClientGone):
            await task
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(go())
    assert ended == [True]


def test_a_connection_that_is_closing_and_then_lost_ends_the_work_once():
    async def go():
        connection = Connection(gone=True)
        task = asyncio.ensure_future(unless_gone(connection, never()))
        await asyncio.sleep(0)
        connection.leave()
        await asyncio.sleep(0)
        connection.leave()
        with pytest.raises(ClientGone):
            await task

    asyncio.run(go())


def test_the_frames_are_closed_even_when_nobody_took_one():
    async def go():
        async def quick():
            return 5

        assert await unless_gone(Connection(), quick()) == 5
        assert await unless_gone(Connection(gone=True), quick()) == 5

    asyncio.run(go())


@pytest.mark.parametrize("gone_too", [False, True])
def test_a_cancelled_request_stays_cancelled(gone_too):
    """Whoever cancels the task for another reason sees it cancelled, whether or not the client leaves as well."""

    async def go():
        connection = Connection()
        task = asyncio.ensure_future(unless_gone(connection, never()))
        await asyncio.sleep(0)
        if gone_too:
            connection.leave()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(go())
