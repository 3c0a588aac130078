"""Output of the commands: consoles, errors, tables and progress bars."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from truffula.errors import TruffulaError
from truffula.option import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as Bars
    from rich.progress import Task, TaskID

    from truffula.types import Progress


# Model output may contain escape sequences, which control the terminal. Line feeds and tabs are kept.
CONTROL = MappingProxyType(
    {chr(code): chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | {chr(code): "\ufffd" for code in range(0x7F, 0xA0)}
)


def out() -> Console:
    """The console for answers, on stdout. Colour and line breaks only on a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=200)


def err() -> Console:
    """The console for progress and errors, on stderr. Line breaks within a message only on a terminal."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, soft_wrap=True)


def fail(error: TruffulaError) -> None:
    """Print an error with its code, as one paragraph."""
    err().print(f"[bold red]error[/] [dim]({error.code})[/] {escape(error.message)}")


def fail_usage(text: str) -> None:
    """Print an error about the command line, as one paragraph."""
    err().print(f"[bold red]error[/] [dim](usage)[/] {escape(text)}")


def note(text: str) -> None:
    """Print a line on stderr, so that stdout holds only the answers."""
    err().print(f"[dim]{escape(text)}[/]", emoji=False)


def write(text: str) -> None:
    """Write a part of an answer to stdout, unchanged; on a terminal, control characters are made visible."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def visible(text: str) -> str:
    """``text`` with a visible symbol for each control character except line feed and tab."""
    return "".join(CONTROL.get(ch, ch) for ch in text)


def warn(text: str) -> None:
    err().print(f"[yellow]warning[/] {escape(text)}")


def table(*columns: str, title: str | None = None) -> Table:
    """A table without boxes; a leading '>' in a column's name right-aligns it."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.lstrip(">"), justify="right" if right else "left", header_style="dim", overflow="fold")
    return made


def print_table(console: Console, shown: Table) -> None:
    """Print ``shown``; in a pipe, without trailing spaces."""
    if console.is_terminal:
        console.print(shown)
        return
    with console.capture() as captured:
        console.print(shown)
    for line in captured.get().splitlines():
        console.print(line.rstrip(), markup=False)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A callback ``(stage, done, total)``, in bytes. It shows a bar on a terminal, otherwise a line with the size when
    a stage begins and a line with the time when it is done.
    """
    console = err()
    if not console.is_terminal:
        yield _plain_progress(console)
        return
    with _bars(console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                for task in bars.tasks:  # of earlier stages: a bar without a total looks as if it were still running
                    bars.update(task.id, visible=task.finished)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _bars(console: Console) -> Bars:
    """Progress bars that are removed at the end. A stage of unknown size shows its name and time, without a bar."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class OfKnownSize(ProgressColumn):
        def __init__(self, column: ProgressColumn) -> None:
            super().__init__()
            self._column = column

        def render(self, task: Task) -> RenderableType:
            return Text() if task.total is None else self._column.render(task)

    class Speed(ProgressColumn):
        def render(self, task: Task) -> RenderableType:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{format_size(int(speed))}/s", style="progress.data.speed")

    columns = (BarColumn(), DownloadColumn(binary_units=True), Speed())
    sized = (OfKnownSize(column) for column in columns)
    return Bars(TextColumn("{task.description}"), *sized, TimeElapsedColumn(), console=console, transient=True)


def _plain_progress(console: Console) -> Progress:
    begun: dict[str, float] = {}

    def report(what: str, done: int, total: int | None) -> None:
        if what not in begun:
            begun[what] = time.monotonic()
            console.print(f"{what} ({format_size(total)}) ..." if total else f"{what} ...")
        if total and done >= total and begun[what] > 0:
            console.print(f"{what}: {format_size(done)} in {time.monotonic() - begun[what]:.1f} s")
            begun[what] = -1.0

    return report
