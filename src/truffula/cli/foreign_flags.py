"""Flags and commands of other servers and their equivalents in truffula, read from ``foreign_flags.toml``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ForeignFlag:
    """One flag of other servers.

    ``equivalent`` is truffula's option. It is empty when there is none; ``note`` then says why. With an equivalent,
    ``note`` is a sentence that explains it, or empty.
    """

    flag: str
    servers: tuple[str, ...]
    equivalent: str
    note: str = ""

    @property
    def message(self) -> str:
        """``--lora-modules is an option of vLLM; in truffula: --adapter NAME=FOLDER (repeat it for several).``"""
        *others, last = self.servers
        owners = f"{', '.join(others)} and {last}" if others else last
        if not self.equivalent:
            return f"{self.flag} is an option of {owners}; {self.note}"
        note = f" {self.note}" if self.note else ""
        return f"{self.flag} is an option of {owners}; in truffula: {self.equivalent}.{note}"


@cache
def known_flags() -> Mapping[str, ForeignFlag]:
    """The table of flags, by flag."""
    return {
        flag: ForeignFlag(flag, tuple(row["servers"]), row.get("use", ""), row.get("note", ""))
        for row in _tables()["flags"]
        for flag in row["flags"]
    }


def known_commands() -> Mapping[str, str]:
    """The table of commands: command → error message."""
    commands: Mapping[str, str] = _tables()["commands"]
    return commands


@cache
def _tables() -> Mapping[str, Any]:
    """The content of ``foreign_flags.toml``. Read only for a flag or a command that is not truffula's."""
    import tomllib

    return tomllib.loads(Path(__file__).with_name("foreign_flags.toml").read_text(encoding="utf-8"))


def foreign_flags(words: Iterable[str], own: Mapping[str, bool]) -> list[ForeignFlag]:
    """The flags among ``words`` that are another server's and not the command's own.

    Args:
        words: The arguments after the command's name.
        own: The command's own flags; the value is whether it takes the next word as its value.
    """
    flags: list[ForeignFlag] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name == "--":
            break
        if name not in own:
            found = _foreign_flag(name, own)
            flags += [found] if found is not None and found not in flags else []
        elif own[name] and not equals:
            next(rest, None)  # the value of the command's own flag
    return flags


def _foreign_flag(name: str, own: Mapping[str, bool]) -> ForeignFlag | None:
    if name.startswith("--"):
        return known_flags().get(name.replace("_", "-"))
    if not name.startswith("-"):
        return None
    short = re.fullmatch(r"(-[a-z])\d+", name)  # -c4096: a short flag with its value
    if short and short[1] not in own:
        return known_flags().get(name) or known_flags().get(short[1])
    return known_flags().get(name)
