"""``create_app``: routes, error handlers and middleware around one ``AsyncService``. There is no module-level app."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from truffula.config import ServerConfig, is_loopback
from truffula.errors import TruffulaError
from truffula.lora.sources import AdapterDirectory
from truffula.metrics import Metrics
from truffula.server import admin, lorax, openai_chat, openai_completions, openai_models, pages, probes, tokens
from truffula.server.auth import KeyCheck, WebRules
from truffula.server.errors import MethodNotAllowed, dialect_of, render
from truffula.server.lorax_bodies import ChatTokenizeBody, DetokenizeBody, GenerateBody, TokenizeBody
from truffula.server.middleware import BodyLimits, HttpRules, RequestScope
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.openapi import RouteSpec
from truffula.server.state import ServerState, record_of
from truffula.server.unserved import unserved
from truffula.service import AsyncService

_TALK = [{"role": "user", "content": "Hello"}]
_NATIVE = {"inputs": "Hello", "parameters": {"max_new_tokens": 20}}
# GET also answers HEAD.
_ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec(
        "POST", "/v1/chat/completions", openai_chat.chat_completions, "openai", ChatBody,
        {"messages": _TALK, "max_tokens": 20},
    ),
    RouteSpec(
        "POST", "/v1/completions", openai_completions.completions, "openai", CompletionBody,
        {"prompt": "Once upon a time", "max_tokens": 20},
    ),
    RouteSpec("GET", "/v1/models", openai_models.list_models, "openai"),
    RouteSpec("GET", "/v1/models/{model_id:path}", openai_models.one_model, "openai"),
    RouteSpec("GET", "/v1", probes.openai_root, "openai"),
    RouteSpec("POST", "/", lorax.compatible, "native", GenerateBody, _NATIVE),
    RouteSpec("POST", "/generate", lorax.generate, "native", GenerateBody, _NATIVE),
    RouteSpec("POST", "/generate_stream", lorax.generate_stream, "native", GenerateBody, _NATIVE),
    RouteSpec("POST", "/invocations", lorax.invocations, "native", GenerateBody, _NATIVE),
    RouteSpec("POST", "/tokenize", tokens.tokenize, "native", TokenizeBody, {"inputs": "Hello"}),
    RouteSpec("POST", "/detokenize", tokens.detokenize, "native", DetokenizeBody, {"tokens": [1, 2, 3]}),
    RouteSpec("POST", "/chat_tokenize", tokens.chat_tokenize, "native", ChatTokenizeBody, {"messages": _TALK}),
    RouteSpec("GET", "/", pages.root, "probes"),
    RouteSpec("GET", "/v1/adapters", admin.list_adapters, "admin"),
    RouteSpec("GET", "/health", probes.health, "probes"),
    RouteSpec("GET", "/ping", probes.health, "probes"),
    RouteSpec("GET", "/v1/health", probes.openai_health, "probes"),
    RouteSpec("GET", "/startup", probes.startup, "probes"),
    RouteSpec("GET", "/info", probes.info, "probes"),
    RouteSpec("GET", "/version", probes.version, "probes"),
    RouteSpec("GET", "/metrics", probes.metrics, "probes"),
)  # fmt: skip
_ADMIN_ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec("POST", "/v1/load_lora_adapter", admin.load_adapter, "admin", admin.LoadBody),
    RouteSpec("POST", "/v1/unload_lora_adapter", admin.unload_adapter, "admin", admin.UnloadBody),
)


def create_app(
    service: AsyncService,
    config: ServerConfig,
    directory: AdapterDirectory,
    metrics: Metrics,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Starlette:
    """The application. Its lifespan starts ``service`` on the running loop and closes it at the end.

    ``defaults`` are sampling fields for requests on the OpenAI side that leave them out.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    rows = _ROUTES + (_ADMIN_ROUTES if config.adapter_admin else ())
    document, reference = pages.reference(rows, keyed=bool(config.api_keys))
    app = Starlette(
        routes=[
            *(Route(row.path, row.handler, methods=[row.method]) for row in rows),
            Route("/openapi.json", document),
            Route("/api-doc/openapi.json", document),
            Route("/docs", reference),
        ],
        lifespan=lifespan,
        exception_handlers={TruffulaError: _truffula_error, HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    app.state.truffula = ServerState(service, config, directory, metrics, defaults=defaults or {})
    # The last one added is the outermost.
    app.add_middleware(BodyLimits, config=config)
    if config.api_keys:
        app.add_middleware(KeyCheck, keys=config.api_keys, protect_metrics=config.protect_metrics)
    app.add_middleware(
        WebRules,
        origins=config.cors_origins,
        closed=["/metrics", "/v1/adapters", *(row.path for row in _ADMIN_ROUTES)],
        keyed=bool(config.api_keys),
        hosts=_hosts(config),
    )
    app.add_middleware(HttpRules)
    app.add_middleware(RequestScope, metrics=metrics)
    return app


def _hosts(config: ServerConfig) -> list[str] | None:
    """Host names that requests may use besides addresses, where only this machine reaches a server without keys."""
    if config.api_keys or "*" in config.allowed_hosts or not is_loopback(config.host):
        return None
    return [config.host.lower(), *(name.lower() for name in config.allowed_hosts)]


async def _truffula_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TruffulaError)
    return _reply(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own answers: no route has this path, or none takes this method there."""
    assert isinstance(error, HTTPException)
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    path = request.url.path
    if error.status_code == 405:
        methods = {m for route in routes if route.matches(request.scope)[0] != Match.NONE for m in route.methods or ()}
        allowed = ", ".join(sorted(methods))
        reply = _reply(
            request, MethodNotAllowed(f"{request.method[:16]} is not allowed on {path[:200]}; use {allowed}.")
        )
        reply.headers["allow"] = allowed
        return reply
    return _reply(request, unserved(path, {route.path for route in routes}))


def _reply(request: Request, error: TruffulaError) -> Response:
    record_of(request).error_code = error.code
    status, headers, body = render(error, dialect_of(request.url.path))
    return Response(body, status, headers=headers)
