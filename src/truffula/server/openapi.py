"""The OpenAPI document of the routes, and the page that shows it: FastAPI makes both, when they are first asked for.

FastAPI takes a quarter of the computing of a start to import, and serves nothing else here: handlers validate bodies
themselves, strictly and once, and Starlette routes them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from truffula import __version__
from truffula.server.body import Body
from truffula.server.replies import json_reply

Handler = Callable[[Request], Awaitable[Response]]

DOCUMENT_PATH, PAGE_PATH = "/api-doc/openapi.json", "/docs"


@dataclass(frozen=True)
class Row:
    """One route. The handler's docstring describes it; ``body`` is what it reads, in the document only."""

    method: str
    path: str
    handler: Handler
    tag: str
    body: type[Body] | None = None


def document_of(rows: Sequence[Row]) -> dict[str, Any]:
    """OpenAPI 3.1: a path per route, the bodies' schemas."""
    from fastapi import FastAPI
    from fastapi.openapi.utils import get_openapi

    app = FastAPI(openapi_url=None)
    for row in rows:
        app.add_api_route(
            row.path, row.handler, methods=[row.method], tags=[row.tag], response_model=None,
            operation_id=f"{row.method.lower()}_{row.path.strip('/').replace('/', '_') or 'root'}",
            openapi_extra=None if row.body is None else _request_body(row.body),
        )  # fmt: skip
    document = get_openapi(title="truffula", version=__version__, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for body in {row.body for row in rows if row.body is not None}:
        made = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(made.pop("$defs", {}))
        schemas[body.__name__] = made
    return document


def _request_body(body: type[Body]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def document_handler(rows: Sequence[Row]) -> Handler:
    """Answers with the document of ``rows``."""

    @cache
    def made() -> dict[str, Any]:
        return document_of(rows)

    async def document(request: Request) -> Response:
        return json_reply(await run_in_threadpool(made))  # a second of work, while others are answered

    return document


async def page(request: Request) -> Response:
    """Swagger UI over the document."""
    return await run_in_threadpool(_made_page)


def _made_page() -> Response:
    from fastapi.openapi.docs import get_swagger_ui_html

    return get_swagger_ui_html(openapi_url=DOCUMENT_PATH, title="truffula")
