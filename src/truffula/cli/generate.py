"""``truffula generate``: answers to one prompt, and nothing else on stdout."""

from __future__ import annotations

import json
import sys

from truffula.cli.chat_models import ChatModel
from truffula.cli.line_editor import read_text
from truffula.cli.output import note, out
from truffula.cli.side_by_side import Answer, show
from truffula.config import load_settings
from truffula.errors import ConfigError
from truffula.types import SamplingParams


def is_prompt(only: str | None) -> bool:
    """Whether the only argument is the prompt: TRUFFULA_MODEL or the configuration file names the model, and the
    argument is of several words, or standard input is a terminal, so that no prompt comes from there.
    """
    named = any(setting.option.name == "model" for setting in load_settings({}))
    return named and only is not None and (len(only.split()) > 1 or sys.stdin.isatty())


def read_prompt(prompt: str | None) -> str:
    """``prompt``, or standard input where it is left out or ``-``. Raises ``ConfigError`` for none."""
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty():
        note("Type the prompt, then Ctrl-D:")
    text = read_text(sys.stdin.read).strip()
    if not text:
        raise ConfigError("The prompt is empty: pass it after MODEL, or on standard input.", param="prompt")
    return text


def run_generate(
    model: ChatModel, text: str, adapters: list[str | None], params: SamplingParams, *, raw: bool, as_json: bool
) -> None:
    """Answer ``text`` with each of ``adapters`` (None: the base) and print the answers as they grow, or as JSON."""
    if not raw and not model.has_chat_template:
        note(f"{model.name} has no chat template: the prompt is completed as it is, as with --raw.")
        raw = True
    deltas = model.stream(text if raw else [{"role": "user", "content": text}], adapters, params)
    titles = [name or "base" for name in adapters]
    if not as_json:
        show(titles, deltas)
        return
    answers = [Answer(title) for title in titles]
    for position, delta in deltas:
        answers[position].add(delta)
    rows = [{"adapter": a.title, "text": a.text, "finish_reason": a.finish_reason} for a in answers]
    out().print_json(json.dumps({"model": model.name, "answers": rows}))
