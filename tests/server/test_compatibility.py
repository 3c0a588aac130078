"""``docs/compatibility.md`` says what the server does: each field of each route has a case, and each case is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from compat_cases import BODIES, CASES, TEMPLATE, Case, Seen, plain
from compatibility import ALL_ROUTES, ELSEWHERE, PAGE, TESTS, bodies, elsewhere, fields_of, missing, page, rows
from live_server import Live, serving

from truffula.server.body import GeneratingBody

ROWS = rows()
SENT = [row for row in ROWS if row[2] is not None and not row[2].test]


@pytest.fixture(scope="module")
def live(model_folder, adapter_folders, tmp_path_factory) -> Iterator[Live]:
    """A server whose template writes all that it is given."""
    template = tmp_path_factory.mktemp("template") / "all.jinja"
    template.write_text(TEMPLATE)
    pirate = {"pirate": str(adapter_folders["pirate"])}
    with serving(model_folder, adapters=pirate, chat_template=template, max_model_len=200, backend="auto") as found:
        yield found


def test_every_field_has_a_case_and_every_case_a_field():
    assert [f"{route} {name}" for route, name, case in ROWS if case is None] == []
    used = {(id(case), name) for _, name, case in ROWS}
    assert [name for case in CASES for name in case.fields.split() if (id(case), name) not in used] == []


def test_the_page_is_as_made():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/server/compatibility.py"


def test_every_route_has_a_test():
    texts = "".join(file.read_text() for file in TESTS.rglob("test_*.py"))
    ends = {row.path: [part for part in row.path.split("/") if not part.startswith("{")][-1] for row in ALL_ROUTES}
    assert [path for path, end in ends.items() if path not in texts and end not in texts] == []


@pytest.mark.parametrize("case", [case for case in CASES if case.test], ids=lambda case: case.test)
def test_tests_that_cases_name_exist(case):
    assert missing(case) is None


class Refused(Exception):
    """The answer is an error, of this text."""


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
    if response.status_code != 200:
        raise Refused(response.text)
    streamed = response.headers["content-type"].startswith("text/event-stream")
    found = [line for line in response.text.splitlines() if line.startswith("data: {")] if streamed else response.json()
    found = [json.loads(line.removeprefix("data: ")) for line in found] if streamed else found
    return Seen(found, response.headers, base, lambda **more: send(live, route, base, {**fields, **more}))


@pytest.mark.parametrize(("route", "name", "case"), SENT, ids=[f"{route} {name}" for route, name, _ in SENT])
def test_a_field_has_its_effect(live: Live, route: str, name: str, case: Case):
    given = dict(case.given)
    base = send(live, route, None, given)
    value = case.value(base) if callable(case.value) else case.value
    if case.refused:
        with pytest.raises(Refused, match=name):
            send(live, route, base, {**given, name: value})
        return
    seen = send(live, route, base, {**given, name: value})
    listed = seen.headers.get("x-truffula-ignored", "").split(", ")
    assert any(one == name or one.startswith(f"{name}.") for one in listed) == case.ignored
    if case.ignored or case.neutral:
        assert seen.answer == base.answer
        return
    if case.same_as is not None:
        assert seen.answer == send(live, route, None, {**given, **case.same_as}).answer != base.answer
    if case.check is not None:
        assert case.check(seen), seen.json
    elif case.same_as is None:
        assert plain(seen.json) != plain(base.json)


@pytest.mark.parametrize(
    "body", [body for body in bodies() if issubclass(body, GeneratingBody)], ids=lambda b: b.__name__
)
def test_a_field_of_another_api_is_never_dropped_in_silence(body):
    own = {name.rpartition(".")[2] for name in fields_of(body)}
    assert [name for name in ELSEWHERE if name not in own and elsewhere(body, name) == "silent"] == []
