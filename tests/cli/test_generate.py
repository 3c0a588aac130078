"""``truffula generate``: stdout holds the answers and nothing else, from here and from a server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import here, truffula
from live_server import Live, serving, write_model
from terminal import terminal

from truffula import LLM, SamplingParams
from truffula.kernels.cpu import available
from truffula.testing.adapters import write_tiny_adapter

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("generate") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    return write_tiny_adapter(model.parent / "leaf", model, rank=3, alpha=24)


@pytest.fixture(scope="module")
def live(model: Path, adapter: Path) -> Iterator[Live]:
    with serving(model, adapters={"leaf": str(adapter)}, backend="auto") as found:
        yield found


@pytest.fixture(params=["here", "server"])
def generate(request: pytest.FixtureRequest, model: Path, adapter: Path, live: Live) -> Run:
    def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        if request.param == "here":
            words = [f"leaf={adapter}" if word == "leaf" else word for word in args]
            return here("generate", str(model), *words, "-n", "6", "--dtype", "float32", stdin=stdin)
        return here("generate", "--url", live.url, *args, "-n", "6", stdin=stdin)

    return run


@pytest.fixture(scope="module")
def answer(model: Path, adapter: Path) -> Iterator[Callable[..., str]]:
    with LLM(model, adapters={"leaf": adapter}, dtype="float32", memory_bytes=2**28) as llm:
        params = SamplingParams(temperature=0, max_tokens=6)

        def said(text: str, adapter: str | None = None, *, raw: bool = False) -> str:
            chat = [{"role": "user", "content": text}]
            (out,) = llm.generate(text, params, adapters=adapter) if raw else llm.chat(chat, params, adapters=adapter)
            return str(out.text)

        yield said


def test_one_answer_is_all_of_stdout(generate: Run, answer: Callable[..., str]) -> None:
    done = generate("Hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{answer('Hello')}\n"
    assert generate("Hello", "-a", "leaf").stdout == f"{answer('Hello', 'leaf')}\n"
    assert generate("Hello", "--raw").stdout == f"{answer('Hello', raw=True)}\n"


def test_the_prompt_may_come_by_standard_input(generate: Run, answer: Callable[..., str]) -> None:
    assert generate("-", stdin="Hello\n").stdout == f"{answer('Hello')}\n"
    empty = generate("-", stdin=" \n")
    assert empty.returncode == 1 and "prompt is empty" in empty.stderr and empty.stdout == ""


def test_several_answers_have_headings(generate: Run, answer: Callable[..., str]) -> None:
    done = generate("Hello", "-a", "base", "-a", "leaf")
    base, leaf = answer("Hello").strip(), answer("Hello", "leaf").strip()
    assert done.stdout == f"--- base\n{base}\n\n--- leaf\n{leaf}\n"


def test_json_holds_every_answer(generate: Run, answer: Callable[..., str]) -> None:
    found = json.loads(generate("Hello", "-a", "base", "-a", "leaf", "--json").stdout)
    texts = {row["adapter"]: (row["text"], row["finish_reason"]) for row in found["answers"]}
    assert texts == {"base": (answer("Hello"), "length"), "leaf": (answer("Hello", "leaf"), "length")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("x=a/leaf", "x=b/leaf"), "both a/leaf and b/leaf 'x'"),
        (("a/leaf", "b/leaf/"), "'leaf'"),
        (("base=a/leaf",), "means the model without an adapter"),
        (("some/base",), "NAME=some/base"),
        (("=a/leaf",), "NAME=FOLDER"),
    ],
)
def test_names_that_would_confuse_two_adapters_are_refused(words: tuple[str, ...], said: str, model: Path) -> None:
    done = here("generate", str(model), "Hello", *(part for word in words for part in ("-a", word)))
    assert done.returncode == 1 and said in done.stderr and done.stdout == ""


def test_a_pipe_holds_only_the_answer(model: Path, answer: Callable[..., str]) -> None:
    done = truffula("generate", str(model), "-n", "6", "--dtype", "float32", stdin="Hello")
    assert done.stdout == f"{answer('Hello')}\n" and "load" in done.stderr


def test_text_that_looks_like_markup_is_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would take [b] for bold and :smile: for a picture."""
    from truffula.cli.generate import Answer, show
    from truffula.items import Text
    from truffula.types import TextDelta

    text = " [b]:smile: \x1b[31m\n\n"
    show(
        [Answer("one")],
        [(0, TextDelta(parts=[Text(text[:5])])), (0, TextDelta(parts=[Text(text[5:])], finish_reason="stop"))],
    )
    assert capsys.readouterr().out == text
    show(
        [Answer("one"), Answer("two")],
        [(at, TextDelta(parts=[Text("[b]:smile:")], finish_reason="stop")) for at in range(2)],
    )
    assert capsys.readouterr().out == "--- one\n[b]:smile:\n\n--- two\n[b]:smile:\n"


def test_a_terminal_is_not_driven_by_the_model() -> None:
    from truffula.cli.output import visible

    assert visible("a\x1b]52;c;x\x07\tb\n\x9b") == "a␛]52;c;x␇\tb\n�"


def test_on_a_terminal_it_streams_side_by_side(model: Path, adapter: Path) -> None:
    with terminal("generate", str(model), "Hello", "-n", "4", "-a", "base", "-a", f"leaf={adapter}") as screen:
        screen.wait_for("leaf")
        assert screen.wait_for_end() == 0


def test_a_model_without_a_template_says_that_the_prompt_is_completed(tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare")
    (bare / "tokenizer_config.json").write_text("{}")
    done = here("generate", str(bare), "Hello", "-n", "2")
    assert done.returncode == 0 and "no chat template" in done.stderr


@pytest.mark.skipif(not available(), reason="truffula was installed without its native kernels")
def test_int8_is_said_once_with_the_way_to_the_exact_values(model: Path) -> None:
    rounded = here("generate", str(model), "Hello", "-n", "2", "--quantize", "q8_0", "--backend", "cpu")
    assert rounded.stderr.count("int8: ") == 1 and "Q8_0" in rounded.stderr and "int8" not in rounded.stdout
    assert "int8" not in here("generate", str(model), "Hello", "-n", "2").stderr


def test_a_server_that_hangs_up_in_the_middle_is_an_error(live: Live) -> None:
    from truffula.cli.server_client import _event_data

    cut = [b'data: {"a": "\xe2', b"\x80\xa8", b'"}\r\nda', b"ta: [DONE]\n", b": comment\n\n", b"data: half"]
    assert list(_event_data(iter(cut))) == ['{"a": "\u2028"}', "[DONE]"]


def test_the_only_argument_is_the_prompt_where_the_variable_names_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = here("generate", str(model), "What is tea?", "--max-tokens", "4").stdout
    monkeypatch.setenv("TRUFFULA_MODEL", str(model))
    assert here("generate", "What is tea?", "--max-tokens", "4").stdout == wanted != ""
    monkeypatch.setenv("TRUFFULA_MODEL", "/no/such/model")
    assert here("generate", str(model), "What is tea?", "--max-tokens", "4").stdout == wanted
    done = here("generate", str(model), "--max-tokens", "4")  # one word, and no terminal: the model, as before
    assert done.returncode == 1 and "The prompt is empty: pass it after MODEL" in done.stderr


def test_a_file_of_prompts_gives_one_object_per_answer_in_order(
    model: Path, adapter: Path, answer: Callable[..., str], tmp_path: Path
) -> None:
    lines = ["Hello", "", *(f"Hello {n}" for n in range(30)), "naïve 🌲"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    words = ("--prompts", str(tmp_path / "prompts.txt"), "-a", "base", "-a", f"leaf={adapter}")
    done = here("generate", str(model), *words, "-n", "6", "--dtype", "float32", "--max-waiting", "3")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    texts = [line for line in lines if line]
    assert [(row["prompt"], row["adapter"]) for row in rows] == [(t, a) for t in texts for a in ("base", "leaf")]
    for row in (*rows[:4], *rows[-2:]):
        said = answer(row["prompt"], None if row["adapter"] == "base" else "leaf")
        assert row["text"] == said
    assert "[###" not in done.stderr, "no bar in a pipe"
    piped = here("generate", str(model), "--prompts", "-", "-n", "6", "--dtype", "float32", stdin="Hello\n")
    assert [json.loads(line)["text"] for line in piped.stdout.splitlines()] == [answer("Hello")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("Hello", "--prompts", "{here}"), "leave one out"),
        (("--prompts", "{here}/nothing"), "cannot be read"),
        (("--prompts", "{here}/empty"), "holds no prompt"),
        (("--prompts", "{here}", "--url", "http://127.0.0.1:1"), "leave one out"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used(model: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    (tmp_path / "empty").write_text("\n \n")
    done = here("generate", str(model), *(word.format(here=tmp_path) for word in words))
    assert done.returncode == 1 and said in done.stderr and not done.stdout
