"""Prints the answers of one batch: side by side on a terminal, one after the other in a pipe; one answer unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from truffula.cli.output import out, visible, write
from truffula.errors import TruffulaError
from truffula.types import TextDelta

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


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


def show(titles: Sequence[str], deltas: Iterable[tuple[int, TextDelta]], *, per_row: int = 3) -> list[Answer]:
    """Print the answers as they are generated, and return them. ``deltas`` yields (index of the title, delta).

    A single answer is printed unchanged and without its title, and always ends with a line feed.
    """
    answers = [Answer(title) for title in titles]
    if len(answers) == 1:
        _stream(answers[0], deltas)
    elif out().is_terminal:
        _columns_while(answers, deltas, min(per_row, len(answers)))
    else:
        for column, delta in deltas:
            answers[column].add(delta)
        write("\n".join(f"--- {answer.title}\n{answer.text.strip()}\n" for answer in answers))
    return answers


def _stream(answer: Answer, deltas: Iterable[tuple[int, TextDelta]]) -> None:
    try:
        for _, delta in deltas:
            answer.add(delta)
            write(delta.text)
    finally:
        if not answer.text.endswith("\n") and (answer.text or answer.finish_reason):
            write("\n")


def _columns_while(answers: Sequence[Answer], deltas: Iterable[tuple[int, TextDelta]], per_row: int) -> None:
    from rich.live import Live

    with Live(console=out(), refresh_per_second=12) as live:
        for column, delta in deltas:
            answers[column].add(delta)
            live.update(_columns(answers, per_row))


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
