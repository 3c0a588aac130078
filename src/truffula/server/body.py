"""From the bytes of a request to a validated body: strict about JSON, lenient about keys it does not know."""

from __future__ import annotations

import json
import logging
import math
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema
from starlette.requests import Request

from truffula.errors import InvalidRequest, TruffulaError
from truffula.json_text import json_value
from truffula.server.adapter_mix import AdapterMix
from truffula.server.errors import MalformedBody, UnsupportedMedia, from_validation
from truffula.server.foreign_fields import RouteFields, is_ignored
from truffula.server.limits import RequestLimits
from truffula.server.state import record_of, state_of
from truffula.types import GenerateRequest, TextSource

log = logging.getLogger(__name__)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class FirstError:
    """For a list's annotation: validation ends at its first wrong item. (pydantic's own ``FailFast`` has no hash, which
    a member of a union needs.)
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return {**handler(source), "fail_fast": True}


Ids = Annotated[list[int], FirstError()]
Strings = Annotated[list[str], FirstError()]
Objects = Annotated[list[dict[str, Any]], FirstError()]


class Body(BaseModel):
    """Base of every request body. Types are strict (a boolean is no number, a string is no integer), numbers finite.

    ``nested`` names the field whose name is left out where an error names one inside it (``parameters`` on native
    routes). ``route_fields`` says which fields of other routes and servers a route refuses. With ``refuses_foreign``
    those are all of them in this object, so those that are left have values without effect. ``without_effect`` are
    fields that are accepted only because clients send them.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())
    nested: ClassVar[str | None] = None
    route_fields: ClassVar[RouteFields | None] = None
    refuses_foreign: ClassVar[bool] = False
    without_effect: ClassVar[tuple[str, ...]] = ()

    def given(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the fields ``names`` that are not null."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def items(self) -> list[tuple[str, Any]]:
        """The fields and the unknown keys that are not null, each with its value."""
        held = (vars(self), self.model_extra or {})
        return [item for values in held for item in values.items() if item[1] is not None]

    def unknown(self) -> list[str]:
        """Keys that were given and have no effect, this object's and those of the objects in it (``a.b``)."""
        names = [
            name
            for name, value in (self.model_extra or {}).items()
            if not self.refuses_foreign or is_ignored(name, value)
        ]
        for field, inner in vars(self).items():
            if isinstance(inner, Body):
                names += [f"{field}.{name}" for name in inner.unknown()]
        return names + [name for name in self.without_effect if getattr(self, name)]

    def field_of(self, name: str) -> str:
        """The field that gave what ``GenerateRequest`` calls ``name``; "" where the client gave none."""
        if name == "thinking_budget":
            return "thinking_token_budget"
        return f"chat_{name}" if name.startswith("template_kwargs.") else name


class Address(NamedTuple):
    """What a body says of its adapter and its sender.

    ``models`` are its values of ``model``, ``adapters`` the other fields that name an adapter, each with its place.
    ``token`` is the client's own credential for the adapter's source. ``user`` is the field that says for whom the
    request is made, and the id in it.
    """

    models: list[str | None]
    adapters: list[tuple[str, str | AdapterMix]]
    source: str | None
    salt: str | None
    request_id: str | None = None
    token: str | None = None
    user: tuple[str, str] | None = None

    def __repr__(self) -> str:
        return f"Address({self.models}, {self.adapters})"


class BodyJob(NamedTuple):
    """A large body, for a text worker. ``texts``: those of its adapter that prompts are made with; until they are
    ``known``, the base's are tried, and what fails with them is left out."""

    kind: str
    raw: bytes
    limits: RequestLimits
    stored: bytes = b""
    texts: TextSource | None = None
    known: bool = False


class GeneratingBody(Body):
    """A body that asks for text."""

    refuses_foreign: ClassVar[bool] = True
    repeated: ClassVar[tuple[str, ...]] = ()
    """Fields that the reply repeats."""
    user_fields: ClassVar[Mapping[str, str]] = MappingProxyType({"safety_identifier": "", "user": ""})
    """The fields that may say for whom a request is made; of an object the name in it that does."""

    @abstractmethod
    def requests(
        self, limits: RequestLimits, *, streams: bool, stored: Mapping[str, Any] | None = None
    ) -> list[GenerateRequest]:
        """The body's requests, without what ``address`` says. ``stored`` has the items of each id of ``wanted``.

        Raises ``InvalidRequest``.
        """

    @abstractmethod
    def address(self) -> Address: ...

    @property
    def end_user(self) -> tuple[str, str] | None:
        """The field that says for whom the request is made, and the id in it."""
        for field, inner in self.user_fields.items():
            value = (self.model_extra or {}).get(field)
            value = value.get(inner) if inner and isinstance(value, dict) else value
            if isinstance(value, str) and value:
                return field, value
        return None

    @property
    def wanted(self) -> list[str]:
        """The stored responses and items that it refers to, each with its id after a colon."""
        return []

    @property
    def characters(self) -> int:
        """How many characters its texts have, for LoRAX's header."""
        return 0


B = TypeVar("B", bound=Body)


def as_sent(error: TruffulaError, body: Body) -> TruffulaError:
    """``error`` with the field's name in ``body`` where the layers below know it by another one."""
    field = "" if error.param is None or error.data.get("verbatim") else body.field_of(error.param)
    if field in ("", error.param):
        return error
    message = re.sub(rf"\b{re.escape(str(error.param))}\b", field, error.message)
    return TruffulaError.from_info(msgspec.structs.replace(error.info(), param=field, message=message))


def decode_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``. Raises ``MalformedBody`` for anything that JSON (RFC 8259) or a float64 cannot hold,
    and for a key that is written twice in one object.
    """
    if not raw:
        raise MalformedBody("The body is empty; expected a JSON object.")
    try:
        value = json_value(raw.decode(), _DECODER.decode)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise MalformedBody("The body is not valid UTF-8.") from error
    except UnicodeEncodeError as error:
        raise MalformedBody(
            "The body contains a lone surrogate (\\ud800 to \\udfff without its other half), which is not a character."
        ) from error
    except ValueError as error:
        raise MalformedBody(f"The body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise MalformedBody("The body must be a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0][:80]
        shown = twice.encode("utf-8", "replace").decode()
        raise MalformedBody(f"The key {shown!r} appears twice in one object; send it once.", param=shown)
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise MalformedBody(f"The body contains a number that is not finite: {text[:40]}.")
    return number


def _refuse_constant(name: str) -> None:
    raise MalformedBody(f"The body contains {name}, which is not JSON.")


def raw_body(request: Request) -> bytes:
    """The request's bytes, said to be JSON."""
    media = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if media and media != "application/json" and not media.endswith("+json"):
        raise UnsupportedMedia(f"Content-Type is {media!r}; send JSON with Content-Type: application/json.")
    body: bytes = request.state.raw_body
    return body


def validate(model: type[B], value: dict[str, Any], limits: RequestLimits) -> B:
    """``value`` as a body; ``InvalidRequest`` names the first wrong field.

    Lengths are checked first, and lists are validated up to their first invalid item, so that an invalid body is
    rejected quickly, however long it is.
    """
    limits.check_lengths(value)
    if model.route_fields is not None:
        model.route_fields.check(value, limits.base_words)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error, inside=model.nested or "") from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant)


async def read_body(request: Request, model: type[B]) -> B:
    """The request's body as ``model``; keys without effect are noted for the log and the header."""
    body = validate(model, decode_object(raw_body(request)), state_of(request).limits)
    note_ignored(request, body.unknown())
    return body


def note_ignored(request: Request, names: Sequence[str]) -> None:
    """Adds ``names``, keys of this request without effect, to its record, for the header and the log line. Each key is
    logged once.
    """
    if not names:
        return
    shown = [safe_header(name, 64) for name in names[:20]]
    if len(names) > 20:
        shown.append(f"and {len(names) - 20} more")
    record, seen = record_of(request), state_of(request).seen_unknown
    record.ignored = ", ".join([record.ignored, *shown] if record.ignored else shown)
    new = [name for name in shown if name not in seen]
    if new and len(seen) < 1000:
        seen.update(new)
        log.warning("ignored request keys %s on %s (logged once per key)", ", ".join(new), request.url.path)


def note_left_out(request: Request, names: Iterable[str]) -> None:
    """Adds what the chat template did not use to the request's record, as the client's own fields."""
    note_ignored(request, [field for name in names if (field := request.state.body.field_of(name))])


def safe_header(text: str, limit: int = 256) -> str:
    """``text`` as a header value, printable ASCII and bounded, since clients choose it."""
    short = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(c if " " <= c <= "~" else "?" for c in short).strip()
