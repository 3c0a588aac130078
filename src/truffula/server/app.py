"""``create_app``: routes, error handlers and middleware around one ``AsyncService``. There is no module-level app."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from truffula.config import ServerConfig
from truffula.errors import TruffulaError
from truffula.lora.sources import AdapterDirectory
from truffula.metrics import Metrics
from truffula.server import (
    adapter_listing,
    adapters,
    admin,
    control,
    decisions,
    lorax,
    messages,
    openai,
    openai_chat,
    openai_models,
    pages,
    probes,
    render,
    responses,
    tokens,
)
from truffula.server.auth import KeyCheck, WebRules, access_of, require_admin
from truffula.server.decisions_bodies import DecisionsBody
from truffula.server.errors import MethodNotAllowed
from truffula.server.keys import KeyRing
from truffula.server.lorax_bodies import ChatTokenizeBody, DetokenizeBody, GenerateBody, TokenizeBody
from truffula.server.messages_bodies import CountTokensBody, MessagesBody
from truffula.server.middleware import RequestPipeline, rejection
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.openapi import Handler, RouteSpec
from truffula.server.response_store import ResponseStore, default_file
from truffula.server.responses_bodies import ResponsesBody
from truffula.server.responses_kept import KeptResponses
from truffula.server.state import ServerState
from truffula.server.unserved import unserved
from truffula.service.aio import AsyncService

_TALK = [{"role": "user", "content": "Hello"}]
_NATIVE = {"inputs": "Hello", "parameters": {"max_new_tokens": 20}}
# GET also answers HEAD.
_ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec(
        "POST", "/v1/chat/completions", openai_chat.chat_completions, "openai", ChatBody,
        {"messages": _TALK, "max_tokens": 20},
    ),
    RouteSpec(
        "POST", "/v1/completions", openai.completions, "openai", CompletionBody,
        {"prompt": "Once upon a time", "max_tokens": 20},
    ),
    RouteSpec(
        "POST", "/v1/messages", messages.messages, "anthropic", MessagesBody, {"messages": _TALK, "max_tokens": 20}
    ),
    RouteSpec(
        "POST", "/v1/messages/count_tokens", messages.count_tokens, "anthropic", CountTokensBody, {"messages": _TALK}
    ),
    RouteSpec(
        "POST", "/v1/responses", responses.create, "openai", ResponsesBody,
        {"input": "Hello", "max_output_tokens": 20},
    ),
    RouteSpec(
        "POST", "/v1/responses/input_tokens", responses.count_tokens, "openai", ResponsesBody, {"input": "Hello"}
    ),
    RouteSpec("GET", "/v1/responses/{response_id}", responses.retrieve, "openai"),
    RouteSpec("DELETE", "/v1/responses/{response_id}", responses.delete, "openai"),
    RouteSpec("POST", "/v1/responses/{response_id}/cancel", responses.cancel, "openai"),
    RouteSpec("GET", "/v1/responses/{response_id}/input_items", responses.input_items, "openai"),
    RouteSpec(
        "POST", "/v1/decisions", decisions.decide, "openai", DecisionsBody,
        {"input": "Blue.", "questions": [{"type": "predicate", "instructions": "A colour."}]},
    ),
    RouteSpec(
        "POST", "/v1/chat/completions/render", render.render_chat, "openai", ChatBody, {"messages": _TALK},
    ),
    RouteSpec(
        "POST", "/v1/completions/render", render.render_completions, "openai", CompletionBody, {"prompt": "Hello"},
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
    RouteSpec("GET", "/tokenizer_info", tokens.tokenizer_info, "native"),
    RouteSpec("GET", "/", pages.root, "probes"),
    RouteSpec("GET", "/v1/adapters", adapter_listing.list_adapters, "admin"),
    RouteSpec("GET", "/v1/adapters/{name:path}", adapter_listing.show_adapter, "admin"),
    RouteSpec("GET", "/v1/adapter_aliases", adapters.list_aliases, "admin"),
    RouteSpec("GET", "/v1/lora_adapters", adapter_listing.mistral_list, "admin"),
    RouteSpec("GET", "/health", probes.health, "probes"),
    RouteSpec("GET", "/ping", probes.health, "probes"),
    RouteSpec("GET", "/v1/health", probes.openai_health, "probes"),
    RouteSpec("GET", "/startup", probes.startup, "probes"),
    RouteSpec("GET", "/info", probes.info, "probes"),
    RouteSpec("GET", "/version", probes.version, "probes"),
    RouteSpec("GET", "/metrics", probes.metrics, "probes"),
    RouteSpec("GET", "/load", probes.load, "probes"),
    RouteSpec("GET", "/get_load", probes.load, "probes"),
    RouteSpec("GET", "/get_model_info", probes.sglang_info, "probes"),
    RouteSpec("GET", "/get_server_info", probes.sglang_info, "probes"),
    RouteSpec("GET", "/health_generate", probes.health, "probes"),
    RouteSpec("GET", "/server_info", probes.server_info, "probes"),
)  # fmt: skip
_ADMIN_ROUTES: tuple[RouteSpec, ...] = (
    RouteSpec(
        "POST",
        "/v1/adapters",
        adapters.register,
        "admin",
        adapters.RegisterBody,
        {"adapters": [{"name": "support", "version": "7", "source": "/srv/adapters/support-7"}], "load": True},
    ),
    RouteSpec("DELETE", "/v1/adapters/{name:path}", adapters.delete_adapter, "admin"),
    RouteSpec("POST", "/v1/adapters/{name:path}/load", adapters.load_named, "admin"),
    RouteSpec("POST", "/v1/adapters/{name:path}/unload", adapters.unload_named, "admin"),
    RouteSpec("POST", "/v1/adapters/{name:path}/pin", adapters.pin, "admin"),
    RouteSpec("POST", "/v1/adapters/{name:path}/unpin", adapters.unpin, "admin"),
    RouteSpec("POST", "/v1/adapters/{name:path}/reload", adapters.reload_named, "admin", adapters.ReloadBody),
    RouteSpec(
        "PUT",
        "/v1/adapter_aliases/{name:path}",
        adapters.set_alias,
        "admin",
        adapters.AliasBody,
        {"targets": {"support@7": 90, "support@8": 10}},
    ),
    RouteSpec("DELETE", "/v1/adapter_aliases/{name:path}", adapters.delete_alias, "admin"),
    RouteSpec("POST", "/v1/load_lora_adapter", admin.load_adapter, "admin", admin.LoadBody),
    RouteSpec("POST", "/v1/unload_lora_adapter", admin.unload_adapter, "admin", admin.UnloadBody),
    RouteSpec("DELETE", "/v1/models/{model_id:path}", admin.delete_model, "admin"),
    RouteSpec("POST", "/load_lora_adapter", admin.sglang_load, "admin", admin.SglangLoadBody),
    RouteSpec("POST", "/unload_lora_adapter", admin.sglang_unload, "admin", admin.UnloadBody),
    RouteSpec("POST", "/pause", control.pause, "admin"),
    RouteSpec("POST", "/resume", control.resume, "admin"),
    RouteSpec("GET", "/is_paused", control.is_paused, "admin"),
    RouteSpec("POST", "/reset_prefix_cache", control.reset_prefix_cache, "admin"),
)


def create_app(
    service: AsyncService,
    config: ServerConfig,
    directory: AdapterDirectory,
    metrics: Metrics,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> Starlette:
    """The application. ``service`` must be started before requests arrive.

    ``defaults`` are sampling fields for requests on the OpenAI side that leave them out.
    """

    rows = _ROUTES + (_ADMIN_ROUTES if config.adapter_admin else ())
    document, reference = pages.reference(rows, keyed=config.keyed)
    app = Starlette(
        routes=[
            *(Route(row.path, _handler(row, config), methods=[row.method]) for row in rows),
            Route("/openapi.json", document),
            Route("/api-doc/openapi.json", document),
            Route("/docs", reference),
        ],
    )
    app.router.redirect_slashes = False
    app.state.truffula = ServerState(service, config, directory, metrics, defaults=defaults or {})
    app.state.keys = keys = KeyRing(config.api_keys, config.api_keys_file) if config.keyed else None
    app.state.responses = KeptResponses(response_store(config), config.max_open_requests)
    closed = ["/metrics", "/v1/adapters", "/v1/adapters/", "/v1/adapter_aliases", "/v1/adapter_aliases/"]
    closed += ["/v1/lora_adapters", *(row.path for row in _ADMIN_ROUTES)]
    protect_metrics = config.protect_metrics or config.api_keys_file is not None  # they name every tenant's adapters
    app.middleware_stack = RequestPipeline(
        ExceptionMiddleware(app.router, handlers={TruffulaError: _error, HTTPException: _error}),
        config,
        metrics,
        WebRules(config, closed),
        None if keys is None else KeyCheck(keys, protect_metrics),
        [route for route in app.routes if isinstance(route, Route)],
    )
    return app


def _handler(row: RouteSpec, config: ServerConfig) -> Handler:
    """The handler of a route; that of an administrator's is refused to keys without that right."""
    if row not in _ADMIN_ROUTES and not (row.path == "/metrics" and config.api_keys_file is not None):
        return row.handler

    async def checked(request: Request) -> Response:
        require_admin(access_of(request))
        return await row.handler(request)

    return checked


def response_store(config: ServerConfig) -> ResponseStore | None:
    """The store of responses that the options ask for; its file is made with the first response."""
    if config.response_store == "off":
        return None
    path = None
    if config.response_store == "file":
        path = config.response_store_file or default_file()
    return ResponseStore(path, max_bytes=config.response_store_max_bytes, max_age_s=config.response_ttl_s)


async def _error(request: Request, error: Exception) -> Response:
    """The answer with an error of a handler, or of the router: no route has this path, or none takes this method."""
    if isinstance(error, TruffulaError):
        return rejection(request.scope, error)
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    path = request.url.path
    if not isinstance(error, HTTPException) or error.status_code != 405:
        return rejection(request.scope, unserved(path, {route.path for route in routes}))
    methods = {m for route in routes if route.matches(request.scope)[0] != Match.NONE for m in route.methods or ()}
    allowed = ", ".join(sorted(methods))
    text = f"{request.method[:16]} is not allowed on {path[:200]}; use {allowed}."
    if path.startswith(("/v1/adapters", "/v1/adapter_aliases")):
        text += " Adapters can be changed while the server runs with --adapter-admin."
    reply = rejection(request.scope, MethodNotAllowed(text))
    reply.headers["allow"] = allowed
    return reply
