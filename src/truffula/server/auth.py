"""API keys: one bearer key of a list, compared exactly and in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from truffula.server.errors import Unauthorized, WebPage, render, side_of
from truffula.server.middleware import send_reply

# Probes, scrapers and pages without data of the operator: a browser sends no key for a page it opens.
OPEN_PATHS = frozenset(
    {
        *("/health", "/ping", "/startup", "/metrics", "/v1/health", "/version"),
        *("/docs", "/openapi.json", "/api-doc/openapi.json"),
    }
)
EXPOSED_HEADERS = ("x-request-id", "x-truffula-ignored", "x-model-id", "x-adapter-id", "retry-after")


def is_open(method: str, path: str, protect_metrics: bool = False) -> bool:
    """Whether a request needs no key. ``/`` answers probes and browsers by GET and generates by POST."""
    if path in OPEN_PATHS:
        return not (protect_metrics and path == "/metrics")
    return path == "/" and method in ("GET", "HEAD")


def bearer(value: str) -> str | None:
    """The credential of an ``Authorization`` header, None when it is of another scheme."""
    scheme, _, credential = value.partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else None


def tenant_of(key: str) -> str:
    """A digest that stands for the key where the key itself has no business."""
    return hashlib.blake2b(key.encode("latin-1"), digest_size=16, person=b"truffula-tenant").hexdigest()


def prefix_salt(request: Request, given: str | None, by_key: bool) -> str:
    """The salt of a request's prefix-cache blocks: the client's own, behind its key's digest where keys separate.

    Digests are of one length, so no client's word can imitate another key's.
    """
    tenant: str | None = getattr(request.state, "tenant", None)
    return f"{tenant}:{given or ''}" if by_key and tenant is not None else given or ""


def client_of(request: Request) -> str:
    """Who sends a request: the digest of its key, else its address. Clients take turns with what is scarce."""
    tenant: str | None = getattr(request.state, "tenant", None)
    return tenant or (request.client.host if request.client is not None else "")


class KeyCheck:
    """Answers 401 where keys are on and none of them is given. Every key is compared, whatever the outcome."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], protect_metrics: bool = False) -> None:
        self.app = app
        self._protect_metrics = protect_metrics
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["method"], scope["path"], self._protect_metrics):
            await self.app(scope, receive, send)
            return
        value = next((v for k, v in scope["headers"] if k == b"authorization"), b"").decode("latin-1")
        given = bearer(value)
        if given is not None and self._known(given):
            scope.setdefault("state", {})["tenant"] = tenant_of(given)
            await self.app(scope, receive, send)
            return
        what = "The API key is invalid" if given else "An API key is required"
        error = Unauthorized(f"{what}; send it as 'Authorization: Bearer <key>'.")
        await send_reply(send, *render(error, side_of(scope["path"])))

    def _known(self, given: str) -> bool:
        sent = given.encode("latin-1")  # the bytes of the header, whatever they spell
        return sum([hmac.compare_digest(sent, key) for key in self._keys]) > 0


class PublicCors:
    """CORS for web pages of the operator's ``origins`` ("*" is everybody's), and never on ``closed`` paths.

    A page may send those without being able to read the answer, from a browser that reaches what the page cannot. So
    where no key stands in the way (``keyed``), whatever carries an Origin is refused there.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], closed: Sequence[str], keyed: bool) -> None:
        self.app = app
        self._closed = frozenset(closed)
        self._keyed = keyed
        allowed = [origin for origin in origins if origin != "none"]
        self._cors = (
            app
            if not allowed
            else CORSMiddleware(
                app,
                allow_origins=allowed,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._closed:
            await self._cors(scope, receive, send)
        elif self._keyed or not any(name == b"origin" for name, _ in scope["headers"]):
            await self.app(scope, receive, send)
        else:
            error = WebPage("Web pages cannot administer a server that has no API keys.")
            await send_reply(send, *render(error, side_of(scope["path"])))
