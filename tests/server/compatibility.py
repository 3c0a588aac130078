"""``docs/compatibility.md``: the verdict on every route and every field.

    python tests/server/compatibility.py    rewrite the page

The page is made from the routes, the cases in ``compat_cases.py`` and the tables of ``src/truffula/server``.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from compat_cases import BODIES, CASES, Case
from verdicts import body_in

from truffula.errors import InvalidRequest
from truffula.server import unserved
from truffula.server.app import _ADMIN_ROUTES, _ROUTES
from truffula.server.body import Body, GeneratingBody, validate
from truffula.server.foreign_fields import ADAPTER_FIELDS, ALIASES, INERT, UNSUPPORTED
from truffula.server.limits import RequestLimits
from truffula.server.openapi import field_help

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
TESTS = ROOT / "tests"
ALL_ROUTES = (*_ROUTES, *_ADMIN_ROUTES)
DIALECTS = {
    "openai": "OpenAI",
    "anthropic": "Anthropic",
    "native": "LoRAX, TGI, vLLM",
    "admin": "administration",
    "probes": "all",
}
LIMITS = RequestLimits(
    max_n=16, max_best_of=2, max_prompts=128, max_stop_sequences=16, max_logprobs=20, max_model_len=160,
    vocab_size=330, queue_timeout_s=None, request_timeout_s=None, defaults={}, base_words=(),
)  # fmt: skip
_NAMES = [*(row.names for row in ALIASES), UNSUPPORTED, INERT, *ADAPTER_FIELDS.values()]
ELSEWHERE = sorted({name for names in _NAMES for name in names})
"""Every field of ``field_names.toml``."""


@cache
def bodies() -> Mapping[type[Body], list[str]]:
    """The bodies with the routes that read them."""
    found: dict[type[Body], list[str]] = {}
    for row in ALL_ROUTES:
        if row.body is not None:
            found.setdefault(row.body, []).append(row.path)
    return found


def fields_of(body: type[Body]) -> Iterator[str]:
    """The fields of a body, and of the objects in it (``a.b``) in place of these."""
    own = body.model_fields if body.route_fields is None else body.route_fields.levels[""]
    for name, info in body.model_fields.items():
        inner = None if case_of(bodies()[body], name) else body_in(info.annotation)
        if name in own:
            yield from [name] if inner is None else [f"{name}.{alias_of(inner, one)}" for one in inner.model_fields]


def alias_of(body: type[Body], name: str) -> str:
    return body.model_fields[name].alias or name


def case_of(routes: Iterable[str], name: str) -> Case | None:
    """The case of a field on these routes; one that is for them goes before one that is for all."""
    found = [case for case in CASES if name in case.fields.split() and (not case.routes or {*case.routes} & {*routes})]
    return max(found, key=lambda case: bool(case.routes), default=None)


def rows() -> list[tuple[str, str, Case | None]]:
    """Route, field and case of every field of every body; the first of its routes stands for all."""
    return [
        (route_of(body), name, case_of(paths, name)) for body, paths in bodies().items() for name in fields_of(body)
    ]


def route_of(body: type[Body]) -> str:
    """The route on which the cases of the body are sent."""
    paths = bodies()[body]
    return next((path for path in paths if path in BODIES), paths[0])


def elsewhere(body: type[Body], name: str) -> str:
    """The verdict of a route on a field of other routes and servers, as its own check says."""
    example = json.loads(json.dumps(BODIES[route_of(body)]))
    inside = example.setdefault("parameters", {}) if "parameters" in body.model_fields else example
    sent = {**inside, name: "x"}
    example = {**example, "parameters": sent} if inside is not example else sent
    try:
        read: Any = validate(body, example, LIMITS)
        if any(place.endswith(name) for place, _ in read.address().adapters):
            return "works"
        return "ignored" if any(one.endswith(name) for one in read.unknown()) else "silent"
    except InvalidRequest as error:
        assert error.param is not None and error.param.endswith(name), error
        advice = error.message.partition("; use ")[2].rstrip(".")
        return f"→ `{advice}`" if advice and " " not in advice else "refused"


def page() -> str:
    """The text of ``docs/compatibility.md``."""
    lines = [_HEAD, *_routes()]
    for body, paths in bodies().items():
        dialect = next(DIALECTS[row.tag] for row in ALL_ROUTES if row.body is body)
        lines += ["", f"## {dialect}: {', '.join(f'`{path}`' for path in paths)}", ""]
        lines += ["| field | verdict | meaning |", "|---|---|---|"]
        for name in fields_of(body):
            case = case_of(paths, name)
            assert case is not None, f"tests/server/compat_cases.py has no case of {name} on {paths[0]}"
            verdict = "ignored" if case.ignored else "refused" if case.refused else "works"
            meaning = case.note or field_help().get(name.rpartition(".")[2], "")
            lines.append(f"| `{name}` | {verdict} | {meaning} |")
    return "\n".join([*lines, *_elsewhere()]) + "\n"


def _routes() -> Iterator[str]:
    yield "| route | API | verdict |"
    yield "|---|---|---|"
    for row in ALL_ROUTES:
        path, note = row.path.replace(":path}", "}"), ", with `--adapter-admin`" if row in _ADMIN_ROUTES else ""
        yield f"| `{row.method} {path}` | {DIALECTS[row.tag]} | works{note} |"
    for path, (what, advice) in unserved._advices().items():
        if "--adapter-admin" not in advice:
            yield f"| `{path}` | {what} | refused: {advice} |"
    for what, paths in (("Embeddings", unserved._EMBEDDING_PATHS), ("Classification", unserved._CLASSIFY_PATHS)):
        yield f"| {', '.join(f'`{path}`' for path in paths)} | {what} | refused: this server generates text only |"


def _elsewhere() -> Iterator[str]:
    """The table of the fields of other APIs; names with the same verdicts share a row."""
    judged = [body for body in bodies() if issubclass(body, GeneratingBody)]
    yield _ELSEWHERE
    yield f"| fields | {' | '.join(f'`{route_of(body)}`' for body in judged)} |"
    yield "|---" * (len(judged) + 1) + "|"
    found: dict[str, list[str]] = {}
    for name in ELSEWHERE:
        found.setdefault(" | ".join(_cell(body, name) for body in judged), []).append(name)
    for cells, names in found.items():
        yield f"| {', '.join(f'`{name}`' for name in names)} | {cells} |"


def _cell(body: type[Body], name: str) -> str:
    levels = () if body.route_fields is None else body.route_fields.levels.values()
    return "own" if any(name in names for names in levels) else elsewhere(body, name)


_HEAD = """# Compatibility

<!-- Made by `python tests/server/compatibility.py`; do not edit. -->

The verdict on each route and field of the APIs that this server speaks:

- **works**: a test sends the field and sees its effect;
- **refused**: the error names the field, and what to use instead where there is something;
- **ignored**: accepted without effect on the answer, and listed in the header
  `x-truffula-ignored`; but where an alias has several adapters or a shadow, `user`, `safety_identifier` and
  Anthropic's `metadata.user_id` choose among them.

In every field, null means absent. A field that is not on this page is accepted and listed in that
header. [http-api.md](http-api.md) explains routes and fields.

## Routes
"""
_ELSEWHERE = """
## Fields of other APIs

Names that OpenAI, Anthropic, LoRAX, TGI, vLLM, SGLang, llama.cpp, Ollama, Mistral and transformers
have for fields, and a few spellings near them. *Own*: a field of the route, in its table. A name
behind an arrow is the one that the error says to use. A value that has no effect, such as
`best_of: 1`, is accepted where the field is refused.
"""


def missing(case: Case) -> str | None:
    """What is wrong with the test that a case names: it must exist and say the names of the fields."""
    file, _, name = case.test.partition("::")
    found = next(iter(TESTS.rglob(file)), None)
    if found is None:
        return f"there is no {file}"
    text = _with_helpers(found, name)
    if text is None:
        return f"{file} has no {name}"
    absent = [one for one in case.fields.split() if one.rpartition(".")[2] not in text]
    return f"{case.test} says nothing of {', '.join(absent)}" if absent else None


def _with_helpers(file: Path, name: str) -> str | None:
    """The source of a test with the functions and tables of its file that it uses."""
    source = file.read_text(encoding="utf-8")
    top: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            top[node.name] = node
        elif isinstance(node, ast.Assign):
            top |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    if name not in top:
        return None
    used, todo = {}, [name]
    while todo:
        one = todo.pop()
        if one in top and one not in used:
            node = top[one]
            used[one] = "\n".join(
                ast.get_source_segment(source, part) or "" for part in (*getattr(node, "decorator_list", ()), node)
            )
            todo += [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
            todo += [inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)]
    return "\n".join(used.values())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
