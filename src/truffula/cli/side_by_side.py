"""Several answers from one batch, streamed side by side in a terminal, one after the other where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from truffula.cli.output import out
from truffula.errors import from_info
from truffula.types import TextDelta

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclass
class Answer:
    """One column: whose it is, and the text so far."""

    title: str
    text: str = ""
    tokens: int = 0
    done: bool = field(default=False)

    def add(self, delta: TextDelta) -> None:
        if delta.error is not None:
            raise from_info(delta.error)
        self.text += delta.text
        self.tokens += len(delta.tokens)
        self.done = self.done or delta.finish_reason is not None


def show(
    titles: Sequence[str],
    deltas: Iterable[tuple[int, TextDelta]],
    *,
    per_row: int = 3,
    console: Console | None = None,
) -> list[Answer]:
    """Print the answers while they come; returns them. ``deltas`` yields (position of the title, delta)."""
    console = console or out()
    answers = [Answer(title) for title in titles]
    if not console.is_terminal:
        for column, delta in deltas:
            answers[column].add(delta)
        for answer in answers:
            console.print(f"\n--- {escape(answer.title)}\n{escape(answer.text.strip())}")
        return answers
    if len(answers) == 1:
        for _, delta in deltas:
            answers[0].add(delta)
            console.print(escape(delta.text), end="")
        console.print()
        return answers
    from rich.live import Live

    with Live(console=console, refresh_per_second=12) as live:
        for column, delta in deltas:
            answers[column].add(delta)
            live.update(_columns(answers, min(per_row, len(answers))))
    return answers


def _columns(answers: Sequence[Answer], per_row: int) -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in range(per_row):
        grid.add_column(ratio=1)
    panels = [
        Panel(
            escape(answer.text.strip()) + ("" if answer.done else " ▌"),
            title=escape(answer.title),
            border_style=COLOURS[position % len(COLOURS)],
        )
        for position, answer in enumerate(answers)
    ]
    for start in range(0, len(panels), per_row):
        grid.add_row(*panels[start : start + per_row])
    return grid
