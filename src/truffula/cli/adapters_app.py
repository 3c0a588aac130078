"""The commands ``truffula adapters …``: a client of a running server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from truffula.cli.help import App
from truffula.cli.options import ApiKey, AsJson, Port, Url

app = App(
    help="List and change the adapters of a running server.\n\n"
    "NAME is an adapter, one version of it (NAME@VERSION), or an alias. All but `list` and `show` need a server that "
    "runs with --adapter-admin, and a key that may administer it."
)
LOOK, CHANGE, ALIASES = "Look", "Change", "Aliases"
Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter that `truffula adapters list` shows.")]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Its folder, on the server's disk, or a Hub id.")]


def _server(url: str | None, port: int | None, api_key: str | None) -> Any:
    from truffula.cli.server_client import ServerClient

    return ServerClient(url, port, api_key)


def _change(server: Any, method: str, path: str, body: dict[str, Any] | None, done: str, *, as_json: bool) -> None:
    from truffula.cli.server_state import changed

    with server:
        changed(server, method, path, body, done, as_json=as_json)


@app.command("list", rich_help_panel=LOOK)
def adapters_list(
    prefix: Annotated[str, typer.Option("--prefix", metavar="TEXT", help="Only names that begin so.")] = "",
    status: Annotated[
        str, typer.Option("--status", metavar="STATUS", help="Only those with this status, such as resident or failed.")
    ] = "",
    kind: Annotated[str, typer.Option("--kind", metavar="KIND", help="Only those with parts of this kind.")] = "",
    source: Annotated[
        str, typer.Option("--source", metavar="SOURCE", help="Only those from this kind of source, such as hub.")
    ] = "",
    url: Url = None,
    port: Port = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List the base model and the adapters of a server: status, rank, size, source and base."""
    from truffula.cli.server_state import list_adapters

    given = {"prefix": prefix, "status": status, "kind": kind, "source": source}
    with _server(url, port, api_key) as server:
        list_adapters(server, {name: value for name, value in given.items() if value}, as_json=as_json)


@app.command("show", rich_help_panel=LOOK)
def adapters_show(
    name: Name, url: Url = None, port: Port = None, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Show one adapter: its generation, versions, aliases and the error of its last load."""
    from truffula.cli.server_state import show_adapter

    with _server(url, port, api_key) as server:
        show_adapter(server, name, as_json=as_json)


@app.command("load", rich_help_panel=CHANGE)
def adapters_load(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the adapter in requests, with @VERSION for a version.")
    ],
    path: Folder,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace an adapter of the same name and version.")
    ] = False,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it in memory until it is unpinned or unloaded.")] = False,
    url: Url = None,
    port: Port = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Register the adapter in FOLDER as NAME, and load it.

    With several versions, NAME means the one that was registered last.
    """
    from truffula.cli.server_client import server_path

    base, at, version = name.partition("@")
    one: dict[str, Any] = {"name": base, "source": server_path(path), "pinned": pin}
    body = {"adapters": [one | ({"version": version} if at else {})], "load": True, "replace": replace}
    done = f"{name} is loaded."
    _change(_server(url, port, api_key), "POST", "/v1/adapters", body, done, as_json=as_json)


@app.command("reload", rich_help_panel=CHANGE)
def adapters_reload(
    name: Name,
    path: Annotated[
        str | None, typer.Argument(metavar="FOLDER", help="Another folder, or Hub id, for it from now on.")
    ] = None,
    expect: Annotated[
        str | None,
        typer.Option("--expect", metavar="GENERATION", help="Only if this is its generation, as `show` prints it."),
    ] = None,
    url: Url = None,
    port: Port = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Read NAME again, from its folder or another one. Running requests keep the former generation.

    If the new one cannot be loaded, or --expect is not its generation, nothing changes and the status is 1.
    """
    from truffula.cli.server_client import server_path

    body = {"source": None if path is None else server_path(path), "expected_generation": expect}
    _act(name, "reload", body, f"{name} is reloaded.", (url, port, api_key), as_json=as_json)


@app.command("pin", rich_help_panel=CHANGE)
def adapters_pin(
    name: Name, url: Url = None, port: Port = None, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Load NAME and keep it in memory, also after a restart of a server with --state-dir."""
    _act(name, "pin", None, f"{name} is pinned.", (url, port, api_key), as_json=as_json)


@app.command("unpin", rich_help_panel=CHANGE)
def adapters_unpin(
    name: Name, url: Url = None, port: Port = None, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """End a pin: NAME leaves memory when its bytes are needed."""
    _act(name, "unpin", None, f"{name} is no longer pinned.", (url, port, api_key), as_json=as_json)


def _act(
    name: str,
    action: str,
    body: dict[str, Any] | None,
    done: str,
    where: tuple[str | None, int | None, str | None],
    *,
    as_json: bool,
) -> None:
    from truffula.cli.server_client import adapter_path

    _change(_server(*where), "POST", f"{adapter_path(name)}/{action}", body, done, as_json=as_json)


@app.command("unload", rich_help_panel=CHANGE)
def adapters_unload(name: Name, url: Url = None, port: Port = None, api_key: ApiKey = None) -> None:
    """Unload the adapter NAME and remove the name; requests that use it finish normally."""
    from truffula.cli.output import out

    with _server(url, port, api_key) as server:
        out().print(server.unload_adapter(name))


@app.command("aliases", rich_help_panel=ALIASES)
def adapters_aliases(url: Url = None, port: Port = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the aliases with their targets, weights and shadows."""
    from truffula.cli.server_state import list_aliases

    with _server(url, port, api_key) as server:
        list_aliases(server, as_json=as_json)


AliasName = Annotated[
    str, typer.Argument(metavar="ALIAS", help="Another name, or an adapter's own, which then means what this says.")
]


@app.command("alias", rich_help_panel=ALIASES)
def adapters_alias(
    alias: AliasName,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="An adapter, or one version of it.")],
    url: Url = None,
    port: Port = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Let ALIAS mean TARGET, such as support@7. An alias of that name is replaced."""
    from truffula.cli.server_client import alias_path

    done = f"{alias} means {target}."
    _change(_server(url, port, api_key), "PUT", alias_path(alias), {"target": target}, done, as_json=as_json)


@app.command("split", rich_help_panel=ALIASES)
def adapters_split(
    alias: AliasName,
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET=WEIGHT", help="An adapter, or one version of it, and its share.")
    ],
    shadow: Annotated[
        str | None,
        typer.Option("--shadow", metavar="TARGET", help="Also send requests to this one and discard its answers."),
    ] = None,
    shadow_percent: Annotated[
        float | None, typer.Option("--shadow-percent", metavar="P", help="Only this part of the requests.")
    ] = None,
    url: Url = None,
    port: Port = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Let ALIAS mean several adapters, by weights: `split support support@7=90 support@8=10`.

    Requests with the same header x-truffula-split-key get the same target; the response's header x-truffula-adapter
    says which.
    """
    from truffula.cli.server_client import alias_path, weights_of

    body = {"targets": weights_of(targets), "shadow": shadow, "shadow_percent": shadow_percent}
    done = f"{alias} means {', '.join(targets)}."
    _change(_server(url, port, api_key), "PUT", alias_path(alias), body, done, as_json=as_json)


@app.command("unalias", rich_help_panel=ALIASES)
def adapters_unalias(
    alias: AliasName, url: Url = None, port: Port = None, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Delete ALIAS; the adapters that it means stay."""
    from truffula.cli.server_client import alias_path

    done = f"{alias} is deleted."
    _change(_server(url, port, api_key), "DELETE", alias_path(alias), None, done, as_json=as_json)
