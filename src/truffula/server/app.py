"""``create_app``: routes, error handlers and middleware around one ``AsyncService``. There is no module-level app."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from truffula import __version__
from truffula.config import ServerConfig
from truffula.errors import TruffulaError
from truffula.lora.sources import AdapterPolicy
from truffula.metrics import Metrics
from truffula.server import admin, lorax, openai_chat, openai_completions, openai_models, probes, tokens
from truffula.server.auth import KeyCheck, PublicCors
from truffula.server.body import Body
from truffula.server.errors import MethodNotAllowed, UnknownPath, render, side_of
from truffula.server.lorax_bodies import ChatTokenizeBody, DetokenizeBody, GenerateBody, TokenizeBody
from truffula.server.middleware import BodyLimit, OpenLimit, RequestScope
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.state import ServerState, record_of
from truffula.service import AsyncService

Handler = Callable[[Request], Awaitable[Response]]

# method, path, handler, tag, body. GET also answers HEAD.
_ROUTES: tuple[tuple[str, str, Handler, str, type[Body] | None], ...] = (
    ("POST", "/v1/chat/completions", openai_chat.chat_completions, "openai", ChatBody),
    ("POST", "/v1/completions", openai_completions.completions, "openai", CompletionBody),
    ("GET", "/v1/models", openai_models.list_models, "openai", None),
    ("GET", "/v1/models/{model_id:path}", openai_models.one_model, "openai", None),
    ("POST", "/", lorax.compatible, "native", GenerateBody),
    ("POST", "/generate", lorax.generate, "native", GenerateBody),
    ("POST", "/generate_stream", lorax.generate_stream, "native", GenerateBody),
    ("POST", "/invocations", lorax.invocations, "native", GenerateBody),
    ("POST", "/tokenize", tokens.tokenize, "native", TokenizeBody),
    ("POST", "/detokenize", tokens.detokenize, "native", DetokenizeBody),
    ("POST", "/chat_tokenize", tokens.chat_tokenize, "native", ChatTokenizeBody),
    ("GET", "/", probes.health, "probes", None),
    ("GET", "/health", probes.health, "probes", None),
    ("GET", "/ping", probes.health, "probes", None),
    ("GET", "/startup", probes.startup, "probes", None),
    ("GET", "/info", probes.info, "probes", None),
    ("GET", "/metrics", probes.metrics, "probes", None),
)
_ADMIN_ROUTES: tuple[tuple[str, str, Handler, str, type[Body] | None], ...] = (
    ("POST", "/v1/load_lora_adapter", admin.load_adapter, "admin", admin.LoadBody),
    ("POST", "/v1/unload_lora_adapter", admin.unload_adapter, "admin", admin.UnloadBody),
)


def create_app(
    service: AsyncService,
    config: ServerConfig,
    policy: AdapterPolicy,
    metrics: Metrics,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The application. Its lifespan starts ``service`` on the running loop and closes it at the end.

    ``defaults`` are sampling fields for requests on the OpenAI side that leave them out.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="truffula",
        version=__version__,
        lifespan=lifespan,
        openapi_url="/api-doc/openapi.json",
        docs_url="/docs",
        redoc_url=None,
        exception_handlers={TruffulaError: _truffula_error, HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    app.state.truffula = ServerState(service, config, policy, metrics, defaults=defaults or {})
    for method, path, handler, tag, body in _ROUTES + (_ADMIN_ROUTES if config.adapter_admin else ()):
        _add(app, method, path, handler, tag, body)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=config.max_body_bytes, timeout_s=config.body_timeout_s)
    app.add_middleware(OpenLimit, limit=config.max_open_requests)
    if config.api_keys:
        app.add_middleware(KeyCheck, keys=config.api_keys, protect_metrics=config.protect_metrics)
    app.add_middleware(
        PublicCors, origins=config.cors_origins, closed=[row[1] for row in _ADMIN_ROUTES], keyed=bool(config.api_keys)
    )
    app.add_middleware(RequestScope, metrics=metrics)
    return app


def _add(app: FastAPI, method: str, path: str, handler: Handler, tag: str, body: type[Body] | None) -> None:
    """One route. Bodies are read by the handler (strictly, and once), so the document is told their schema."""
    extra: dict[str, Any] | None = None
    if body is not None:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
        extra = {"requestBody": {"required": True, "content": content}}
    name = f"{method.lower()}_{path.strip('/').replace('/', '_') or 'root'}"
    app.add_api_route(
        path, handler, methods=[method], tags=[tag], response_model=None, operation_id=name, openapi_extra=extra
    )
    if method == "GET":
        app.add_api_route(path, handler, methods=["HEAD"], response_model=None, include_in_schema=False)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies' schemas beside FastAPI's own."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for body in {row[4] for row in _ROUTES + _ADMIN_ROUTES if row[4] is not None}:
            made = body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(made.pop("$defs", {}))
            schemas[body.__name__] = made
        app.openapi_schema = document
    return app.openapi_schema


async def _truffula_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TruffulaError)
    return _reply(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own answers: a path nobody serves, a method nobody serves there."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        reply = _reply(
            request, MethodNotAllowed(f"{request.method[:16]} is not allowed on {path[:200]}; use {allowed}.")
        )
        reply.headers["allow"] = allowed
        return reply
    return _reply(request, UnknownPath(f"There is nothing at {path[:200]}."))


def _reply(request: Request, error: TruffulaError) -> Response:
    record_of(request).error_code = error.code
    status, headers, body = render(error, side_of(request.url.path))
    return Response(body, status, headers=headers)
