"""``truffula generate``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from truffula.cli.output import err, progress
from truffula.cli.side_by_side import show
from truffula.config import EngineConfig
from truffula.errors import ConfigError
from truffula.types import SamplingParams

if TYPE_CHECKING:
    from truffula.llm import LLM

BASE = "base"


def split_adapter(word: str) -> tuple[str, str | None]:
    """``name=source``, a source alone (named after itself), or ``base``: (name, source or None)."""
    name, equals, source = word.partition("=")
    if word == BASE:
        return BASE, None
    if equals and (not name or not source):
        raise ConfigError(f"--adapter is {word!r}; it must be name=folder, a folder, or 'base'.", param="adapter")
    return (name, source) if equals else (word.rstrip("/").rsplit("/", 1)[-1], word)


def open_llm(config: EngineConfig, adapters: dict[str, str]) -> LLM:
    """``LLM`` of a resolved configuration, with a progress bar while it loads."""
    from dataclasses import fields

    from truffula.llm import LLM

    options = {f.name: getattr(config, f.name) for f in fields(config)}
    with progress() as report:
        return LLM(options.pop("model"), adapters=adapters, progress=report, **options)


def read_prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty():
        err().print("[dim]Type the prompt, then Ctrl-D:[/]")
    text = sys.stdin.read().strip()
    if not text:
        raise ConfigError("The prompt is empty: give it as an argument or on standard input.", param="prompt")
    return text


def run_generate(
    config: EngineConfig, prompt: str | None, words: list[str], params: SamplingParams, *, raw: bool
) -> None:
    chosen = [split_adapter(word) for word in words]
    text = read_prompt(prompt)
    with open_llm(config, {name: source for name, source in chosen if source is not None}) as llm:
        asked = text if raw or not llm.has_chat_template else [{"role": "user", "content": text}]
        names = [None if source is None else name for name, source in chosen]
        show([name for name, _ in chosen], llm.stream_each([asked] * len(chosen), params, adapters=names))
