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
from html import escape
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from truffula import __version__
from truffula.server.openapi import Handler, RouteSpec, document_of
from truffula.server.probes import health
from truffula.server.replies import json_reply
from truffula.server.state import state_of

_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    "%3Cpath d='M8 9v7' stroke='%23754' stroke-width='2'/%3E%3Ccircle cx='8' cy='6' r='5.5' fill='%233a5'/%3E%3C/svg%3E"
)
TITLES: Mapping[str, str] = MappingProxyType(
    {"openai": "OpenAI", "native": "LoRAX and TGI", "probes": "State", "admin": "Administration"}
)


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


@cache
def _template(name: str) -> str:
    """A page of the package's folder ``pages``, with icon, style and version filled in."""
    folder = files("truffula.server") / "pages"
    html, style = ((folder / file).read_text(encoding="utf-8") for file in (name, "style.css"))
    return html.replace("{{icon}}", _ICON).replace("{{version}}", escape(__version__)).replace("{{style}}", style)


async def root(request: Request) -> Response:
    """A browser gets a page to try the model. Others get what `/health` answers: 200 and an empty body, or 503."""
    if "text/html" not in request.headers.get("accept", ""):
        response = await health(request)
        response.headers["vary"] = "accept"
        return response
    return page(_template("index.html"), 200 if state_of(request).service.healthy() else 503)


def reference(rows: Sequence[RouteSpec], *, keyed: bool) -> tuple[Handler, Handler]:
    """The handlers of the OpenAPI document of ``rows`` and of the page that shows it, made when first asked for."""

    @cache
    def made() -> dict[str, Any]:
        return document_of(rows, keyed=keyed)

    @cache
    def shown() -> str:
        return _reference_page(made())

    async def answer_document(request: Request) -> Response:
        return json_reply(await run_in_threadpool(made))  # the first takes a while, in which others are answered

    async def answer_page(request: Request) -> Response:
        html = await run_in_threadpool(shown)
        return page(html.replace("{{url}}", escape(str(request.base_url).rstrip("/"))))

    return answer_document, answer_page


def _reference_page(document: dict[str, Any]) -> str:
    """The API reference of ``document`` as HTML."""
    operations: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            operations.setdefault(operation["tags"][0], []).append(_operation(method.upper(), path, operation))
    parts = [f"<p>{escape(document['info']['description'])}</p>"]
    if "security" in document:
        parts.append("<p>Requests carry an API key: <code>Authorization: Bearer KEY</code>.</p>")
    for tag, found in operations.items():
        parts += [f'<h2 id="{tag}">{escape(TITLES[tag])}</h2>', *found]
    parts.append('<h2 id="fields">Fields</h2>')
    for name, schema in document["components"]["schemas"].items():
        parts.append(f'<h3 id="{name}">{name}</h3>\n{_fields(schema)}')
    links = "".join(f'<a href="#{tag}">{escape(TITLES[tag])}</a>' for tag in operations)
    return _template("reference.html").replace("{{links}}", links).replace("{{body}}", "\n".join(parts))


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    out = f"<h3>{method} {escape(path)}</h3>\n<p>{_code(operation['summary'])}</p>"
    if (body := operation.get("requestBody")) is not None:
        content = body["content"]["application/json"]
        name = content["schema"]["$ref"].rsplit("/", 1)[-1]
        out += f'\n<p class="soft">Body: <a href="#{name}">{name}</a></p>'
        if "example" in content:
            sent = json.dumps(content["example"], ensure_ascii=False)
            curl = f"curl {{{{url}}}}{path} -H 'Content-Type: application/json' -d '{sent}'"
            out += f"\n<pre>{escape(curl)}</pre>"
    return out


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = []
    for name, field in schema.get("properties", {}).items():
        kind = _type(field) + (", required" if name in required else "")
        rows.append(f"<tr><td>{escape(name)}</td><td>{kind}</td><td>{escape(field.get('description', ''))}</td></tr>")
    return "<table>" + "".join(rows) + "</table>"


_BOUNDS = MappingProxyType(
    {"minimum": "≥ {}", "exclusiveMinimum": "&gt; {}", "maximum": "≤ {}", "exclusiveMaximum": "&lt; {}"}
)


def _type(field: dict[str, Any]) -> str:
    """A field's type in words, as HTML; null is left out, as every field may be absent."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return escape(", ".join(map(str, field["enum"])))
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    bounds = [text.format(field[name]) for name, text in _BOUNDS.items() if name in field]
    return " ".join([field.get("type", "string"), *bounds])
