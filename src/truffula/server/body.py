"""From the bytes of a request to a validated body: strict about JSON, lenient about keys it does not know."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from truffula.errors import InvalidRequest
from truffula.server.errors import MalformedBody, UnsupportedMedia, from_validation
from truffula.server.foreign_fields import Dialect, is_ignored

log = logging.getLogger(__name__)

IGNORED_HEADER = "x-truffula-ignored"
_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HALF_PAIR = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class Body(BaseModel):
    """Base of every request body. Types are strict (a boolean is no number, a string is no integer), numbers finite.

    ``nested`` names the field whose name is left out where an error names one inside it (``parameters`` on the native
    side). ``dialect`` says which fields of other routes and servers a route refuses. With ``refuses_foreign`` those are
    all of them in this object, so the values of those still in it ask for nothing.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())
    nested: ClassVar[str | None] = None
    dialect: ClassVar[Dialect | None] = None
    refuses_foreign: ClassVar[bool] = False

    def unknown(self) -> list[str]:
        """Keys that were given and have no effect, this object's and those of the objects in it (``a.b``)."""
        names = [
            name
            for name, value in (self.model_extra or {}).items()
            if not self.refuses_foreign or is_ignored(name, value)
        ]
        for field in type(self).model_fields:
            inner = getattr(self, field)
            if isinstance(inner, Body):
                names += [f"{field}.{name}" for name in inner.unknown()]
        return names


B = TypeVar("B", bound=Body)


def decode_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``. Raises ``MalformedBody`` for anything JSON (RFC 8259) or a float64 cannot hold."""
    if not raw:
        raise MalformedBody("The body is empty; expected a JSON object.")
    try:
        value = msgspec.json.decode(raw)
    except msgspec.ValidationError as error:
        raise MalformedBody(f"The body contains a number that is not finite: {error}.") from error
    except msgspec.DecodeError as error:
        if _HALF_PAIR.search(_PAIR.sub(b"", raw)):  # the decoder calls that "truncated"
            raise MalformedBody(
                "The body contains a lone surrogate (\\ud800 to \\udfff without its other half), which is not a "
                "character."
            ) from error
        raise MalformedBody(f"The body is not valid JSON: {error}.") from error
    except UnicodeDecodeError as error:
        raise MalformedBody("The body is not valid UTF-8.") from error
    except RecursionError as error:
        raise MalformedBody("The body is nested too deeply.") from error
    if not isinstance(value, dict):
        raise MalformedBody(f"The body must be a JSON object, not {_kind(value)}.")
    _refuse_duplicates(raw)
    return value


def _refuse_duplicates(raw: bytes) -> None:
    """Raises ``MalformedBody`` for a key written twice in one object: the decoder keeps the last and says nothing."""

    def unique(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) == len(pairs):
            return
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise MalformedBody(f"The key {twice[:80]!r} appears twice in one object; send it once.", param=twice[:80])

    try:
        json.loads(raw, object_pairs_hook=unique)
    except RecursionError as error:
        raise MalformedBody("The body is nested too deeply.") from error
    except ValueError as error:
        raise MalformedBody(f"The body is not valid JSON: {error}.") from error


async def read_object(request: Request) -> dict[str, Any]:
    """The request's JSON object. The size limit is the middleware's, which raises while the body is read."""
    media = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if media and media != "application/json" and not media.endswith("+json"):
        raise UnsupportedMedia(f"Content-Type is {media!r}; send JSON with Content-Type: application/json.")
    return decode_object(await request.body())


def validate(model: type[B], value: dict[str, Any], base_names: Collection[str] = ()) -> B:
    """``value`` as a body; ``InvalidRequest`` names the first wrong field. ``base_names`` are names of the base model,
    which are no adapters wherever they stand.
    """
    if model.dialect is not None:
        model.dialect.check(value, base_names)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error, inside=model.nested or "") from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error


async def read_body(request: Request, model: type[B]) -> B:
    """The request's body as ``model``; keys without effect are noted for the log and the header."""
    return read_value(request, model, await read_object(request))


def read_value(request: Request, model: type[B], value: dict[str, Any]) -> B:
    """As ``read_body``, of an object that has been read."""
    body = validate(model, value, request.app.state.truffula.base_words)
    note_unknown(request, body)
    return body


def note_unknown(request: Request, body: Body) -> None:
    """Puts the keys without effect into the record, for the header and the log line, and logs each key once."""
    note_ignored(request, body.unknown())


def note_ignored(request: Request, names: Sequence[str]) -> None:
    """Keys of this request that have no effect, for the header and the log; added to those noted before."""
    if not names:
        return
    shown = [safe_header(name, 64) for name in names[:20]]
    if len(names) > 20:
        shown.append(f"and {len(names) - 20} more")
    record = request.state.record
    record.ignored = ", ".join([record.ignored, *shown] if record.ignored else shown)
    seen: set[str] = request.app.state.truffula.seen_unknown
    new = [name for name in shown if name not in seen]
    if new and len(seen) < 1000:
        seen.update(new)
        log.warning("ignored request keys %s on %s (logged once per key)", ", ".join(new), request.url.path)


def safe_header(text: str, limit: int = 256) -> str:
    """``text`` as a header value, printable ASCII and bounded: a client's words must not break a head."""
    short = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(c if " " <= c <= "~" else "?" for c in short).strip()


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return "a string" if isinstance(value, str) else "a list"
