"""Parsing and help of the commands.

Help is plain text that fits the terminal. A flag of another server is an error that names truffula's equivalent.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from truffula.cli.foreign_flags import foreign_flags, known_commands
from truffula.errors import did_you_mean, nearest

# Newer versions of typer contain click, older ones depend on it, so click's classes are found through typer's.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
ClickException: type[Exception] = UsageError.__bases__[0]

HELP_NAMES = {"help_option_names": ["-h", "--help"]}
NARROWEST, WIDEST = 40, 100
"""Bounds of the width of help, in columns."""
COLUMN = 28
"""The column of the descriptions."""
GLUE = "\u00a0"
"""A no-break space for help text."""
PLACEHOLDERS = {str: "TEXT", int: "N", float: "NUMBER"}
"""Placeholders for options without a metavar, by the type of the default."""


Function = TypeVar("Function", bound=Callable[..., Any])


class App(typer.Typer):
    """A typer application with ``Command`` and ``Group`` as its classes."""

    def __init__(self, **settings: Any) -> None:
        settings = {"cls": Group, "context_settings": HELP_NAMES, "rich_markup_mode": None, **settings}
        super().__init__(pretty_exceptions_enable=False, **settings)

    def command(self, *args: Any, **settings: Any) -> Callable[[Function], Function]:
        """As typer's, with ``Command`` as the class."""
        return super().command(*args, **{"cls": Command, **settings})


class Command(TyperCommand):
    """One command. A flag of another server is an error that names truffula's equivalent."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options: list[Any] = [param for param in self.params if _is_option(param)]
        own = {name: not option.is_flag for option in options for name in _names(option)}
        own |= dict.fromkeys(HELP_NAMES["help_option_names"], False)
        _refuse_foreign(args, own, ctx)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_help(self, ctx))


class Group(TyperGroup):
    """A group of commands. Without a command it prints its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit()
        own = {name for param in self.params if _is_option(param) for name in _names(param)}
        common = dict.fromkeys(HELP_NAMES["help_option_names"], False)
        if args and args[0] not in own and foreign_flags(args[:1], common):  # the flags of a server without commands
            _refuse_foreign(args, common, ctx)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if word not in self.commands and not word.startswith("-") and not ctx.resilient_parsing:
            if ctx.parent is None and word in known_commands():
                raise UsageError(known_commands()[word], ctx)
            raise UsageError(f"Unknown command {word}.{did_you_mean(nearest(word, self.commands))}", ctx)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_help(self, ctx))


def _refuse_foreign(args: list[str], own: Mapping[str, bool], ctx: Any) -> None:
    """Raise ``UsageError`` for flags of other servers, unless the command line is only completed."""
    found = foreign_flags(args, own)
    if found and not ctx.resilient_parsing:
        raise UsageError(" ".join(flag.message for flag in found), ctx)


def usage_message(error: Any) -> str:
    """A usage error in one paragraph, with a reference to the command's help."""
    context = getattr(error, "ctx", None)
    if hasattr(error, "possibilities"):
        text = f"Unknown option {error.option_name}.{did_you_mean(next(iter(error.possibilities or ()), None))}"
    else:
        text = " ".join(error.format_message().split())
    text = text if text.endswith((".", "?")) else f"{text}."
    return text if context is None else f"{text} See `{context.command_path} --help`."


def _help(command: Command | Group, ctx: Any) -> str:
    """The help of a command, or of a group with its commands."""
    width = max(NARROWEST, min(ctx.terminal_width or shutil.get_terminal_size().columns, WIDEST) - 1)
    arguments = [param for param in command.params if not _is_option(param)]
    if isinstance(command, Group):
        usage = "COMMAND [OPTIONS]"
        epilog = f"`{ctx.command_path} COMMAND --help` shows the options of a command."
    else:
        names = [_placeholder(a) if a.required else f"[{_placeholder(a)}]" for a in arguments]
        usage, epilog = " ".join(["[OPTIONS]", *names]), command.epilog or ""
    lines = _wrapped(f"Usage: {ctx.command_path} {usage}", width)
    for paragraph in (command.help or "").split("\n\n"):
        lines += ["", *_wrapped(paragraph, width)]
    if arguments:
        lines += _section("Arguments", ((_placeholder(a), _description(a)) for a in arguments), width)
    if isinstance(command, Group):
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, one in command.commands.items():
            if not one.hidden:
                panels.setdefault(_panel(one, "Commands"), []).append((name, _first_sentence(one)))
        for title, rows in panels.items():
            lines += _section(title, rows, width, column=14)
    for title, options in _by_panel(command, ctx).items():
        lines += _section(title, ((_names_and_placeholder(o), _description(o)) for o in options), width)
    if epilog:
        lines += ["", *_wrapped(epilog, width)]
    return "\n".join(lines) + "\n"


def _first_sentence(command: Any) -> str:
    text = " ".join((command.help or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def _by_panel(command: Any, ctx: Any) -> dict[str, list[Any]]:
    """The visible options by the title of their section, the command's own options first."""
    panels: dict[str, list[Any]] = {"Options": []}
    for option in command.get_params(ctx):
        if _is_option(option) and not option.hidden:
            panels.setdefault(_panel(option, "Options"), []).append(option)
    if len(panels["Options"]) == 1:  # only --help: show it last
        panels["Options"] = panels.pop("Options")
    return {title: options for title, options in panels.items() if options}


def _panel(shown: Any, otherwise: str) -> str:
    """The section of a command or an option; typer stores a placeholder when none was given."""
    panel = getattr(shown, "rich_help_panel", None)
    return panel if isinstance(panel, str) else otherwise


def _section(title: str, rows: Iterable[tuple[str, str]], width: int, column: int = COLUMN) -> list[str]:
    """A heading and its rows: the name and, in the next column or below a long name, its description."""
    lines = ["", f"{title}:"]
    for left, text in rows:
        description = _wrapped(text, width - column) or [""]
        if len(left) + 4 > column:
            lines.append(f"  {left}")
        else:
            lines.append(f"  {left:<{column - 2}}{description.pop(0)}".rstrip())
        lines += [" " * column + line for line in description]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(_joined(text), width, break_on_hyphens=False, break_long_words=False)
    return [line.replace(GLUE, " ") for line in lines]


def _joined(text: str) -> str:
    """``text`` on one line, with its ``GLUE``."""
    return re.sub(r"[ \n]+", " ", text).strip()


def _is_option(param: Any) -> bool:
    return bool(param.param_type_name == "option")


def _names(option: Any) -> list[str]:
    return [*option.opts, *option.secondary_opts]


def _placeholder(param: Any) -> str:
    if param.metavar:
        return str(param.metavar)
    if not _is_option(param):
        return str(param.name).upper()
    return PLACEHOLDERS.get(type(param.default), "VALUE")


def _names_and_placeholder(option: Any) -> str:
    """``-a, --adapter NAME=FOLDER``, short names first."""
    names = ", ".join(sorted(_names(option), key=lambda name: (name.startswith("--"), name.startswith("--no-"))))
    return names if option.is_flag else f"{names} {_placeholder(option)}"


def _description(param: Any) -> str:
    """The help of a parameter, with its default."""
    text = _joined(param.help or "")
    default = param.default
    if param.show_default is not False and isinstance(default, str | int | float) and not isinstance(default, bool):
        text = f"{text} [default:{GLUE}{default}]".lstrip()
    return text


def help_of(ctx: Any, words: list[str]) -> str:
    """The help of the command that ``words`` name, starting at the root of ``ctx``.

    Raises ``UsageError`` for a command that does not exist.
    """
    context = ctx.find_root()
    for word in words:
        group = context.command
        if not isinstance(group, Group):
            raise UsageError(f"{context.command_path} has no commands.", context)
        name, command, _ = group.resolve_command(context, [word])
        context = type(context)(command, info_name=name, parent=context)
    return str(context.get_help())
