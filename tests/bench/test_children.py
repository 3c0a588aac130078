"""Why a child did not start: in its own words, and a truffula server's error with its own code."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from comparison.processes import LineChild
from truffula.bench.server import Server, child_error, truffula_server
from truffula.config import EngineConfig
from truffula.errors import CheckpointChanged, ConfigError, ModelNotFound, ProcessFailed


def test_a_server_of_ours_that_fails_keeps_its_code(tmp_path: Path) -> None:
    with (
        pytest.raises(ModelNotFound, match="truffula exited during its start: There is no file or folder") as caught,
        truffula_server(EngineConfig(model=str(tmp_path / "none"))) as server,
    ):
        server.wait()
    assert "\n" not in caught.value.message


def test_a_taken_port_is_the_options_fault() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"Port {port}"),
            truffula_server(EngineConfig(model="x"), port=port) as server,
        ):
            server.wait()


def test_another_program_that_fails_is_no_fault_of_an_option() -> None:
    argv = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    failed = pytest.raises(ProcessFailed, match="peer exited during its start:\nno such model")
    with failed, Server("peer", argv, "http://127.0.0.1:9") as server:
        server.wait()
    silent = pytest.raises(ProcessFailed, match="peer exited before it answered without output")
    with silent, LineChild("peer", [sys.executable, "-c", ""]) as child:
        child.read()
    with pytest.raises(ProcessFailed, match="peer did not start"), Server("peer", ["/no/such/program"], "http://x"):
        pass


def test_the_error_is_the_last_thing_said_whatever_its_length() -> None:
    said = "2026-01-01 info reading the model files\nerror (checkpoint_changed) a.gguf changed\nwhile it was read.\n"
    error = child_error("it failed", said)
    assert isinstance(error, CheckpointChanged) and error.message == "it failed: a.gguf changed\nwhile it was read."
    assert child_error("it failed", "an error (checkpoint_changed) in a sentence").code == "process_failed"
