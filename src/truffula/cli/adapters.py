"""``truffula adapters``: a client of a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from truffula.cli.output import out, table
from truffula.errors import ConfigError, TruffulaError


def _call(method: str, url: str, path: str, api_key: str | None, body: dict[str, Any] | None = None) -> Any:
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.request(method, url.rstrip("/") + path, headers=headers, json=body, timeout=300)
    except httpx.HTTPError as error:
        raise ConfigError(
            f"No truffula server answers at {url} ({error}). Start one, or name it with --url.", param="url"
        ) from error
    if answer.status_code >= 400:
        raise TruffulaError(f"The server answered {answer.status_code}: {_reason(answer)}", status=answer.status_code)
    return answer.json()


def _reason(answer: Any) -> str:
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return str(answer.text[:300])
    return str(error["message"] if isinstance(error, dict) else error)


def list_adapters(url: str, api_key: str | None, *, as_json: bool) -> None:
    models = _call("GET", url, "/v1/models", api_key)["data"]
    if as_json:
        out().print_json(json.dumps(models))
        return
    shown = table("name", "kind", "root")
    for model in models:
        shown.add_row(model["id"], "adapter" if model.get("parent") else "base", str(model.get("root") or ""))
    out().print(shown)


def load_adapter(url: str, api_key: str | None, name: str, path: Path) -> None:
    out().print(
        _call("POST", url, "/v1/load_lora_adapter", api_key, {"lora_name": name, "lora_path": str(path.resolve())})
    )


def unload_adapter(url: str, api_key: str | None, name: str) -> None:
    out().print(_call("POST", url, "/v1/unload_lora_adapter", api_key, {"lora_name": name}))
