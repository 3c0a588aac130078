"""``docs/compatibility.md`` says what the server does: each field of each route has a case, and each case is true."""

from __future__ import annotations

import json
from typing import Any

import pytest
from compat_cases import BODIES, CASES, Case, Seen
from compatibility import ALL_ROUTES, ELSEWHERE, PAGE, bodies, elsewhere, fields_of, missing, page, route_of, rows
from live_server import Live

from truffula.server.body import GeneratingBody

ROWS = rows()
SENT = [row for row in ROWS if row[2] is not None and not row[2].test]
NEW = {"id", "created", "created_at", "completed_at", "item_id", "request_id", "model"}


def test_every_field_has_a_case_and_every_case_a_field():
    assert [f"{route} {name}" for route, name, case in ROWS if case is None] == []
    used = {(id(case), name) for _, name, case in ROWS}
    assert [name for case in CASES for name in case.fields.split() if (id(case), name) not in used] == []


def test_the_page_is_as_made():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/server/compatibility.py"


@pytest.mark.parametrize("case", [case for case in CASES if case.test], ids=lambda case: case.test)
def test_tests_that_cases_name_exist(case):
    assert missing(case) is None


def plain(value: Any) -> Any:
    """An answer without what differs each time."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items() if name not in NEW}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def put(route: str, body: dict[str, Any], name: str, value: Any) -> None:
    """Adds a field, under the name that the route has for it."""
    spec = next(row.body for row in ALL_ROUTES if row.path == route and row.method == "POST")
    fields = spec.route_fields
    path = (None if "." in name or fields is None else fields.path_of(name)) or name
    outer, _, inner = path.partition(".")
    if inner:
        body.setdefault(outer, {})[inner] = value
    else:
        body[outer] = value


def send(live: Live, route: str, base: Seen | None, fields: dict[str, Any]) -> Seen:
    body = json.loads(json.dumps(BODIES[route]))
    for name, value in fields.items():
        put(route, body, name, value)
    response = live.post(route, body)
    assert response.status_code == 200, response.text
    streamed = response.headers["content-type"].startswith("text/event-stream")
    found = [line for line in response.text.splitlines() if line.startswith("data: {")] if streamed else response.json()
    found = [json.loads(line.removeprefix("data: ")) for line in found] if streamed else found
    return Seen(found, response.headers, base, lambda **more: send(live, route, base, {**fields, **more}))


@pytest.mark.parametrize(("route", "name", "case"), SENT, ids=[f"{route} {name}" for route, name, _ in SENT])
def test_a_field_has_its_effect(live: Live, route: str, name: str, case: Case):
    given = dict(case.given)
    base = send(live, route, None, given)
    value = case.value(base) if callable(case.value) else case.value
    seen = send(live, route, base, {**given, name: value})
    listed = seen.headers.get("x-truffula-ignored", "").split(", ")
    assert any(one == name or one.startswith(f"{name}.") for one in listed) == case.ignored
    if case.ignored:
        assert plain(seen.json) == plain(base.json)
        return
    if case.same_as is not None:
        assert plain(seen.json) == plain(send(live, route, None, {**given, **case.same_as}).json)
    if case.check is not None:
        assert case.check(seen), seen.json
    elif case.same_as is None:
        assert plain(seen.json) != plain(base.json)


@pytest.mark.parametrize("body", [body for body in bodies() if issubclass(body, GeneratingBody)], ids=lambda b: b.__name__)
def test_a_field_of_another_api_is_never_dropped_in_silence(body):
    own = {name.rpartition(".")[2] for name in fields_of(body)}
    assert [name for name in ELSEWHERE if name not in own and elsewhere(body, name) == "silent"] == []
