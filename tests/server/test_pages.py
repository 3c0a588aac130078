"""The pages at ``/`` and ``/docs``: for browsers without the internet, and nothing of the operator's on them."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from fastapi.openapi.models import OpenAPI
from live_server import MODEL, events, ok, serving

from truffula.server import app
from truffula.server.openapi import field_help

ANTHROPIC = {"anthropic-version": "2023-06-01"}
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
BOTH = pytest.mark.parametrize("path", ["/", "/docs"])


class Tags(HTMLParser):
    """All tags with their attributes, and whether every one is closed in order."""

    VOID = frozenset({"meta", "link", "input"})

    def __init__(self, html):
        super().__init__()
        self.found, self.open = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@BOTH
def test_a_page_asks_no_other_host(live, path):
    response = live.client.get(path, headers=BROWSER)
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    tags = Tags(response.text).found
    for tag, attributes in tags:
        assert not (tag in ("script", "img", "iframe", "style") and "src" in attributes)
        for name in ("href", "src", "action"):
            assert not re.match(r"(\w+:)?//", attributes.get(name, "")), (tag, attributes)
        assert not any(name == "style" or name.startswith("on") for name in attributes)
        if tag == "link":
            assert attributes["href"].startswith("data:image/svg+xml,")
    (style,) = re.findall("<style>(.*?)</style>", response.text, re.DOTALL)
    assert "@import" not in style and "url(" not in style


@BOTH
def test_its_policy_lets_in_its_own_style_and_script_and_nothing_else(live, path):
    response = live.client.get(path, headers=BROWSER)
    policy = dict(one.split(" ", 1) for one in response.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    for kind in ("style", "script"):
        inline = re.findall(f"<{kind}[^>]*>(.*?)</{kind}>", response.text, re.DOTALL)
        assert len(inline) == (f"{kind}-src" in policy) == (1 if (kind, path) != ("script", "/docs") else 0)
        for text in inline:
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert policy.pop(f"{kind}-src") == f"'sha256-{digest}'"
    sources = {"connect-src": "'self'", "img-src": "data:"}
    assert policy == sources | dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'")
    assert response.headers["x-content-type-options"] == "nosniff"


def test_links_lead_to_routes(live):
    for path in ("/", "/docs"):
        for tag, attributes in Tags(live.client.get(path, headers=BROWSER).text).found:
            href = attributes.get("href", "#")
            if tag == "a" and not href.startswith("#"):
                assert live.client.get("/" + href.removeprefix(".")).status_code == 200
    page = Tags(live.client.get("/docs", headers=BROWSER).text).found
    names = {attributes["id"] for _, attributes in page if "id" in attributes}
    assert {a["href"][1:] for tag, a in page if tag == "a" and a["href"].startswith("#")} <= names


@pytest.mark.parametrize("accept", ["*/*", "application/json", "", "text/plain"])
def test_probes_and_curl_get_an_empty_200_as_from_lorax(live, accept):
    for method in ("GET", "HEAD"):
        response = live.client.request(method, "/", headers={"accept": accept})
        assert (response.status_code, response.content) == (200, b"")
        assert "accept" in response.headers["vary"].split(", ")


def test_with_keys_the_pages_are_open_and_hold_nothing_of_the_operators(model_folder, adapter_folders):
    options = {"api_keys": ("sk-secret",), "adapters": {"private-name": str(adapter_folders["pirate"])}}
    with serving(model_folder, **options) as guarded:
        for path in ("/", "/docs", "/openapi.json"):
            response = guarded.client.get(path, headers=BROWSER)
            assert response.status_code == 200
            for secret in ("private-name", "sk-secret", str(model_folder), MODEL):
                assert secret not in response.text
        assert "Authorization: Bearer KEY" in guarded.client.get("/docs").text
        assert guarded.client.get("/v1/models").status_code == 401
        assert ok(guarded.client.get("/openapi.json"))["security"] == [{"key": []}]


def test_the_form_sends_what_the_server_takes(live):
    """The request of the page's script, written out: its field names are looked for in the script."""
    script = live.client.get("/", headers=BROWSER).text
    body = {"model": "pirate", "max_tokens": 2, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    for path, more in (
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("v1/completions", {"prompt": "Hello"}),
    ):
        assert f'"{path}"' in script
        for name in {**body, **more}:
            assert re.search(rf"\b{name}\b", script)
        response = live.client.post(f"/{path}", json=body | more)
        assert "x-truffula-ignored" not in response.headers
        *chunks, usage, done = events(response)
        assert done == "[DONE]" and usage["usage"]["completion_tokens"] >= 1
        assert all(chunk["choices"] for chunk in chunks)
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script and "document.write" not in script


def test_the_pages_are_in_the_package():
    folder = files("truffula.server") / "pages"
    assert {one.name for one in folder.iterdir()} == {"head.html", "index.html", "reference.html", "style.css"}


def test_the_document_is_an_openapi_document_that_others_read(live):
    document = ok(live.client.get("/openapi.json"))
    assert document["openapi"].startswith("3.1")
    OpenAPI.model_validate(document)
    rows = {(row.method.lower(), row.path.replace(":path", "")) for row in app._ROUTES}
    assert {(method, path) for path, methods in document["paths"].items() for method in methods} == rows
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)
    for reference in re.findall(r'"\$ref":"#/components/schemas/(\w+)"', json.dumps(document, separators=(",", ":"))):
        assert reference in document["components"]["schemas"]


def test_the_parameters_of_queries_are_those_that_routes_read(live):
    """What the document allows is taken, another value is refused by the parameter's name, and there are no others."""
    document = ok(live.client.get("/openapi.json"))
    response = ok(live.post("/v1/responses", {"input": "Hello", "max_output_tokens": 1}))["id"]

    def ask(method, path, name, value):
        headers = ANTHROPIC if "models" in path else {}
        return live.client.request(method, path.format(response_id=response), params={name: value}, headers=headers)

    found = [
        (method.upper(), path, one["name"], one["schema"], one["description"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        for one in operation.get("parameters", ())
        if one["in"] == "query"
    ]
    for method, path, name, schema, description in found:
        assert description.endswith(".")
        for value in schema.get("enum", [schema.get("default")] * ("default" in schema)):
            streams = (name, value) == ("stream", "true")  # it was not streamed
            assert ask(method, path, name, value).status_code == (400 if streams else 200), (path, name, value)
        typed = "enum" in schema or schema["type"] == "integer"
        if typed and name not in ("format", "starting_after"):  # others than json are the text; needs stream
            refused = ask(method, path, name, "other")
            assert refused.status_code in (400, 422) and name in refused.text, refused.text
    names = {name for _, path, name, *_ in found if path == "/v1/adapters"}
    told = ask("GET", "/v1/adapters", "x", "1").json()["error"]["message"]
    assert set(re.findall(r"\w+", told.partition("use ")[2])) == names
    assert len(found) > 12


def test_every_field_is_described():
    document = app.pages.document_of(app._ROUTES + app._ADMIN_ROUTES, keyed=False)
    used = set()
    for name, schema in document["components"]["schemas"].items():
        for field, value in schema["properties"].items():
            assert value.get("description", "").endswith("."), f"server/field_help.toml says nothing of {name}.{field}"
            used.add(field)
    assert set(field_help()) <= used


@pytest.mark.parametrize("row", [row for row in app._ROUTES if row.body], ids=lambda row: row.path)
def test_the_examples_are_answered(live, row):
    response = live.post(row.path, row.example)
    assert response.status_code == 200
    assert "x-truffula-ignored" not in response.headers
    sent = json.dumps(row.example)
    page = html.unescape(live.client.get("/docs").text)
    assert f"{live.url}{row.path} " in page and sent in page


def test_the_address_in_the_examples_is_escaped(live):
    page = live.client.get("/docs", headers={"host": 'a"<b>x'}).text
    assert "<b>" not in page
