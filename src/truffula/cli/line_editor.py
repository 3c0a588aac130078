"""Reads user input: with line editing, history and completion from a terminal, line by line from a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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
        history: A file of earlier lines, one JSON string each, readable by its owner only; None: no history.
        complete: Returns completions: (the line up to the cursor, the word at the cursor) → words.
        warn: Called with the error when the history cannot be read or written; it is not used from then on.

    Without Python's ``readline`` module, lines are read without editing.
    """

    def __init__(
        self,
        history: Path | None,
        complete: Callable[[str, str], list[str]],
        warn: Callable[[str], None],
    ) -> None:
        self.interactive = sys.stdin.isatty()
        self._edit = self.interactive and sys.stdout.isatty()
        self._history = history
        self._warn = warn
        self._complete = complete
        self._completions: list[str] = []
        self._readline = _readline() if self._edit else None
        if self._readline is not None:
            self._set_up(self._readline)

    def read(self, prompt: str) -> str:
        """The next line, without its end. Raises ``EOFError``, ``KeyboardInterrupt``, and ``ConfigError`` for bytes
        that are not text."""
        if self._edit:
            line = read_text(lambda: input(self._shown(prompt)))
            self._add_to_history(line)
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
        if self._readline is None or _is_libedit(self._readline):
            return prompt
        return f"\x01{BOLD}\x02{prompt}\x01{PLAIN}\x02"

    def _set_up(self, readline: ModuleType) -> None:
        readline.set_auto_history(False)
        readline.set_completer_delims(" ")
        readline.set_completer(self._completed)
        if _is_libedit(readline):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one message
        for line in self._read_history():
            readline.add_history(line)

    def _completed(self, word: str, state: int) -> str | None:
        assert self._readline is not None
        if state == 0:
            self._completions = self._complete(self._readline.get_line_buffer()[: self._readline.get_endidx()], word)
        return self._completions[state] if state < len(self._completions) else None

    def _read_history(self) -> list[str]:
        """The last ``MOST_ENTRIES`` lines of the history file, which is truncated when it has twice as many."""
        if self._history is None or not self._history.exists():
            return []
        try:
            written = self._history.read_text(encoding="utf-8").splitlines()
            entries = [entry for line in written if isinstance(entry := json.loads(line), str)]
            if len(written) > 2 * MOST_ENTRIES:
                self._write(entries[-MOST_ENTRIES:], os.O_TRUNC)
            return entries[-MOST_ENTRIES:]
        except (OSError, ValueError) as error:
            self._disable_history(error)
            return []

    def _add_to_history(self, line: str) -> None:
        readline = self._readline
        if readline is None or not line.strip():
            return
        count = readline.get_current_history_length()
        if count and readline.get_history_item(count) == line:
            return
        readline.add_history(line)
        if self._history is None:
            return
        try:
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write([line], os.O_APPEND)
        except OSError as error:
            self._disable_history(error)

    def _write(self, lines: list[str], mode: int) -> None:
        assert self._history is not None
        handle = os.open(self._history, os.O_WRONLY | os.O_CREAT | mode, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)

    def _disable_history(self, error: Exception) -> None:
        self._warn(f"The history {self._history} cannot be used: {error}")
        self._history = None


def _readline() -> ModuleType | None:
    with contextlib.suppress(ImportError):  # Python was built without it
        import readline

        return readline
    return None


def _is_libedit(readline: ModuleType) -> bool:
    return "libedit" in (readline.__doc__ or "")
