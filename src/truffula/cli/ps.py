"""``truffula ps``: what a running server serves."""

from __future__ import annotations

import json
from typing import Any

from truffula.cli.output import nbytes, out
from truffula.errors import ConfigError, TruffulaError

DEFAULT_PORT = 8000


def run_ps(url: str | None, port: int | None, api_key: str | None, *, as_json: bool) -> None:
    """Print the model, adapters and load of the server at ``url``, or at ``port`` of this machine.

    Raises:
        ConfigError: Both are given, or no server answers there.
        TruffulaError: The server refuses, or it is not truffula.
    """
    if url is not None and port is not None:
        raise ConfigError("--url and --port exclude each other; give one of them.", param="url")
    address = (url or f"http://127.0.0.1:{port or DEFAULT_PORT}").rstrip("/")
    found = _ask(address, api_key)
    if as_json:
        out().print_json(json.dumps(found))
        return
    console = out()
    names = ", ".join(found["adapters"]) or "none"
    lines = {
        "server": f"{address}, truffula {found['version']}",
        "model": f"{found['model']} ({found['dtype']}, {found['device']})",
        "adapters": f"{names}; {found['adapters_resident']} in memory, {nbytes(found['adapter_bytes'])}",
        "requests": f"{found['running']} running, {found['waiting']} waiting",
        "KV cache": f"{found['kv_blocks_used']} of {found['kv_blocks']} blocks in use",
    }
    for name, text in lines.items():
        console.print(f"{name:<10}{text}", markup=False)


def _ask(address: str, api_key: str | None) -> dict[str, Any]:
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with httpx.Client(base_url=address, headers=headers, timeout=10) as client:
            answers = {path: client.get(path) for path in ("/info", "/v1/models", "/metrics")}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"No server answers at {address} ({error}). Start one with `truffula serve MODEL`, or name it with --url.",
            param="url",
        ) from error
    for path, answer in answers.items():
        if answer.status_code == 401:
            raise ConfigError(f"The server at {address} requires an API key: give it with --api-key.", param="api_key")
        if answer.status_code >= 400:
            raise TruffulaError(f"{address}{path} answered {answer.status_code}; is a truffula server running there?")
    try:
        return _state(answers["/info"].json(), answers["/v1/models"].json(), answers["/metrics"].text)
    except (ValueError, KeyError, TypeError) as error:
        raise TruffulaError(f"The server at {address} is not a truffula server.") from error


def _state(info: dict[str, Any], models: dict[str, Any], metrics: str) -> dict[str, Any]:
    """The server's state from its three answers. ``KeyError`` where one of them is another server's."""
    from prometheus_client.parser import text_string_to_metric_families

    values = {s.name: s.value for family in text_string_to_metric_families(metrics) for s in family.samples}
    counts = {
        "running": "truffula_sequences_running",
        "waiting": "truffula_sequences_waiting",
        "adapters_resident": "truffula_adapters_resident",
        "adapter_bytes": "truffula_adapter_bytes",
        "kv_blocks": "truffula_kv_blocks",
        "kv_blocks_used": "truffula_kv_blocks_used",
    }
    return {
        "model": info["model_id"],
        "version": info["version"],
        "dtype": info["model_dtype"],
        "device": info["model_device_type"],
        "adapters": [model["id"] for model in models["data"] if model.get("parent")],
        **{name: int(values[series]) for name, series in counts.items()},
    }
