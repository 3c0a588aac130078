"""A text worker runs foreign code within limits of time and memory, and is started again after it has exceeded one."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from served import tiny_info
from template_bombs import BOMBS

from truffula.errors import InvalidRequest, Overloaded, ShuttingDown, TemplateError, TruffulaError
from truffula.items import Message, Text
from truffula.service.prompts import render_job, unpack_rendered
from truffula.text.chat_template import ChatTemplates
from truffula.text.process import Setup, TextWorker, WorkerStopped
from truffula.types import GenerateRequest

CHAT = GenerateRequest(messages=[Message(role="user", items=[Text("hi")])])
PLAIN = "{% for m in messages %}{{ m.content }}!{% endfor %}"


@pytest.fixture
def worker() -> Iterator[TextWorker]:
    setup = Setup(
        info=tiny_info(), texts_path=None, texts_digest="", templates={}, special_tokens={}, memory_bytes=2**28
    )
    made = TextWorker(setup)
    yield made
    made.close()


def rendered(worker: TextWorker, source: str, seconds: float = 5.0) -> str:
    (packed,) = worker.call(render_job, msgspec.structs.replace(CHAT, chat_template=source), seconds)
    return unpack_rendered(packed)[0]


def of_this_file(worker: object, argument: object) -> Iterator[bytes]:
    raise NotImplementedError


class Code:
    """A call's argument that makes the worker execute ``source`` when it reads the call."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.source,)


SOON = ("multiplied text", "doubled list")
SHORT_S = 0.7
"""Of processor time, which the system limits by whole seconds: the process ends within its first one."""


@pytest.mark.parametrize("bomb", [pytest.param(n, marks=() if n in SOON else pytest.mark.slow) for n in BOMBS])
def test_a_bomb_exceeds_no_limit_or_ends_as_an_error(worker: TextWorker, bomb: str) -> None:
    """Within a second of processor time and 256 MiB; the next chat is rendered, by the same process or the next."""
    assert not ChatTemplates({"default": BOMBS[bomb]}, {}).is_plain(BOMBS[bomb])
    try:
        assert len(rendered(worker, BOMBS[bomb], seconds=1.0)) <= 4_000_000
    except (TemplateError, WorkerStopped) as error:
        assert error.message
    assert rendered(worker, PLAIN) == "hi!"


def test_limits_are_named(worker: TextWorker) -> None:
    with pytest.raises(WorkerStopped, match=r"0\.7 s of processor time"):
        rendered(worker, BOMBS["quotient of large integers"], seconds=SHORT_S)
    with pytest.raises((WorkerStopped, TemplateError), match="memory"):
        rendered(worker, "{{ 'x' * 10**10 ~ messages[0].role }}")


def test_what_a_call_has_taken_does_not_count_for_the_next(worker: TextWorker) -> None:
    """It may be another tenant's. An error refers to what its template has made: here a string of 64 MiB or more."""
    source = "{% set n = namespace(x='a' * 1024) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
    with pytest.raises(TemplateError, match="too much memory"):
        rendered(worker, source)
    with pytest.raises(TruffulaError) as failed:
        worker.call(render_job, Code("bytearray(192 << 20)"), 5.0)
    assert not isinstance(failed.value, WorkerStopped), failed.value


def test_errors_of_a_call_are_raised_and_the_process_stays(worker: TextWorker) -> None:
    assert rendered(worker, PLAIN) == "hi!"
    pid = worker.pid
    with pytest.raises(TruffulaError, match="No module named"):  # the worker does not see this test's folder
        worker.call(of_this_file, None, 1.0)
    with pytest.raises(InvalidRequest, match="messages"):
        worker.call(render_job, GenerateRequest(messages=[], chat_template=PLAIN), 1.0)
    assert worker.pid == pid
    worker.close()
    assert worker.pid is None
    assert rendered(worker, PLAIN) == "hi!"
    assert worker.pid not in (None, pid)


def test_a_process_that_was_ended_between_calls_is_started_again(worker: TextWorker) -> None:
    assert rendered(worker, PLAIN) == "hi!"
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    assert rendered(worker, PLAIN) == "hi!"


def test_a_process_that_stops_reading_or_writing_does_not_hold_the_call(worker: TextWorker) -> None:
    def called(*call: Any) -> str:
        with pytest.raises(WorkerStopped) as raised:
            worker.call(*call)
        return raised.value.message

    assert rendered(worker, PLAIN) == "hi!"
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    assert called(render_job, "x" * 10**7, 0.1) == "it took longer than 1 s"  # more than the socket holds
    # The length of a message, and its first byte.
    half = "import os, struct, sys, time; os.write(int(sys.argv[2]), struct.pack('!i', 100) + b'P'); time.sleep(600)"
    assert called(render_job, Code(half), 0.2) == "it took longer than 2 s"
    assert rendered(worker, PLAIN) == "hi!"


def endless_call(worker: TextWorker, end: Callable[[int], object], *, times: int, seconds: float = 60.0) -> None:
    """Run a call that does not end by itself, and call ``end`` with the ids of its first processes."""

    def watch() -> None:
        seen: set[int] = set()
        while len(seen) < times and not ended.wait(0.001):
            if (pid := worker.pid) is not None and pid not in seen:
                seen.add(pid)
                end(pid)

    ended = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        rendered(worker, BOMBS["nested loops"], seconds=seconds)
    finally:
        ended.set()
        watcher.join()


def test_a_call_is_not_blamed_for_what_the_system_and_the_server_do(
    worker: TextWorker, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WorkerStopped, match=r"0\.7 s of processor time"):  # of its second process
        endless_call(worker, lambda pid: os.kill(pid, signal.SIGKILL), times=1, seconds=SHORT_S)
    assert caplog.text.count("was killed") == 1
    with pytest.raises(Overloaded, match="killed twice"):
        endless_call(worker, lambda pid: os.kill(pid, signal.SIGKILL), times=2)
    with pytest.raises(ShuttingDown):
        endless_call(worker, lambda _: worker.close(), times=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(Overloaded, match="Too many open files"):
            worker.call(render_job, CHAT, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert rendered(worker, PLAIN) == "hi!"
