"""docs/coming-from.md says of other servers' flags and commands what the command line answers to them."""

from __future__ import annotations

import re

import pytest
from pages import ROOT

from truffula.cli.foreign_flags import known_commands, known_flags

PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
SECTIONS = {
    "LoRAX and TGI": ("LoRAX", "TGI"),
    "vLLM": ("vLLM",),
    "SGLang": ("SGLang",),
    "llama.cpp": ("llama.cpp",),
}


def as_code(text: str) -> str:
    """Options and variables in backticks, where they are not in backticks yet; bars as a table wants them."""
    parts = text.replace("|", r"\|").split("`")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(
            r"(--[a-z][a-z-]*(?: [A-Z]+(?:=[A-Z]+)?\b)?|\b(?:TRUFFULA|HF)_[A-Z_]+)", r"`\1`", parts[index]
        )
    return "`".join(parts)


def capitalised(text: str) -> str:
    return text if text.startswith("truffula") else text[0].upper() + text[1:]


def rows_of(servers: tuple[str, ...]) -> list[str]:
    """One row per answer: the flags that get it, then the answer. A flag of one of two servers says whose it is."""
    flags: dict[str, list[str]] = {}
    for foreign in known_flags().values():
        owners = [server for server in servers if server in foreign.servers]
        if owners:
            answer = ". ".join(part for part in (foreign.equivalent, foreign.note) if part)
            whose = f" ({owners[0]})" if len(owners) < len(servers) else ""
            flags.setdefault(answer, []).append(f"`{foreign.flag}`{whose}")
    return [
        f"| {', '.join(names)} | {as_code(capitalised(answer)).removesuffix('.')} |" for answer, names in flags.items()
    ]


def command_rows() -> list[str]:
    return [f"| `{name}` | {as_code(answer)} |" for name, answer in known_commands().items()]


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"docs/coming-from.md has no section {title}"
    return found[1]


def test_every_server_has_a_section() -> None:
    owners = {server for foreign in known_flags().values() for server in foreign.servers}
    assert owners == {server for servers in SECTIONS.values() for server in servers}


@pytest.mark.parametrize("title", SECTIONS)
def test_the_table_of_flags_is_what_the_command_line_answers(title: str) -> None:
    expected = rows_of(SECTIONS[title])
    found = [line for line in section(title).splitlines() if line.startswith("| `-")]
    assert found == expected, f"Section {title} should have these rows:\n" + "\n".join(expected)


def test_the_table_of_commands_is_what_the_command_line_answers() -> None:
    expected = command_rows()
    found = [line for line in section("Commands").splitlines() if line.startswith("| `")]
    assert found == expected, "Section Commands should have these rows:\n" + "\n".join(expected)
