"""Who may call the server: API keys, by their digests (``keys.py``), and the web pages of browsers."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Scope

from truffula.config import ServerConfig, is_loopback
from truffula.server.errors import Forbidden, Unauthorized
from truffula.server.keys import EVERYTHING, Access, KeyRing

# Probes, scrapers and pages without data of the operator: a browser sends no key for a page it opens.
OPEN_PATHS = frozenset(
    {
        *("/health", "/ping", "/health_generate", "/startup", "/metrics", "/v1/health", "/version"),
        *("/docs", "/openapi.json", "/api-doc/openapi.json"),
    }
)
EXPOSED_HEADERS = (
    "x-request-id",
    "request-id",
    "x-truffula-ignored",
    "x-model-id",
    "x-adapter-id",
    "x-truffula-adapter",
    "x-truffula-generation",
    "retry-after",
)


def is_open(method: str, path: str, protect_metrics: bool) -> bool:
    """Whether a request needs no key. ``/`` answers probes and browsers by GET and generates by POST."""
    if path in OPEN_PATHS:
        return not (protect_metrics and path == "/metrics")
    return path == "/" and method in ("GET", "HEAD")


def bearer(value: str) -> str | None:
    """The credential of an ``Authorization`` header, None when it is of another scheme."""
    scheme, _, credential = value.partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else None


def access_of(request: Request) -> Access:
    """What the sender of a request may do; everything, where there are no keys."""
    access: Access = getattr(request.state, "access", EVERYTHING)
    return access


def require_admin(access: Access) -> None:
    """Raise ``Forbidden`` for a key without the right to administer."""
    if not access.admin:
        raise Forbidden("This API key may not administer the server: it lacks admin = true in --api-keys-file.")


def prefix_salt(request: Request, given: str | None, by_key: bool) -> str:
    """The salt of a request's prefix-cache blocks: the client's own, after its tenant's digest if ``by_key``.

    Digests have one length, so a client's salt cannot imitate that of another tenant.
    """
    tenant: str | None = getattr(request.state, "tenant", None)
    return f"{tenant}:{given or ''}" if by_key and tenant is not None else given or ""


def client_of(request: Request) -> str:
    """The sender of a request: the digest of its tenant, else its address."""
    tenant: str | None = getattr(request.state, "tenant", None)
    return tenant or (request.client.host if request.client is not None else "")


def _keys_in(scope: Scope) -> list[str]:
    """The keys that a request gives, in the headers of OpenAI's clients and of Anthropic's."""
    headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}  # the first one counts
    given = (bearer(headers.get(b"authorization", "")), headers.get(b"x-api-key", "").strip())
    return [key for key in given if key]


class KeyCheck:
    """Refuses a request that gives none of the keys."""

    def __init__(self, keys: KeyRing, protect_metrics: bool) -> None:
        self._protect_metrics = protect_metrics
        self.keys = keys

    def error(self, scope: Scope) -> Unauthorized | Forbidden | None:
        """Why the request is refused. The scope's state gets the rights of its key, and its tenant."""
        if is_open(scope["method"], scope["path"], self._protect_metrics):
            return None
        given = _keys_in(scope)
        if (access := next(filter(None, map(self.keys.find, given)), None)) is not None:
            scope["state"]["access"] = access
            scope["state"]["tenant"] = access.tenant
            return None
        what = "The API key is invalid" if given else "An API key is required"
        return Unauthorized(f"{what}; send it as 'Authorization: Bearer <key>' or 'x-api-key: <key>'.")


class WebRules:
    """Which web pages may call the server, and by which host names it may be called. Probes are always answered.

    With API keys a page needs the key, so that pages of ``cors_origins`` may call ("*": any). Without keys any page in
    a browser on this machine could generate, so a request with an ``Origin`` is refused unless that is one of
    ``cors_origins``, of this machine, or the server's own. ``closed`` paths (one that ends with a slash stands for all
    below it) have no CORS, and without keys no page may call them at all.

    Where only this machine reaches a server without keys, its Host header must be an address, ``localhost``, or one of
    ``allowed_hosts``: a page whose name was made to point at this machine (DNS rebinding) has another, and the browser
    counts it as the same origin.
    """

    def __init__(self, config: ServerConfig, closed: Collection[str]) -> None:
        self._closed = frozenset(closed)
        self._closed_below = tuple(path for path in closed if path.endswith("/"))
        self._keyed = config.keyed
        self._hosts: frozenset[str] | None = None  # any
        if not self._keyed and "*" not in config.allowed_hosts and is_loopback(config.host):
            self._hosts = frozenset(name.lower() for name in (config.host, *config.allowed_hosts))
        self._origins = set(config.cors_origins) - {"none", "auto"}
        self._local: str | None = None
        if "auto" in config.cors_origins:
            self._origins, self._local = (
                (self._origins | {"*"}, None) if self._keyed else (self._origins, _LOCAL_ORIGIN)
            )
        self._cors: CORSMiddleware | None = None

    def cors(self, app: ASGIApp) -> CORSMiddleware | None:
        """``app`` with the headers by which browsers let pages call it; None where no page may."""
        if self._origins or self._local:
            self._cors = CORSMiddleware(
                app,
                allow_origins=sorted(self._origins),
                allow_origin_regex=self._local,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )
        return self._cors

    def is_closed(self, scope: Scope) -> bool:
        return scope["path"] in self._closed or scope["path"].startswith(self._closed_below)

    def error(self, scope: Scope) -> Forbidden | None:
        """Why the request is refused."""
        closed = self.is_closed(scope)
        if not closed and scope["path"] in OPEN_PATHS:
            return None
        headers = {name: value.decode("latin-1") for name, value in scope["headers"] if name in (b"origin", b"host")}
        return self._violation(headers.get(b"origin"), headers.get(b"host", ""), closed)

    def _violation(self, origin: str | None, host: str, closed: bool) -> Forbidden | None:
        if self._hosts is not None and not _is_own_host(host, self._hosts):
            return Forbidden(
                f"The host name {host[:80]!r} is not one of this server's. Use an address or localhost, or start the "
                "server with --allowed-host NAME or --api-key.",
                param="host",
            )
        if self._keyed or origin is None:
            return None
        if closed:
            return Forbidden("Web pages cannot administer a server that has no API keys.")
        if origin.partition("://")[2] == host or (self._cors is not None and self._cors.is_allowed_origin(origin)):
            return None
        return Forbidden(
            f"Web pages of {origin[:80]!r} may not call this server, which has no API keys. Start it with "
            "--cors-origin ORIGIN ('*' for any), or with --api-key.",
            param="origin",
        )


def _is_own_host(host: str, names: Collection[str]) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = name.lower().rstrip(".")
    if not name or name == "localhost" or name.endswith(".localhost") or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


_LOCAL_ORIGIN = r"https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?"
