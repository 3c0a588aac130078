"""``truffula chat``: a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape

from truffula.cli.generate import BASE, open_llm, split_adapter
from truffula.cli.output import out
from truffula.config import EngineConfig
from truffula.errors import TruffulaError, from_info
from truffula.types import SamplingParams

HELP = "/adapter NAME switches (base for none) · /reset forgets the conversation · /help · /quit"


def run_chat(config: EngineConfig, words: list[str], system: str | None, max_tokens: int, temperature: float) -> None:
    chosen = [split_adapter(word) for word in words]
    named = {name: source for name, source in chosen if source is not None}
    with open_llm(config, named) as llm:
        talk = _Talk(llm, named, chosen[0][0] if chosen else BASE, system)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        out().print(f"[dim]{config.model}, adapters: {', '.join(named) or 'none'}. {HELP}[/]")
        for line in _lines(talk):
            if line.startswith("/"):
                if not talk.command(line):
                    return
            else:
                talk.answer(line, params)


def _lines(talk: _Talk) -> Iterator[str]:
    """What the user types, until the end of input."""
    while True:
        try:
            line = out().input(f"\n[bold]{escape(talk.adapter)}>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            out().print()
            return
        if line:
            yield line


class _Talk:
    """The conversation so far and who answers."""

    def __init__(self, llm: object, named: dict[str, str], adapter: str, system: str | None) -> None:
        self.adapter = adapter
        self._llm = llm
        self._named = named
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._system)

    def command(self, line: str) -> bool:
        """Obey a line that begins with '/'; False ends the chat."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word == "/reset":
            self._messages = list(self._system)
        elif word == "/adapter" and rest in (BASE, *self._named):
            self.adapter = rest
        elif word == "/adapter":
            out().print(f"There is no adapter {escape(rest)!r}; there are {', '.join((BASE, *self._named))}.")
        else:
            out().print(HELP)
        return True

    def answer(self, line: str, params: SamplingParams) -> None:
        """One turn; an error of this turn is printed and the turn forgotten."""
        from truffula.llm import LLM

        assert isinstance(self._llm, LLM)
        messages = [*self._messages, {"role": "user", "content": line}]
        adapter = None if self.adapter == BASE else self.adapter
        text = ""
        try:
            for delta in self._llm.stream(messages, params, adapter=adapter):
                if delta.error is not None:
                    raise from_info(delta.error)
                text += delta.text
                out().print(escape(delta.text), end="")
        except KeyboardInterrupt:
            out().print(" [dim](stopped)[/]")
        except TruffulaError as error:
            out().print(f"[red]{escape(error.message)}[/]")
            return
        out().print()
        self._messages = [*messages, {"role": "assistant", "content": text}]
