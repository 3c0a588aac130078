"""``truffula generate``: answers one prompt or a file of prompts; stdout holds only the answers."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from truffula.cli.chat_models import BASE, ChatModel, Prompt
from truffula.cli.line_editor import read_text
from truffula.cli.output import note, out, visible, write
from truffula.errors import ConfigError, TruffulaError
from truffula.params import SamplingParams
from truffula.service.progress import ProgressBar
from truffula.settings import load_settings
from truffula.types import TextDelta

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


def is_prompt(only: str | None) -> bool:
    """Whether the only argument is the prompt and not the model.

    It is when TRUFFULA_MODEL or the configuration file names the model, and the argument has several words or standard
    input is a terminal.
    """
    named = any(setting.option.name == "model" for setting in load_settings({}))
    return named and only is not None and (len(only.split()) > 1 or sys.stdin.isatty())


def read_prompt(prompt: str | None) -> str:
    """``prompt``, or standard input when it is None or ``-``. Raises ``ConfigError`` when it is empty."""
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty():
        note("Type the prompt, then Ctrl-D:")
    text = read_text(sys.stdin.read).strip()
    if not text:
        raise ConfigError("The prompt is empty: pass it after MODEL, or on standard input.", param="prompt")
    return text


def read_prompts(path: Path, prompt: str | None, url: str | None) -> list[str]:
    """The non-empty lines of ``path`` (``-``: of standard input). Raises ``ConfigError`` when there are none."""
    if prompt is not None:
        raise ConfigError(f"Both a prompt ({prompt[:40]!r}) and --prompts are given; leave one out.", param="prompts")
    if url is not None:
        raise ConfigError(
            "--prompts answers with a model that is loaded here, --url with a server's; leave one out.", param="prompts"
        )
    try:
        text = read_text(sys.stdin.read if str(path) == "-" else lambda: path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--prompts is {path}, which cannot be read: {error.strerror}.", param="prompts") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt: write one per line.", param="prompts")
    return prompts


@dataclass
class Answer:
    """The text of one answer so far. ``finish_reason`` is None until it ends."""

    title: str
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None

    def add(self, delta: TextDelta) -> None:
        """Append a delta. Raises the ``TruffulaError`` of its ``error``."""
        if delta.error is not None:
            raise TruffulaError.from_info(delta.error)
        self.text += delta.text
        self.tokens += len(delta.tokens)
        self.finish_reason = delta.finish_reason or self.finish_reason


def run_batch(
    model: ChatModel, texts: Sequence[str], adapters: Sequence[str | None], params: SamplingParams, *, raw: bool
) -> None:
    """Answer each of ``texts`` with each of ``adapters``, in order: one JSON object per line of stdout.

    No progress bar is shown when stdout is a terminal.
    """
    raw = _completes(model, adapters, raw)
    asked = [(text, adapter) for text in texts for adapter in adapters]
    prompts = [_prompt(text, raw) for text, _ in asked]
    answers = [Answer(adapter or BASE) for _, adapter in asked]
    written = ended = tokens = 0
    with contextlib.closing(ProgressBar()) as bar:
        for position, delta in model.stream(prompts, [adapter for _, adapter in asked], params):
            answers[position].add(delta)
            tokens += len(delta.tokens)
            ended += delta.finish_reason is not None
            while written < len(asked) and answers[written].finish_reason is not None:
                answer, answers[written] = answers[written], Answer("")
                row = {"prompt": asked[written][0], "adapter": answer.title, "text": answer.text}
                write(json.dumps(row | {"finish_reason": answer.finish_reason}, ensure_ascii=False) + "\n")
                written += 1
            if not sys.stdout.isatty():
                bar(ended, len(asked), tokens)


def _prompt(text: str, raw: bool) -> Prompt:
    return text if raw else [{"role": "user", "content": text}]


def _completes(model: ChatModel, adapters: Sequence[str | None], raw: bool) -> bool:
    """Whether prompts are completed without a chat template: with ``--raw``, or when one of the adapters has none."""
    without = None if raw else next((name for name in adapters if not model.can_chat(name)), "")
    if without != "" and not raw:
        note(f"{without or model.name} has no chat template: the prompt is completed as it is, as with --raw.")
    return without != ""


def run_generate(
    model: ChatModel, text: str, adapters: list[str | None], params: SamplingParams, *, raw: bool, as_json: bool
) -> None:
    """Answer ``text`` with each of ``adapters`` (None: the base) and print the answers as they are generated, or as
    JSON.
    """
    prompt = _prompt(text, _completes(model, adapters, raw))
    deltas = model.stream([prompt] * len(adapters), adapters, params)
    answers = [Answer(name or BASE) for name in adapters]
    if not as_json:
        show(answers, deltas)
        return
    for position, delta in deltas:
        answers[position].add(delta)
    rows = [{"adapter": a.title, "text": a.text, "finish_reason": a.finish_reason} for a in answers]
    out().print_json(data={"model": model.name, "answers": rows})


def show(answers: Sequence[Answer], deltas: Iterable[tuple[int, TextDelta]], *, per_row: int = 3) -> None:
    """Print the answers as they are generated. ``deltas`` yields (index of the answer, delta).

    One answer is printed unchanged and without its title, and always ends with a line feed. Several are printed side by
    side on a terminal, up to ``per_row`` in a row; in a pipe, one after the other.
    """
    if len(answers) == 1:
        _stream(answers[0], deltas)
        return
    with Live(console=out(), refresh_per_second=12) if out().is_terminal else contextlib.nullcontext() as live:
        for position, delta in deltas:
            answers[position].add(delta)
            if live is not None:
                live.update(_columns(answers, min(per_row, len(answers))))
    if live is None:
        write("\n".join(f"--- {answer.title}\n{answer.text.strip()}\n" for answer in answers))


def _stream(answer: Answer, deltas: Iterable[tuple[int, TextDelta]]) -> None:
    try:
        for _, delta in deltas:
            answer.add(delta)
            write(delta.text)
    finally:
        if not answer.text.endswith("\n") and (answer.text or answer.finish_reason):
            write("\n")


def _columns(answers: Sequence[Answer], per_row: int) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in range(per_row):
        grid.add_column(ratio=1)
    panels = [
        Panel(
            Text(visible(answer.text.strip()) + ("" if answer.finish_reason else " ▌")),
            title=Text(answer.title),
            border_style=COLOURS[position % len(COLOURS)],
        )
        for position, answer in enumerate(answers)
    ]
    for start in range(0, len(panels), per_row):
        grid.add_row(*panels[start : start + per_row])
    return grid
