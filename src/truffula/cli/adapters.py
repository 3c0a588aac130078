"""``truffula adapters``: lists, loads and unloads the adapters of a running server."""

from __future__ import annotations

import json
from typing import Any

from rich.markup import escape

from truffula.cli.chat_models import administer, load_on
from truffula.cli.output import note, out, table
from truffula.cli.server_client import ServerClient
from truffula.errors import TruffulaError
from truffula.option import format_size

ROUTE = "/v1/adapters"


def list_adapters(server: ServerClient, *, as_json: bool) -> None:
    """Print the base model and the adapters, one per line."""
    models = server.models()
    try:
        details = {row["id"]: row for row in server.call("GET", ROUTE)["data"]}
    except TruffulaError as error:
        if error.code not in ("not_found", "http_404"):
            raise
        details = {}  # the server is not truffula
    rows = [{**model, **details.get(model["id"], {})} for model in models]
    if as_json:
        out().print_json(json.dumps(rows))
        return
    shown = table("name", "status", ">rank", ">memory", "source", "base")
    for row in rows:
        shown.add_row(*map(escape, (row["id"], *_cells(row), row.get("parent") or "")))
    out().print(shown)
    if details and not any(row.get("source") for row in details.values()):
        note("Sources are shown by servers that run with --adapter-admin.")
    for row in rows:
        if row.get("error"):
            note(f"{row['id']}: {row['error']}")


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """The cells for status, rank, size and source; the base model has only a source."""
    if not row.get("parent"):
        return "base", "", "", str(row.get("root") or "")
    size = row.get("size_bytes")
    return (
        str(row.get("status") or "-"),
        str(row.get("rank") or "-"),
        format_size(size) if size else "-",
        str(row.get("source") or "-"),
    )


def load_adapter(server: ServerClient, name: str, path: str) -> None:
    out().print(load_on(server, name, path), markup=False)


def unload_adapter(server: ServerClient, name: str) -> None:
    out().print(administer(server, "/v1/unload_lora_adapter", {"lora_name": name}), markup=False)
