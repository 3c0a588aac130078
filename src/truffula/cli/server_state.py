"""``truffula adapters list`` and ``truffula ps``: the state of a running server."""

from __future__ import annotations

from typing import Any

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
