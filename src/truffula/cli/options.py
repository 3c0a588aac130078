"""Command-line options made from the options of ``config.py``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from truffula.cli.help import GLUE
from truffula.config import OPTIONS
from truffula.option import Option
from truffula.settings import CONFIG_VARIABLE, Resolved, load_config, require_paths

Command = Callable[..., None]
TOPICS = (*dict.fromkeys(o.topic for o in OPTIONS.values() if o.topic != "Advanced"), "Advanced")
"""The sections of the help, in order."""
FIRST = ("host", "port", "adapters", "adapter_dir", "api_keys")
"""The most used options, at the top of their section."""
MODEL_HELP = "A folder, a .gguf file, an alias that `truffula list` shows, or a Hugging Face id."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
ModelOrVariable = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} [env:{GLUE}{OPTIONS['model'].env}]", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help=f"Address of the server. [default:{GLUE}http://127.0.0.1:8000]"),
]
Port = Annotated[int | None, typer.Option("--port", metavar="PORT", help="Port of a server on this machine.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", metavar="KEY", help="API key of the server. [default: the first of TRUFFULA_API_KEYS]"),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Read options from a TOML, YAML or JSON file; flags and variables win over it. "
        f"[env:{GLUE}{CONFIG_VARIABLE}]",
        rich_help_panel="Common",
        show_default=False,
    ),
]


def explain(option: Option) -> str:
    """The help of one option: a sentence, its default and its variable."""
    text = option.help[:1].upper() + option.help[1:]
    if option.repeatable:
        text += "; repeat for several"
    default = option.unset or ("" if option.secret or option.required else option.show(option.default))
    if default not in ("", "-"):
        text += f" [default: {default}]" if option.unset else f" [default:{GLUE}{default}]"
    several = ", separated by commas" if option.repeatable else ""
    return f"{text} [env:{GLUE}{option.env}{several}]"


def _annotation(option: Option) -> Any:
    settings: dict[str, Any] = {"help": explain(option), "rich_help_panel": option.topic, "show_default": False}
    names = [name for name in (option.short, option.flag) if name]
    if option.kind == "switch":
        pair = f"{option.flag}/--no-{option.flag.removeprefix('--')}"
        return Annotated[bool | None, typer.Option(pair, **settings)]
    kind = list[str] | None if option.repeatable else str | None
    return Annotated[kind, typer.Option(*names, metavar=option.placeholder, **settings)]


def place(option: Option) -> tuple[int, int]:
    """The sort key of an option in the help: its topic, then the most used first."""
    first = FIRST.index(option.name) if option.name in FIRST else len(FIRST)
    return TOPICS.index(option.topic), first


def with_options(*groups: str, only: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Give a command ``--config`` and the options of ``groups``; it receives them as one dict, its keyword ``options``.

    ``only``, if given, names the options to include.
    """
    rows = [o for o in OPTIONS.values() if o.group in groups and o.name != "model" and o.name in (only or OPTIONS)]
    annotations = {o.name: _annotation(o) for o in rows} | {"config": ConfigFile}
    ordered = sorted(annotations, key=lambda name: place(OPTIONS[name]) if name in OPTIONS else (0, len(FIRST)))

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.name != "options"]
        made = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotations[name])
            for name in ordered
        ]

        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            given = {name: kwargs.pop(name) for name in ordered}
            options = {name: value for name, value in given.items() if value not in (None, [])}
            command(*args, **kwargs, options=options)

        del run.__wrapped__  # typer must use the new signature, not the original
        run.__signature__ = inspect.Signature([*kept, *made])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*kept, *made)}
        return run

    return decorate


def resolve(options: dict[str, Any], **more: Any) -> Resolved:
    """``load_config`` of the command line's options, with the engine's paths checked; ``serve`` checks the server's."""
    resolved = load_config({**options, **{name: value for name, value in more.items() if value is not None}})
    require_paths(setting for setting in resolved.settings if setting.option.group == "engine")
    return resolved
