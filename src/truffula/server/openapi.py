"""The OpenAPI document of the routes, made when it is first asked for."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula import __version__
from truffula.server.body import Body

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class RouteSpec:
    """One route. Users read the handler's docstring. ``body`` is what the handler reads, ``example`` one such body."""

    method: str
    path: str
    handler: Handler
    tag: str
    body: type[Body] | None = None
    example: Mapping[str, Any] | None = None


def document_of(rows: Sequence[RouteSpec], *, keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1: a path per route, the bodies' schemas. ``keyed``: requests carry an API key."""
    descriptions, queries = field_help(), query_help()
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for row in rows:
        paths.setdefault(row.path.replace(":path}", "}"), {})[row.method.lower()] = _operation(row, queries)
        if row.body is not None:
            made = row.body.model_json_schema(ref_template="#/components/schemas/{model}")
            if row.body.route_fields is not None:
                own = row.body.route_fields.levels[""]
                made["properties"] = {name: field for name, field in made["properties"].items() if name in own}
            schemas |= {**made.pop("$defs", {}), row.body.__name__: made}
    for schema in schemas.values():
        for name, field in schema.get("properties", {}).items():
            field.pop("title", None)
            if name in descriptions:
                field.setdefault("description", descriptions[name])
    document = {
        "openapi": "3.1.0",
        "info": {"title": "truffula", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if not keyed:
        return document
    schemes = {"key": {"type": "http", "scheme": "bearer"}}
    return {**document, "components": {"schemas": schemas, "securitySchemes": schemes}, "security": [{"key": []}]}


_ABOUT = (
    "One language model with LoRA adapters, under the APIs of OpenAI and Anthropic (/v1/), LoRAX and TGI. "
    "In every field, null means absent. A field of another server is refused with the name to use here."
)


def field_help() -> Mapping[str, str]:
    """What each field of a request means; ``field_help.toml`` is read when the document is made, not at a start."""
    return {name: text for name, text in _help().items() if isinstance(text, str)}


def query_help() -> Mapping[str, Mapping[str, dict[str, Any]]]:
    """By method and path the parameters of the query, each with its JSON Schema."""
    found: Mapping[str, Mapping[str, dict[str, Any]]] = _help()["query"]
    return found


def _help() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("field_help.toml").read_text(encoding="utf-8"))


def _operation(row: RouteSpec, queries: Mapping[str, Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    text = inspect.cleandoc(row.handler.__doc__ or "").replace("``", "`")
    made: dict[str, Any] = {
        "tags": [row.tag],
        "operationId": f"{row.method.lower()}_{row.path.strip('/').replace('/', '_') or 'root'}".replace(":path", ""),
        "summary": text.split("\n\n")[0].replace("\n", " "),
        "responses": {"200": {"description": "The answer."}, "default": {"description": "An error, as JSON."}},
    }
    if row.body is not None:
        content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{row.body.__name__}"}}
        if row.example is not None:
            content["example"] = dict(row.example)
        made["requestBody"] = {"required": True, "content": {"application/json": content}}
    in_path = [(name, {"type": "string"}) for name in re.findall(r"{(\w+)", row.path)]
    parameters = [{"name": name, "in": "path", "required": True, "schema": schema} for name, schema in in_path]
    for name, schema in queries.get(f"{row.method} {row.path}", {}).items():
        shown = {key: value for key, value in schema.items() if key != "description"}
        parameters.append({"name": name, "in": "query", "schema": shown, "description": schema["description"]})
    return made | ({"parameters": parameters} if parameters else {})
