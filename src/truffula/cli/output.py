"""Output of the commands: consoles, errors, tables and progress bars."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from truffula.errors import TruffulaError
from truffula.option import format_size

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType
    from rich.progress import Progress as Bars
    from rich.progress import Task, TaskID

    from truffula.types import Progress


# Model output may contain escape sequences, which control the terminal. Line feeds and tabs are kept.
CONTROL = MappingProxyType(
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    | dict.fromkeys(range(0x7F, 0xA0), "\ufffd")
)


def out() -> Console:
    """The console for answers, on stdout. Colour and line breaks only on a terminal."""
    return _console(stderr=False, width=200)


def err() -> Console:
    """The console for progress and errors, on stderr. Line breaks within a message only on a terminal."""
    return _console(stderr=True)


class PlainConsole(Console):
    """A console without markup. A terminal is sent a visible symbol for each control character in names and texts."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            unchanged = segment.control or not self.is_terminal
            yield segment if unchanged else Segment(visible(segment.text), segment.style)


def _console(*, stderr: bool, width: int | None = None) -> Console:
    """``width`` is that of a console that is no terminal."""
    console = PlainConsole(stderr=stderr)
    return console if console.is_terminal else PlainConsole(stderr=stderr, soft_wrap=True, width=width)


def fail(error: TruffulaError) -> None:
    """Print an error with its code, as one paragraph."""
    print_error(error.code, error.message)


def print_error(code: str, text: str) -> None:
    """Print an error as one paragraph; ``code`` is ``usage`` for one about the command line."""
    err().print(Text.assemble(("error", "bold red"), " ", (f"({code})", "dim"), f" {text}"))


def note(text: str) -> None:
    """Print a line on stderr, so that stdout holds only the answers."""
    err().print(text, style="dim")


def write(text: str) -> None:
    """Write a part of an answer to stdout, unchanged; on a terminal, control characters are made visible."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def visible(text: str) -> str:
    """``text`` with a visible symbol for each control character except line feed and tab."""
    return text.translate(CONTROL)


def warn(text: str) -> None:
    err().print(Text.assemble(("warning", "yellow"), f" {text}"))


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
        console.print(line.rstrip())


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
    from rich.progress import BarColumn, DownloadColumn, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

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

    name = TextColumn("{task.description}", markup=False)
    sized = (OfKnownSize(column) for column in (BarColumn(), DownloadColumn(binary_units=True), Speed()))
    return Bars(name, *sized, TimeElapsedColumn(), console=console, transient=True)


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
