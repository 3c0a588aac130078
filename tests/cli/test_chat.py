"""``truffula chat`` from a pipe, here and through a server: only answers on stdout, every command, every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import here
from live_server import Live, serving, write_model

from truffula import LLM, SamplingParams
from truffula.testing.adapters import write_tiny_adapter

GREEDY = ("--temperature", "0", "--max-tokens", "6")
KEY = "sesame"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat") / "model", max_position_embeddings=128)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    return write_tiny_adapter(model.parent / "leaf", model, rank=3, alpha=24)


@pytest.fixture(scope="module")
def live(model: Path, adapter: Path) -> Iterator[Live]:
    with serving(model, adapters={"leaf": str(adapter)}, adapter_admin=True, api_keys=(KEY,), backend="auto") as found:
        yield found


@pytest.fixture(params=["here", "server"])
def chat(request: pytest.FixtureRequest, model: Path, adapter: Path, live: Live) -> Run:
    """``chat(lines, *options)``: the same conversation with a model of this process and with a server's."""

    def run(lines: str, *options: str) -> subprocess.CompletedProcess[str]:
        if request.param == "here":
            words = [f"leaf={adapter}" if word == "leaf" else word for word in options]
            named = [] if "-a" in words else ["-a", "base", "-a", f"leaf={adapter}"]
            return here("chat", str(model), "--dtype", "float32", *GREEDY, *named, *words, stdin=lines)
        return here("chat", "--url", live.url, "--api-key", KEY, *GREEDY, *options, stdin=lines)

    return run


@pytest.fixture(scope="module")
def said(model: Path, adapter: Path) -> Iterator[Callable[..., str]]:
    """What the library answers to a conversation."""
    with LLM(model, adapters={"leaf": adapter}, dtype="float32", memory_bytes=2**28) as llm:

        def answer(*turns: str, adapter: str | None = None, system: str | None = None, most: int = 6) -> str:
            roles = ("user", "assistant")
            talk = [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)]
            if system:
                talk.insert(0, {"role": "system", "content": system})
            (out,) = llm.chat(talk, SamplingParams(temperature=0, max_tokens=most), adapters=adapter)
            return str(out.text)

        yield answer


def test_only_the_answers_are_on_stdout(chat: Run, said: Callable[..., str]) -> None:
    done = chat("Hello\nand now?\n")
    first = said("Hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first}\n{said('Hello', first, 'and now?')}\n"


def test_adapters_switch_within_a_conversation(chat: Run, said: Callable[..., str]) -> None:
    done = chat("/adapters\nHello\n/adapter leaf\nHello\n/adapter base\n/clear\nHello\n")
    first = said("Hello")
    assert done.stdout == f"{first}\n{said('Hello', first, 'Hello', adapter='leaf')}\n{first}\n"
    assert "* base" in done.stderr and "  leaf" in done.stderr
    assert said("Hello", adapter="leaf") != first
    assert chat("Hello\n", "-a", "leaf").stdout == f"{said('Hello', adapter='leaf')}\n"


def test_an_adapter_is_loaded_by_its_folder(chat: Run, said: Callable[..., str], adapter: Path, request: Any) -> None:
    name = f"loaded-{request.node.callspec.id}"
    done = chat(f"/load {name}={adapter}\nHello\n")
    assert done.stdout == f"{said('Hello', adapter='leaf')}\n" and f"{name} is loaded" in done.stderr
    missing = chat("/load /no/such/folder\nHello\n")
    assert missing.returncode == 1 and missing.stdout == "" and "/no/such/folder" in missing.stderr


def test_the_system_message_is_set_and_cleared(chat: Run, said: Callable[..., str]) -> None:
    done = chat("Hello\n/system Be short.\n/clear\nHello\n/system clear\n/clear\nHello\n", "--system", "Be kind.")
    answers = [said("Hello", system=system) for system in ("Be kind.", "Be short.", None)]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    assert "system: Be short." in done.stderr and "There is no system message." in done.stderr


def test_retry_answers_the_last_message_again(chat: Run, said: Callable[..., str]) -> None:
    done = chat("Hello\nMore\n/retry\n/set max_tokens 2\n/retry\n")
    first = said("Hello")
    again, short = said("Hello", first, "More"), said("Hello", first, "More", most=2)
    assert done.stdout == f"{first}\n{again}\n{again}\n{short}\n"
    assert chat("/retry\n").returncode == 1


def test_settings_are_shown_changed_and_checked(chat: Run) -> None:
    done = chat("/set\n/set seed 5\n/set seed none\n/set top_p 0.5\n")
    assert "temperature 0, top_p 1, top_k 0, max_tokens 6, seed none" in done.stderr
    assert "seed 5" in done.stderr and "top_p 0.5" in done.stderr
    for line, words in (
        ("/set temprature 1", "Did you mean temperature?"),
        ("/set seed many", "an integer"),
        ("/set top_p 3", "top_p"),
    ):
        refused = chat(f"{line}\nHello\n")
        assert refused.returncode == 1 and words in refused.stderr and refused.stdout == ""


def test_the_first_error_ends_a_chat_from_a_pipe(chat: Run) -> None:
    for line, words in (
        ("/adapter lef", "There is no adapter 'lef'. Did you mean leaf?"),
        ("/sytem x", "Unknown command /sytem. Did you mean /system?"),
        ("/etc/passwd", "begin with //"),
    ):
        done = chat(f"{line}\nHello\n")
        assert done.returncode == 1 and words in done.stderr and done.stdout == ""


def test_a_message_may_begin_with_a_slash_and_have_several_lines(chat: Run, said: Callable[..., str]) -> None:
    text = '//etc\n/clear\n"""/etc"""\n/clear\n"""one\n\n  two\n"""\n/clear\nthree\\\nfour\n'
    answers = [said(line) for line in ("/etc", "/etc", "one\n\n  two", "three\nfour")]
    assert chat(text).stdout == "".join(f"{answer}\n" for answer in answers)


def test_the_conversation_is_saved_once(chat: Run, said: Callable[..., str], tmp_path: Path) -> None:
    talk, text = tmp_path / "talk.json", tmp_path / "talk.txt"
    done = chat(f"Hello\n/save {talk}\n/save {text}\n/save {talk}\n", "--system", "Be kind.")
    assert done.returncode == 1 and "exists" in done.stderr
    system, answer = {"role": "system", "content": "Be kind."}, said("Hello", system="Be kind.")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
    assert json.loads(talk.read_text()) == {"messages": [system, *turns]}
    assert text.read_text().startswith("system: Be kind.\n\nuser: Hello\n\nassistant: ")
    assert "can't be written" in chat(f"/save {tmp_path}/no/folder\n").stderr


def test_a_full_context_is_used_up_and_then_names_the_way_out(chat: Run) -> None:
    done = chat("Hello\nmore\n/clear\nHello\n", "--max-tokens", "120")  # of 128 positions, prompt included
    assert done.returncode == 1 and len(done.stdout) > 100
    assert "cut off at the end of the context" in done.stderr
    assert "no longer fits into the model's context" in done.stderr and "/clear" in done.stderr


def test_help_names_every_command_and_the_ways_to_leave(chat: Run) -> None:
    for word in ("/help", "/?"):
        shown = chat(f"{word}\n").stderr
        for name in ("/adapter", "/adapters", "/load", "/system", "/set", "/clear", "/retry", "/save", "/bye", "/q"):
            assert name in shown
    for word in ("/bye", "/exit", "/quit", "/q"):
        done = chat(f"{word}\nHello\n")
        assert (done.returncode, done.stdout) == (0, "")


def test_a_model_without_a_chat_template_is_refused_before_the_first_message(tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text("{}")
    done = here("chat", str(bare), stdin="Hello\n")
    assert done.returncode == 1 and "no chat template" in done.stderr and "--raw" in done.stderr


def test_bytes_that_are_not_text_are_refused(model: Path) -> None:
    for command in (["chat", str(model)], ["generate", str(model)]):
        done = subprocess.run([sys.executable, "-m", "truffula", *command], input=b"caf\xe9\n", capture_output=True)
        assert done.returncode == 1 and b"not UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_options_that_a_running_server_cannot_honour_are_refused(model: Path, live: Live) -> None:
    for args, words in (
        ((str(model), "--url", live.url), "leave out"),
        (("--url", live.url, "--threads", "1"), "--threads"),
        (("--url", live.url, "-a", "leaf=/somewhere"), "adapters load"),
        ((str(model), "--api-key", KEY), "--url"),
    ):
        done = here("chat", *args, stdin="Hello\n")
        assert done.returncode == 1 and words in done.stderr and done.stdout == ""


def test_a_server_refuses_an_adapter_it_does_not_have(live: Live) -> None:
    done = here("chat", "--url", live.url, "--api-key", KEY, "-a", "oak", stdin="Hello\n")
    assert done.returncode == 1 and "'oak'" in done.stderr and done.stdout == ""
