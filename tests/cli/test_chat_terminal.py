"""``truffula chat`` on a terminal: editing, history, several lines, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from live_server import write_model
from terminal import terminal

from truffula.testing.adapters import write_tiny_adapter

UP, LEFT, TAB, CTRL_A, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\t", "\x01", "\x03", "\x04"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So long that no answer reaches its end while a test looks on."""
    return write_model(tmp_path_factory.mktemp("chat") / "model", max_position_embeddings=65536)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    return write_tiny_adapter(model.parent / "leaf", model, rank=3)


def messages(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())["messages"]
    return found


def asked(file: Path) -> list[str]:
    return [message["content"] for message in messages(file) if message["role"] == "user"]


def test_lines_are_edited_and_recalled_and_kept_for_the_next_chat(model: Path, tmp_path: Path) -> None:
    chat = ("chat", str(model), "--max-tokens", "3")
    with terminal(*chat, XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for("base> ")
        screen.line(f"helo{LEFT}l")
        screen.line(UP)
        screen.line(f"world{CTRL_A}hello ")
        screen.line(f"/save {tmp_path}/one.json")
        assert "^[[" not in screen.raw
        screen.type(CTRL_D)
        assert screen.wait_for_end() == 0
    assert asked(tmp_path / "one.json") == ["hello", "hello", "hello world"]
    history = tmp_path / "truffula" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and history.parent.stat().st_mode & 0o777 == 0o700
    with terminal(*chat, XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for("base> ")
        screen.line(UP + UP)  # behind the /save
        screen.line(f"/save {tmp_path}/two.json")
        screen.type("/bye\r")
        assert screen.wait_for_end() == 0
    assert asked(tmp_path / "two.json") == ["hello world"]


def test_several_lines_are_one_message(model: Path, tmp_path: Path) -> None:
    with terminal("chat", str(model), "--max-tokens", "3", XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for("base> ")
        screen.type('"""one\r')
        screen.wait_for("... ")
        screen.line('two"""')
        screen.type("three\\\r")
        screen.wait_for("... ")
        screen.line("four")
        screen.line("\x1b[200~five\nsix\x1b[201~")  # as a terminal sends what is pasted
        screen.type('"""never sent\r')
        screen.wait_for("... ")
        screen.interrupt("base> ")
        screen.line(f"/save {tmp_path}/talk.json")
    assert asked(tmp_path / "talk.json") == ["one\ntwo", "three\nfour", "five\nsix"]


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(model: Path, adapter: Path, tmp_path: Path) -> None:
    options = ("--max-tokens", "60000", "--temperature", "0", "-a", "base", "-a", f"leaf={adapter}")
    with terminal("chat", str(model), *options, XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for("base> ")
        screen.type("Hello\r")
        screen.wait_for("\n")
        screen.wait_for_any(20)  # of the answer
        screen.type(CTRL_C)
        screen.wait_for("(stopped)")
        screen.wait_for("base> ")
        screen.line("/set max_tokens 4")
        screen.line(f"/adapter le{TAB}", "leaf> ")
        screen.line("Hello", "leaf> ")
        screen.line(f"/save {tmp_path}/talk.json", "leaf> ")
        screen.interrupt("Ctrl-C again")
        screen.wait_for("leaf> ")
        screen.interrupt("\n")  # once more would end it with the signal's status
        assert screen.wait_for_end() == 0
    roles = [message["role"] for message in messages(tmp_path / "talk.json")]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert all(message["content"] for message in messages(tmp_path / "talk.json"))


def test_a_history_that_cannot_be_written_is_said_and_the_chat_goes_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "truffula").write_text("a file where the folder would be")
    with terminal("chat", str(model), "--max-tokens", "3", XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for("base> ")
        assert "cannot be used" in screen.line("Hello")
        assert "cannot be used" not in screen.line("Hello")
