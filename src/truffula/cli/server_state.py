"""``truffula adapters`` and ``truffula ps``: the state of a running server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from truffula.cli.output import note, out, print_table, table
from truffula.cli.server_client import ServerClient, adapter_path
from truffula.errors import TruffulaError
from truffula.option import format_size

ROUTE = "/v1/adapters"


def list_adapters(server: ServerClient, wanted: dict[str, str], *, as_json: bool) -> None:
    """Print the base model and the adapters that the filters ``wanted`` leave, one per line."""
    models = {model["id"]: model for model in server.models()}
    try:
        details = {row["id"]: row for row in _pages(server, wanted)}
    except TruffulaError as error:
        if error.code not in ("not_found", "http_404") or wanted:
            raise
        details = {}  # the server is not truffula
    shown_names = details if wanted else {**models, **details}
    rows = [{**models.get(name, {"id": name}), **details.get(name, {})} for name in shown_names]
    if as_json:
        out().print_json(data=rows)
        return
    shown = table("name", "status", ">rank", ">memory", "source", "base")
    for row in rows:
        shown.add_row(row["id"], *_cells(row), row.get("parent") or "")
    out().print(shown)
    if details and not any(row.get("source") for row in details.values()):
        note("Sources are shown by servers that run with --adapter-admin.")
    for row in rows:
        if row.get("error"):
            note(f"{row['id']}: {row['error']}")


def _pages(server: ServerClient, wanted: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of the server's list, page by page."""
    more, after = True, ""
    while more:
        found = server.call("GET", f"{ROUTE}?{urlencode({**wanted, 'limit': 1000, 'after': after})}")
        yield from found["data"]
        more, after = found.get("has_more", False), found.get("last_id") or ""


def show_adapter(server: ServerClient, name: str, *, as_json: bool) -> None:
    """Print what the server knows of one adapter, a fact per line, then its versions."""
    found = server.call("GET", adapter_path(name))
    if as_json:
        out().print_json(data=found)
        return
    versions = found.pop("versions", [])
    facts = table("fact", "value")
    facts.show_header = False
    for fact, value in found.items():
        if value not in (None, [], {}):
            facts.add_row(fact.replace("_", " "), _text(fact, value))
    print_table(out(), facts)
    if len(versions) > 1 or any(one["version"] for one in versions):
        shown = table("version", "status", ">memory", "generation", "source")
        for one in versions:
            size = format_size(one["size_bytes"]) if one["size_bytes"] else "-"
            generation = (one["generation"] or "-")[:12]
            shown.add_row(one["version"] or "-", one["status"], size, generation, str(one.get("source") or "-"))
        print_table(out(), shown)


def _text(fact: str, value: Any) -> str:
    if fact == "size_bytes":
        return format_size(value)
    if fact == "last_used":
        return datetime.fromtimestamp(value).astimezone().isoformat(" ")
    if isinstance(value, dict):
        return ", ".join(f"{name} ({weight:g})" for name, weight in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def list_aliases(server: ServerClient, *, as_json: bool) -> None:
    """Print the aliases, one per line."""
    found = server.call("GET", "/v1/adapter_aliases")["data"]
    if as_json:
        out().print_json(data=found)
        return
    shown = table("alias", "targets", "shadow")
    for one in found:
        percent = one.get("shadow_percent", 100)
        shadow = f"{one['shadow']} ({percent:g} %)" if one.get("shadow") else "-"
        shown.add_row(one["id"], _text("targets", one["targets"]), shadow)
    print_table(out(), shown)


def changed(
    server: ServerClient, method: str, path: str, body: dict[str, Any] | None, done: str, *, as_json: bool
) -> None:
    """Carry out a change, and print ``done``, or the server's answer."""
    found = server.administer(method, path, body)
    if as_json:
        out().print_json(data=found)
    else:
        out().print(done)


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


def run_ps(server: ServerClient, *, as_json: bool) -> None:
    """Print the model, the adapters and the load of ``server``. Raises as ``ServerClient.call``."""
    found = _state(server)
    if as_json:
        out().print_json(data=found)
        return
    console = out()
    names = ", ".join(found["adapters"]) or "none"
    lines = {
        "server": f"{server.url}, truffula {found['version']}",
        "model": f"{found['model']} ({found['dtype']}, {found['device']})",
        "adapters": f"{names}; {found['adapters_resident']} in memory, {format_size(found['adapter_bytes'])}",
        "requests": f"{found['running']} running, {found['waiting']} waiting",
        "KV cache": f"{format_size(found['kv_used_bytes'])} in use, {format_size(found['kv_cached_bytes'])} cached, "
        f"of {format_size(found['budget_bytes'])} for KV cache and adapters",
    }
    for name, text in lines.items():
        console.print(f"{name:<10}{text}")


def _state(server: ServerClient) -> dict[str, Any]:
    """The state of the server, from /info, /v1/models and /metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    info, models, metrics = server.call("GET", "/info"), server.models(), server.text("/metrics")
    counts = {
        "running": "truffula_sequences_running",
        "waiting": "truffula_sequences_waiting",
        "adapters_resident": "truffula_adapters_resident",
        "adapter_bytes": "truffula_adapter_bytes",
        "kv_used_bytes": "truffula_kv_used_bytes",
        "kv_cached_bytes": "truffula_kv_cached_bytes",
        "budget_bytes": "truffula_budget_bytes",
    }
    try:
        values = {s.name: s.value for family in text_string_to_metric_families(metrics) for s in family.samples}
        return {
            "model": info["model_id"],
            "version": info["version"],
            "dtype": info["model_dtype"],
            "device": info["model_device_type"],
            "adapters": [model["id"] for model in models if model.get("parent")],
            **{name: int(values[series]) for name, series in counts.items()},
        }
    except (ValueError, KeyError, TypeError) as error:
        raise server.not_truffula("/info") from error
