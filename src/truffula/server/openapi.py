"""The OpenAPI document of the routes, and the page that shows it. Both are made when they are first asked for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from truffula import __version__
from truffula.server.body import Body
from truffula.server.replies import json_reply

Handler = Callable[[Request], Awaitable[Response]]

DOCUMENT_PATH, PAGE_PATH = "/api-doc/openapi.json", "/docs"
_SWAGGER = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5"
_PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>truffula</title><link rel="stylesheet" href="{_SWAGGER}/swagger-ui.css"></head>
<body>
<div id="swagger-ui"></div>
<script src="{_SWAGGER}/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({{ url: "{DOCUMENT_PATH}", dom_id: "#swagger-ui" }});</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Row:
    """One route. The handler's docstring describes it; ``body`` is what it reads, in the document only (handlers
    validate it themselves, strictly and once)."""

    method: str
    path: str
    handler: Handler
    tag: str
    body: type[Body] | None = None


def document_of(rows: Sequence[Row]) -> dict[str, Any]:
    """OpenAPI 3.1: a path per route, the bodies' schemas."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {}
    for row in rows:
        paths.setdefault(re.sub(r":\w+}", "}", row.path), {})[row.method.lower()] = _operation(row)
        if row.body is not None:
            made = row.body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(made.pop("$defs", {}))
            schemas[row.body.__name__] = made
    return {
        "openapi": "3.1.0",
        "info": {"title": "truffula", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(row: Row) -> dict[str, Any]:
    place = re.sub(r"\W+", "_", row.path).strip("_") or "root"
    made: dict[str, Any] = {
        "tags": [row.tag],
        "summary": row.handler.__name__.replace("_", " "),
        "description": inspect.getdoc(row.handler) or "",
        "operationId": f"{row.method.lower()}_{place}",
        "responses": {"200": {"description": "An answer."}},
    }
    names = re.findall(r"{(\w+)", row.path)
    if names:
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if row.body is not None:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{row.body.__name__}"}}}
        made["requestBody"] = {"required": True, "content": content}
    return made


def document_handler(rows: Sequence[Row]) -> Handler:
    """Answers with the document of ``rows``."""

    @cache
    def made() -> dict[str, Any]:
        return document_of(rows)

    async def document(request: Request) -> Response:
        return json_reply(made())

    return document


async def page(request: Request) -> Response:
    """Swagger UI over the document; its scripts come from a public network of mirrors."""
    return HTMLResponse(_PAGE)
