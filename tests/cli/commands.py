"""Every command of the program, from the program itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import typer.main

from truffula.cli.app import app


@cache
def every_command() -> tuple[tuple[tuple[str, ...], Any], ...]:
    """(words after ``truffula``, the command) of the root, the groups and all commands: slow to make, so made once."""
    return tuple(_below(typer.main.get_command(app), ()))


def _below(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from _below(command, (*path, name))


def flags_of(*path: str) -> set[str]:
    """The flags of one command, as its parser knows them."""
    command = dict(every_command())[path]
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts) if name.startswith("-")}
