"""The engine's process is killed, stopped or orphaned: no call waits forever, and no process or file remains."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from following import DIGITS, VOCABULARY, Answer, ask, eventually, fold, follow, run, text_of

from processes import frozen, running, watched
from truffula import frames
from truffula.config import EngineConfig
from truffula.engine import wire
from truffula.engine.engine_process import EngineProcess
from truffula.engine.process import ProcessClient
from truffula.engine.worker import Worker
from truffula.errors import EngineDied
from truffula.frames import Channel
from truffula.testing.adapters import write_tiny_adapter
from truffula.types import AdapterCommand, AdapterRef, TokenEvent

Start = Callable[..., ProcessClient]


def test_kill_9_ends_every_request_and_the_next_engine_serves(start: Start):
    client = start("process")
    before = run(client, [ask("before", [3, 4, 5])])["before"]
    first = client.pid
    names = [f"r{n}" for n in range(12)]
    client.submit([ask(name, [n + 3, 4], max_tokens=4000, ignore_eos=True) for n, name in enumerate(names)])
    answers: dict[str, Answer] = {}
    eventually(lambda: fold(answers, client.events(0.1)) or answers, "the first token")
    os.kill(first, signal.SIGKILL)
    follow(client, names, answers)
    assert {(a.finish, a.code) for a in answers.values()} == {("error", "engine_died")}
    assert "SIGKILL" in answers["r0"].message
    eventually(lambda: client.pid not in (None, first), "the next engine")
    assert client.alive() and client.fatal_error() is None
    assert not psutil.pid_exists(first), "not even a zombie"
    assert run(client, [ask("after", [3, 4, 5])])["after"].token_ids == before.token_ids


def test_an_engine_that_replaces_another_has_its_vocabulary(start: Start):
    client = start("process")
    client.set_vocabulary(VOCABULARY)
    first = client.pid
    os.kill(first, signal.SIGKILL)
    eventually(lambda: client.pid not in (None, first) and client.alive(), "the next engine")
    answer = run(client, [ask("after", [3, 4], grammar=DIGITS, max_tokens=9)])["after"]
    assert answer.finish == "stop" and text_of(answer).isdigit()


LOST_DEVICE = """
import pathlib
import truffula.engine.engine as module
from truffula.errors import DeviceLost

step, flag = module.Engine.step, pathlib.Path({flag!r})

def step_or_fail(self):
    if self._steps >= 3 and flag.exists():
        flag.unlink()
        raise DeviceLost("The device does not respond.")
    return step(self)

module.Engine.step = step_or_fail
"""


def test_a_lost_device_ends_the_process_its_streams_and_no_more(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first engine process loses its device in its third step, as a driver would report it."""
    flag = tmp_path / "lose it"
    flag.touch()
    (tmp_path / "sitecustomize.py").write_text(LOST_DEVICE.format(flag=str(flag)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    client = start("process")
    first = client.pid
    client.submit([ask(name, [5, 6], max_tokens=4000, ignore_eos=True) for name in "ab"])
    ends = follow(client, ["a", "b"])
    assert {(answer.finish, answer.code) for answer in ends.values()} == {("error", "engine_died")}
    assert "The device does not respond." in ends["a"].message
    eventually(lambda: client.pid not in (None, first), "the next engine")
    assert run(client, [ask("after", [3, 4, 5])])["after"].finish == "length"
    assert "The device does not respond." in client.restarts().last_reason


def test_an_engine_that_may_not_be_restarted_is_given_up_and_requests_are_refused(start: Start):
    client = start("process", max_restarts=0)
    client.submit([ask("open", [5, 6], max_tokens=4000, ignore_eos=True)])
    os.kill(client.pid, signal.SIGKILL)
    assert follow(client, ["open"])["open"].code == "engine_died"
    eventually(lambda: "not restarted" in run(client, [ask("late", [3])])["late"].message, "the engine is lost")
    with pytest.raises(EngineDied, match="SIGKILL"):
        client.adapters(AdapterCommand(action="list"))
    assert not client.alive() and client.pid is None
    lost = client.fatal_error()
    assert lost is not None and "not restarted" in lost.message


@pytest.mark.slow
def test_each_death_within_the_window_counts_until_it_is_given_up(start: Start):
    client = start("process", max_restarts=2)
    known = {None}
    for _ in range(3):
        known.add(eventually(lambda: client.pid if client.pid not in known else None, "an engine"))
        os.kill(client.pid, signal.SIGKILL)
    eventually(lambda: "3 times" in run(client, [ask("a", [3])])["a"].message, "the supervisor gives up")


def test_pinned_adapters_are_loaded_again_after_a_death(
    start: Start, tiny_adapter: Path, tiny_model: Path, tmp_path: Path
):
    client = start("process")
    soft = write_tiny_adapter(tmp_path / "soft", tiny_model, rank=3, alpha=3, seed=6)
    for name, folder in (("loud", tiny_adapter), ("soft", soft), ("brief", soft)):
        ref = AdapterRef(name=name, locator=str(folder))
        client.adapters(AdapterCommand(action="load", ref=ref, pinned=True))
    client.adapters(AdapterCommand(action="unpin", ref=ref))  # also of "soft", whose bytes they are
    client.adapters(AdapterCommand(action="load", ref=AdapterRef(name="soft", locator=str(soft)), pinned=True))
    # To load it again ends no pin.
    client.adapters(AdapterCommand(action="load", ref=AdapterRef(name="loud", locator=str(tiny_adapter))))
    first = client.pid
    os.kill(first, signal.SIGKILL)
    eventually(lambda: client.pid not in (None, first), "the next engine")
    states = lambda: client.adapters(AdapterCommand(action="list"))
    there = [("loud", "resident", True), ("soft", "resident", True)]
    eventually(lambda: sorted((s.name, s.status, s.pinned) for s in states()) == there, "they are back")


def test_a_stopped_engine_is_unhealthy_and_never_blocks_its_callers(start: Start):
    client = start("process", heartbeat_timeout_s=60.0)
    with contextlib.ExitStack() as ice:
        ice.enter_context(frozen(client.pid))
        # More than a socket's buffer holds: were submit to wait for the engine, this would hang.
        names = [f"big {n}" for n in range(40)]
        for name in names:
            client.submit([ask(name, [3] * 30_000)])
        with watched(client, heartbeat_timeout_s=1.0):
            eventually(lambda: not client.alive(), "the silence is noticed")
            ice.close()
            eventually(client.alive, "it speaks again")
    assert {a.code for a in follow(client, names).values()} == {"prompt_too_long"}


def test_an_engine_that_hangs_takes_no_requests_is_killed_and_followed_by_another(start: Start):
    client = start("process", heartbeat_timeout_s=60.0)
    first = client.pid
    client.submit([ask("open", [5, 6], max_tokens=4000, ignore_eos=True)])
    with frozen(first), watched(client, heartbeat_timeout_s=1.0, hang_timeout_s=1.0):
        eventually(lambda: not client.alive(), "the silence is noticed")
        late = run(client, [ask("late", [3])])["late"]
        assert (late.finish, late.code) == ("error", "engine_died")
        answer = follow(client, ["open"])["open"]
        assert (answer.finish, answer.code) == ("error", "engine_died")
        assert "unresponsive" in answer.message
        eventually(lambda: client.pid not in (None, first), "the next engine")
        assert not running(first)
    served = lambda: run(client, [ask("after", [3])])["after"].finish in ("length", "stop")
    eventually(served, "it serves")


def test_a_step_that_never_ends_counts_as_hanging_despite_the_heartbeat():
    config = EngineConfig(model="none", step_timeout_s=2.0, heartbeat_timeout_s=5.0, hang_timeout_s=3.0)
    process = EngineProcess(config)
    try:
        process.ready, process.step_since = True, 100.0
        checks = [(now, process.on_frame(now), process.kill_reason(now)) for now in (100.0, 102.0, 102.5, 105.0)]
        assert [hang for _, _, hang in checks] == [None] * 4
        process.on_frame(105.5)
        assert "stuck in a step" in (process.kill_reason(105.5) or "")
        process.step_since = None
        assert process.kill_reason(105.6) is None, "the step has ended"
    finally:
        process.kill()
        process.end()


def test_signals_for_the_group_do_not_end_the_engine_whose_command_line_tells_nothing(start: Start, tiny_model: Path):
    client = start("process")
    assert str(tiny_model) not in " ".join(psutil.Process(client.pid).cmdline())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(client.pid, number)
    assert run(client, [ask("a", [3])])["a"].finish in ("length", "stop")


def test_the_engine_and_its_loading_worker_go_with_a_killed_parent(tiny_model: Path, tiny_adapter: Path):
    code = f"""
import sys, json
from truffula import frames
from truffula.config import EngineConfig
from truffula.engine.client import connect
from truffula.errors import EngineDied
from truffula.frames import Channel
from truffula.types import AdapterCommand, AdapterRef
client = connect(EngineConfig(model={str(tiny_model)!r}, threads=1, memory_bytes=2**28, offline=True), "process")
client.adapters(AdapterCommand(action="load", ref=AdapterRef(name="a", locator={str(tiny_adapter)!r})))
print(client.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None and parent.stdin is not None
        engine = int(parent.stdout.readline())
        family = [engine, *(child.pid for child in psutil.Process(engine).children(recursive=True))]
        assert len(family) >= 2, "the engine and its loading worker"
    finally:
        parent.kill()
        parent.communicate()
    eventually(lambda: not any(running(pid) for pid in family), f"the end of {family}")


def worker() -> tuple[subprocess.Popen[bytes], Channel[wire.FromEngine]]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "truffula.engine.worker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    return process, wire.client_channel(ours)


def everything(channel: Channel[wire.FromEngine]) -> list[wire.FromEngine]:
    received: list[wire.FromEngine] = []
    deadline = time.monotonic() + 60
    while (more := channel.receive()) is not None:
        assert time.monotonic() < deadline
        received += more
        time.sleep(0.01)
    channel.close()
    return received


def test_an_event_too_big_for_a_frame_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 4000)
    ours, theirs = socket.socketpair()
    channel = wire.client_channel(ours)
    teller = Worker(wire.engine_channel(theirs))
    scores = [(-1.0, [(n, -2.0) for n in range(20)])] * 50
    small = [TokenEvent(request_id=name, token_ids=[1]) for name in "ab"]
    try:
        assert teller._send_events([small[0], TokenEvent(request_id="big", prompt_logprobs=scores), small[1]]) == [
            "big"
        ]
        assert teller._send_events(small) == []
    finally:
        teller._heartbeat.stop()
        theirs.close()
    sent = [frame for frame in everything(channel) if isinstance(frame, wire.Events)]
    told = [(e.request_id, e.token_ids, e.error and e.error.code) for frame in sent for e in frame.events]
    ends = [("a", [1], None), ("big", [], "generation_failed"), ("b", [1], None)]
    assert told == [*ends, *ends[::2]]


def test_a_heartbeat_that_fails_ends_the_engine_with_the_reason():
    ours, theirs = socket.socketpair()
    code = f"""
import socket, time
from truffula.engine import wire, worker
from truffula.types import EngineStats
heartbeat = worker.Heartbeat(wire.engine_channel(socket.socket(fileno={theirs.fileno()})))
heartbeat.stats = EngineStats(monotonic=0.0, steps=10**30)  # no frame can carry that
time.sleep(600)  # the main thread in a long step
"""
    with theirs:
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=(theirs.fileno(),))
    died = everything(wire.client_channel(ours))[-1]
    assert isinstance(died, wire.Died) and died.error.code == "engine_died", died
    assert process.wait(60) == 70


def test_a_worker_that_receives_a_malformed_frame_ends_with_the_reason():
    process, channel = worker()
    channel.post(wire.Stop())
    died = everything(channel)[-1]
    assert isinstance(died, wire.Died) and died.error.code == "wire_error"
    assert process.wait(60) != 0


def test_a_worker_whose_parent_sends_nothing_ends_with_the_socket():
    process, channel = worker()
    channel.close()
    assert process.wait(60) == 0


def test_a_worker_that_cannot_start_sends_the_reason(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    process, channel = worker()
    channel.post(wire.Start(EngineConfig(model=str(tmp_path), offline=True)))
    died = everything(channel)[-1]
    assert isinstance(died, wire.Died) and died.error.code in ("model_unsupported", "checkpoint_invalid")
    assert process.wait(60) != 0
