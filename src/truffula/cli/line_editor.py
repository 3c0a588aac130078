"""Reads user input: with line editing, history and completion from a terminal, line by line from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from truffula.cli.output import note
from truffula.errors import ConfigError

MOST_ENTRIES = 1000
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


def read_text(read: Callable[[], str]) -> str:
    """The text that ``read`` returns from standard input. Raises ``ConfigError`` when it is not UTF-8."""
    try:
        text = read()
        text.encode()  # in some locales Python decodes invalid bytes to lone surrogates
    except UnicodeError as error:
        raise ConfigError(f"Standard input is not UTF-8 text: {error}.", param="prompt") from error
    return text


class LineEditor:
    """Reads one line at a time.

    Args:
        history: readline's file of earlier lines, readable by its owner only. If it cannot be used, a note says so.
        complete: Returns completions: (the line up to the cursor, the word at the cursor) → words.

    Without Python's ``readline`` module, lines are read without editing.
    """

    def __init__(self, history: Path, complete: Callable[[str, str], list[str]]) -> None:
        self.interactive = sys.stdin.isatty()
        self._edit = self.interactive and sys.stdout.isatty()
        self._history: Path | None = history
        self._complete = complete
        self._completions: list[str] = []
        self._readline: ModuleType | None = None
        with contextlib.suppress(ImportError):  # Python was built without it
            import readline

            self._readline = readline if self._edit else None
        self._is_libedit = "libedit" in (getattr(self._readline, "__doc__", None) or "")
        self._entries = 0  # of the history that are in the file
        if self._readline is not None:
            self._set_up(self._readline)

    def read(self, prompt: str) -> str:
        """The next line, without its end. Raises ``EOFError``, ``KeyboardInterrupt``, and ``ConfigError`` for bytes
        that are not text."""
        if self._edit:
            line = read_text(lambda: input(self._shown(prompt)))
            self._save()
            return line
        if self.interactive:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = read_text(sys.stdin.readline)
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _shown(self, prompt: str) -> str:
        """The prompt in bold, with GNU readline's marks around characters of no width."""
        if self._readline is None or self._is_libedit:
            return prompt
        return f"\x01{BOLD}\x02{prompt}\x01{PLAIN}\x02"

    def _set_up(self, readline: ModuleType) -> None:
        readline.set_completer_delims(" ")
        readline.set_completer(self._completed)
        if self._is_libedit:
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one message
        self._load_history(readline)

    def _completed(self, word: str, state: int) -> str | None:
        assert self._readline is not None
        if state == 0:
            self._completions = self._complete(self._readline.get_line_buffer()[: self._readline.get_endidx()], word)
        return self._completions[state] if state < len(self._completions) else None

    def _load_history(self, readline: ModuleType) -> None:
        with self._history_errors():
            if self._history is not None and self._history.exists():
                readline.read_history_file(self._history)
        readline.set_history_length(MOST_ENTRIES)
        self._entries = readline.get_current_history_length()

    def _save(self) -> None:
        """Write the last line to the file, if readline has it in its history: not when it is empty or a repetition."""
        readline = self._readline
        if readline is None or self._history is None or readline.get_current_history_length() <= self._entries:
            return
        self._entries = readline.get_current_history_length()
        with self._history_errors():
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._history.touch(mode=0o600)
            if self._is_libedit:
                readline.write_history_file(self._history)
            else:
                readline.append_history_file(1, self._history)

    @contextlib.contextmanager
    def _history_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            note(f"The history {self._history} cannot be used: {error}")
            self._history = None
