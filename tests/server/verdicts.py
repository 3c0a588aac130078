"""What this server does with each field that the SDKs can send, told from the body models and ``field_names.toml``.

``works``: a field of the route. ``refused``: an error names it. ``ignored``: accepted without effect, and listed in
``x-truffula-ignored``. A field without a verdict is one that nobody has judged.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typing_extensions import is_typeddict

from truffula.server.app import _ROUTES
from truffula.server.body import Body
from truffula.server.foreign_fields import _ALIASES, INERT, UNSUPPORTED, squeezed

Verdict = Literal["works", "refused", "ignored"]


@dataclass(frozen=True)
class Row:
    """A field of an SDK's request. ``field`` is dotted inside an object, ``hint`` the SDK's type of it."""

    sdk: str
    route: str
    field: str
    hint: Any
    verdict: Verdict | None


def body_of(route: str) -> type[Body] | None:
    """The body of the route, None where this server lacks it."""
    return next((row.body for row in _ROUTES if row.method == "POST" and row.path == route), None)


def verdict_of(body: type[Body], name: str) -> Verdict | None:
    """The verdict on ``name`` in an object that ``body`` describes."""
    route = body.route_fields
    own = route.levels[""] if route is not None else frozenset(body.model_fields)
    if name in own:
        return "ignored" if name in body.without_effect else "works"
    if name in INERT:
        return "ignored"
    if route is not None and (name in UNSUPPORTED or squeezed(name) in _ALIASES):
        return "refused"
    return None if route is not None else "ignored"  # other keys inside an object of a route are listed


def members(hint: Any) -> Iterator[Any]:
    """The types in a hint, without the wrappers around them."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType) or str(origin).endswith(("Annotated", "Required", "NotRequired")):
        for one in get_args(hint)[: None if origin in (Union, types.UnionType) else 1]:
            yield from members(one)
    else:
        yield hint


def body_in(hint: Any) -> type[Body] | None:
    """The ``Body`` that describes a field which is an object, if one does."""
    return next((one for one in members(hint) if isinstance(one, type) and issubclass(one, Body)), None)


def rows_of(sdk: str, route: str, params: Iterable[Any]) -> list[Row]:
    """The verdicts on every field of ``params`` (TypedDicts), and of the objects in them that a ``Body`` describes."""
    body = body_of(route)
    assert body is not None, f"this server has no route {route}"
    found: dict[str, Row] = {}
    for one in params:
        for name, hint in get_type_hints(one).items():
            found.setdefault(name, Row(sdk, route, name, hint, verdict_of(body, name)))
            field = body.model_fields.get(name)
            inner = None if field is None else body_in(field.annotation)
            for held in members(hint) if inner is not None else ():
                if is_typeddict(held):
                    for key, type_ in get_type_hints(held).items():
                        path = f"{name}.{key}"
                        found.setdefault(path, Row(sdk, route, path, type_, verdict_of(inner, key)))
    return list(found.values())


def openai_rows() -> list[Row]:
    """Every field of the requests of the installed openai SDK on the routes of this server."""
    from openai.types import completion_create_params, decision_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from openai.types.responses import response_create_params

    def both(module: Any, name: str) -> list[Any]:
        return [getattr(module, f"{name}{end}") for end in ("NonStreaming", "Streaming")]

    return [
        *rows_of("openai", "/v1/chat/completions", both(chat_create_params, "CompletionCreateParams")),
        *rows_of("openai", "/v1/completions", both(completion_create_params, "CompletionCreateParams")),
        *rows_of("openai", "/v1/responses", both(response_create_params, "ResponseCreateParams")),
        *rows_of("openai", "/v1/decisions", [decision_create_params.DecisionCreateParams]),
    ]
