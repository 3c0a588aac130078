"""The pages for people: ``/`` (what this is, and a form to try it) and ``/docs`` (the API reference).

Both hold all they need: no script, style, font or image of another host, so they work without the internet. Neither
holds data of the operator: the form asks ``/v1/models`` with the key that its user types.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import jinja2
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from truffula import __version__
from truffula.server.openapi import Handler, RouteSpec, document_of
from truffula.server.probes import health
from truffula.server.replies import json_reply
from truffula.server.state import state_of

TITLES: Mapping[str, str] = MappingProxyType(
    {
        "openai": "OpenAI",
        "anthropic": "Anthropic",
        "native": "LoRAX and TGI",
        "probes": "State",
        "admin": "Administration",
    }
)

_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def page(html: str, status: int = 200) -> Response:
    """``html`` under a policy that lets in nothing but its own inline style and script, named by their digests."""
    policy = "default-src 'none'; connect-src 'self'; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    for kind in ("style", "script"):
        inline = re.search(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        if inline is not None:
            digest = base64.b64encode(hashlib.sha256(inline[1].encode()).digest()).decode()
            policy += f"; {kind}-src 'sha256-{digest}'"
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
        "vary": "accept",
    }
    return Response(html, status, headers=headers, media_type="text/html")


def render(name: str, **values: Any) -> str:
    """A page of the package's folder ``pages``."""
    return _templates().get_template(name).render(version=__version__, **values)


@cache
def _templates() -> jinja2.Environment:
    folder = str(files("truffula.server") / "pages")
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "last_part": lambda path: path.rsplit("/", 1)[-1],
    }
    return made


async def root(request: Request) -> Response:
    """A browser gets a page to try the model. Others get what `/health` answers: 200 and an empty body, or 503."""
    if "text/html" not in request.headers.get("accept", ""):
        response = await health(request)
        response.headers["vary"] = "accept"
        return response
    return page(render("index.html"), 200 if state_of(request).service.healthy() else 503)


def reference(rows: Sequence[RouteSpec], *, keyed: bool) -> tuple[Handler, Handler]:
    """The handlers of the OpenAPI document of ``rows`` and of the page that shows it."""

    @cache
    def made() -> dict[str, Any]:
        return document_of(rows, keyed=keyed)

    def shown(url: str) -> str:
        return render("reference.html", document=made(), titles=TITLES, bounds=_BOUNDS, url=url)

    async def answer_document(request: Request) -> Response:
        return json_reply(await run_in_threadpool(made))  # the first takes a while, in which others are answered

    async def answer_page(request: Request) -> Response:
        return page(await run_in_threadpool(shown, str(request.base_url).rstrip("/")))

    return answer_document, answer_page
