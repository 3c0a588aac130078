"""Command-line options made from the rows of ``config.py``, so that a flag, a variable and a message can't drift
apart."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from truffula.config import OPTIONS, Option, Resolved, load_config

Command = Callable[..., None]
LOADING = ("model", "generation_defaults")


def _annotation(option: Option) -> Any:
    shown = "" if option.required else option.show(option.default)
    help_text = (
        f"{option.help} [dim]\\[{shown}; {option.env}][/]"
        if shown not in ("", "-")
        else f"{option.help} [dim]\\[{option.env}][/]"
    )
    panel = "Engine" if option.group == "engine" else "Server"
    metavar = "|".join(option.choices) if option.choices else option.kind.upper()
    if option.kind == "switch":
        pair = f"{option.flag}/--no-{option.flag.removeprefix('--')}"
        return Annotated[bool | None, typer.Option(pair, help=help_text, rich_help_panel=panel, show_default=False)]
    kind = list[str] | None if option.kind in ("list", "paths", "mapping") else str | None
    return Annotated[
        kind, typer.Option(option.flag, help=help_text, metavar=metavar, rich_help_panel=panel, show_default=False)
    ]


def with_options(
    *groups: str, leave_out: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> Callable[[Command], Command]:
    """Give a command the options of ``groups``; it receives them as one dict, its keyword ``options``.

    What a command takes itself (its model argument, say) is left out by name; ``only``, where given, names those that
    it takes.
    """
    rows = [o for o in OPTIONS.values() if o.group in groups and o.name not in ("model", *leave_out)]
    rows = [o for o in rows if not only or o.name in only]

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.name != "options"]
        made = [
            inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(o))
            for o in rows
        ]

        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            options = {o.name: kwargs.pop(o.name) for o in rows}
            command(
                *args, **kwargs, options={name: value for name, value in options.items() if value not in (None, [])}
            )

        del run.__wrapped__  # typer must see the made signature, not the original
        run.__signature__ = inspect.Signature([*kept, *made])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*kept, *made)}
        return run

    return decorate


def resolve(options: dict[str, Any], **more: Any) -> Resolved:
    """``load_config`` of what the command line gave; lists of name=source become one mapping."""
    given = {**options, **{name: value for name, value in more.items() if value is not None}}
    for name, value in given.items():
        option = OPTIONS.get(name)
        if option is not None and option.kind == "mapping" and isinstance(value, list):
            given[name] = ",".join(value)
    return load_config(given)
