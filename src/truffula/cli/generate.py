"""``truffula generate``: answers one prompt or a file of prompts; stdout holds only the answers."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from truffula.cli.chat_models import ChatModel, LocalModel, Prompt
from truffula.cli.line_editor import read_text
from truffula.cli.output import note, out, write
from truffula.cli.side_by_side import Answer, show
from truffula.errors import ConfigError
from truffula.params import SamplingParams
from truffula.service.progress import ProgressBar
from truffula.settings import load_settings


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


def run_batch(
    model: ChatModel, texts: Sequence[str], adapters: Sequence[str | None], params: SamplingParams, *, raw: bool
) -> None:
    """Answer each of ``texts`` with each of ``adapters``, in order: one JSON object per line of stdout.

    No progress bar is shown when stdout is a terminal.
    """
    assert isinstance(model, LocalModel), "--prompts and --url exclude each other"
    raw = _completes(model, raw)
    asked = [(text, adapter) for text in texts for adapter in adapters]
    prompts: list[Prompt] = [text if raw else [{"role": "user", "content": text}] for text, _ in asked]
    answers = [Answer(adapter or "base") for _, adapter in asked]
    written = ended = tokens = 0
    with contextlib.closing(ProgressBar()) as bar:
        for position, delta in model.stream_each(prompts, [adapter for _, adapter in asked], params):
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


def _completes(model: ChatModel, raw: bool) -> bool:
    """Whether prompts are completed without a chat template: with ``--raw``, or when the model has none."""
    if not raw and not model.has_chat_template:
        note(f"{model.name} has no chat template: the prompt is completed as it is, as with --raw.")
    return raw or not model.has_chat_template


def run_generate(
    model: ChatModel, text: str, adapters: list[str | None], params: SamplingParams, *, raw: bool, as_json: bool
) -> None:
    """Answer ``text`` with each of ``adapters`` (None: the base) and print the answers as they are generated, or as
    JSON.
    """
    deltas = model.stream(text if _completes(model, raw) else [{"role": "user", "content": text}], adapters, params)
    titles = [name or "base" for name in adapters]
    if not as_json:
        show(titles, deltas)
        return
    answers = [Answer(title) for title in titles]
    for position, delta in deltas:
        answers[position].add(delta)
    rows = [{"adapter": a.title, "text": a.text, "finish_reason": a.finish_reason} for a in answers]
    out().print_json(json.dumps({"model": model.name, "answers": rows}))
