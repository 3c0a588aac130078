"""The one table from error codes to HTTP, and one renderer per dialect.

*Native* is LoRAX's and TGI's dialect (``/generate`` and friends): ``{"error": str, "error_type": str}``.
*OpenAI* is everything under ``/v1/``: ``{"error": {"message", "type", "param", "code"}}``.
*Anthropic* is ``/v1/messages`` and what is below it: ``{"type": "error", "error": {"type", "message"}, "request_id"}``.
*Ollama* has no routes here; its clients get errors in their own form.
The status depends on the error only, not on whether the client streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response
from starlette.types import Scope

from truffula.errors import InvalidRequest, TruffulaError

Dialect = Literal["native", "openai", "anthropic", "ollama"]


class MalformedBody(TruffulaError):
    """The body is not a JSON object, or contains what JSON cannot represent (NaN, 1e400, half a surrogate pair)."""

    code = "malformed_json"


class BodyTooLarge(TruffulaError):
    code = "body_too_large"


class SlowBody(TruffulaError):
    code = "body_timeout"


class HttpVersion(TruffulaError):
    code = "http_version"


class UnsupportedMedia(TruffulaError):
    code = "unsupported_media_type"


class Unauthorized(TruffulaError):
    code = "invalid_api_key"


class Forbidden(TruffulaError):
    """A web page of another origin, or a host name that is not the server's, where no API key protects it."""

    code = "forbidden"


class UnknownPath(TruffulaError):
    code = "not_found"


class NoResponse(TruffulaError):
    """The tenant has no stored response of this id."""

    code = "response_not_found"


class NoPreviousResponse(TruffulaError):
    """``previous_response_id`` names a response that is not stored, or one whose conversation is not stored whole."""

    code = "previous_response_not_found"


class NoEmbeddings(TruffulaError):
    code = "embedding_failure"


class NoClassification(TruffulaError):
    code = "classification_failure"


class MethodNotAllowed(TruffulaError):
    code = "method_not_allowed"


class Unhealthy(TruffulaError):
    code = "unhealthy"


class Aborted(TruffulaError):
    """The server ended the request before its last token. A client that disconnects does not see it."""

    code = "aborted"


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """Status and type of one error code per dialect. Clients of LoRAX and TGI look for ``prefix`` in messages."""

    native_status: int
    native_type: str
    prefix: str
    openai_status: int
    openai_type: str
    openai_code: str | None


_BAD = "invalid_request_error"
_SERVER = "server_error"
_INPUT = "Input validation error: "
_RUN = "Request failed during generation: "
_FULL = "Model is overloaded: "
_CUT = "Incomplete generation: "
_BRANCHES: Mapping[str, str] = MappingProxyType(
    {
        "str": "a string",
        "list[str]": "a list of strings",
        "list[int]": "a list of token ids",
        "list[list[int]]": "a list of lists of token ids",
        "list[dict[str,any]]": "a list of parts",
    }
)
SECRETS = frozenset({"api_token"})
"""Fields whose values are never repeated, whatever is wrong with them."""
_INTERNAL = ErrorRow(500, "generation", _RUN, 500, _SERVER, "internal_error")

TABLE: Mapping[str, ErrorRow] = MappingProxyType(
    {
        "invalid_request": ErrorRow(422, "validation", _INPUT, 400, _BAD, "invalid_request"),
        "prompt_too_long": ErrorRow(422, "validation", _INPUT, 400, _BAD, "context_length_exceeded"),
        "template_error": ErrorRow(422, "template_error", "Template error: ", 400, _BAD, "template_error"),
        "malformed_json": ErrorRow(400, "validation", _INPUT, 400, _BAD, "malformed_json"),
        "body_too_large": ErrorRow(413, "validation", _INPUT, 413, _BAD, "body_too_large"),
        "body_timeout": ErrorRow(408, "validation", _INPUT, 408, _BAD, "body_timeout"),
        "http_version": ErrorRow(505, "validation", _INPUT, 505, _BAD, "http_version"),
        "unsupported_media_type": ErrorRow(415, "validation", _INPUT, 415, _BAD, "unsupported_media_type"),
        "invalid_api_key": ErrorRow(401, "authentication", "", 401, "authentication_error", "invalid_api_key"),
        "forbidden": ErrorRow(403, "forbidden", "", 403, _BAD, "forbidden"),
        "not_found": ErrorRow(404, "not_found", "", 404, _BAD, "not_found"),
        "response_not_found": ErrorRow(404, "not_found", "", 404, _BAD, "response_not_found"),
        "previous_response_not_found": ErrorRow(422, "validation", _INPUT, 400, _BAD, "previous_response_not_found"),
        "store_failed": ErrorRow(500, "generation", "", 500, _SERVER, "store_failed"),
        "embedding_failure": ErrorRow(422, "embedding_failure", "", 400, _BAD, "embedding_failure"),
        "classification_failure": ErrorRow(422, "classification_failure", "", 400, _BAD, "classification_failure"),
        "method_not_allowed": ErrorRow(405, "method_not_allowed", "", 405, _BAD, "method_not_allowed"),
        "model_not_found": ErrorRow(424, "generation", _RUN, 404, _BAD, "model_not_found"),
        "adapter_not_found": ErrorRow(424, "generation", _RUN, 404, _BAD, "model_not_found"),
        "adapter_invalid": ErrorRow(424, "generation", _RUN, 400, _BAD, "adapter_invalid"),
        "adapter_load_failed": ErrorRow(424, "generation", _RUN, 503, _SERVER, "adapter_load_failed"),
        "adapter_exists": ErrorRow(409, "conflict", "", 409, _BAD, "adapter_exists"),
        "generation_mismatch": ErrorRow(409, "conflict", "", 409, _BAD, "generation_mismatch"),
        "insufficient_memory": ErrorRow(424, "generation", _RUN, 400, _BAD, "insufficient_memory"),
        "overloaded": ErrorRow(429, "overloaded", _FULL, 429, "rate_limit_error", "overloaded"),
        "queue_timeout": ErrorRow(503, "overloaded", _FULL, 503, _SERVER, "queue_timeout"),
        "shutting_down": ErrorRow(503, "overloaded", _FULL, 503, _SERVER, "shutting_down"),
        "deadline_exceeded": ErrorRow(504, "generation", _RUN, 504, _SERVER, "deadline_exceeded"),
        "engine_died": ErrorRow(503, "incomplete_generation", _CUT, 503, _SERVER, "engine_died"),
        "checkpoint_changed": ErrorRow(503, "incomplete_generation", _CUT, 503, _SERVER, "checkpoint_changed"),
        "aborted": ErrorRow(500, "incomplete_generation", _CUT, 500, _SERVER, "aborted"),
        "generation_failed": ErrorRow(424, "generation", _RUN, 500, _SERVER, "generation_failed"),
        "grammar_failed": ErrorRow(424, "generation", _RUN, 400, _BAD, "grammar_failed"),
        "no_tokenizer": ErrorRow(404, "no fast tokenizer", "", 404, _BAD, "no_tokenizer"),
        "unhealthy": ErrorRow(503, "healthcheck", "", 503, _SERVER, "unhealthy"),
        # These end a start; a client sees one only when the server has a bug.
        **dict.fromkeys(
            (
                *("internal_error", "config_invalid", "process_failed", "missing_dependency", "model_unsupported"),
                *("checkpoint_invalid", "checkpoint_tying", "kernel_error", "device_lost", "wire_error"),
            ),
            _INTERNAL,
        ),
    }
)


# OpenAI's and vLLM's routes outside of /v1: what a client asks for whose base_url lacks the /v1, and vLLM's own.
_OPENAI_ROOTS = ("/chat/completions", "/completions", "/models", "/responses", "/embeddings", "/score", "/pooling")
_ANTHROPIC_TYPES: Mapping[int, str] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        504: "timeout_error",
        529: "overloaded_error",
    }
)
# Anthropic's 429 is about a client's own limits, which this server does not have.
_ANTHROPIC_STATUSES: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("overloaded", "queue_timeout", "shutting_down"), 529)
)


def dialect_of(path: str) -> Dialect:
    """The dialect of a path, which decides the form of its errors."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    if path == "/v1" or path.startswith("/v1/") or path in _OPENAI_ROOTS:
        return "openai"
    return "ollama" if path.startswith("/api/") else "native"


def dialect_of_request(scope: Scope) -> Dialect:
    """The dialect of a request: its path's. Under /v1/ Anthropic's clients are known by a header."""
    dialect = dialect_of(scope["path"])
    if dialect == "openai" and any(name == b"anthropic-version" for name, _ in scope["headers"]):
        return "anthropic"
    return dialect


def row_of(code: str) -> ErrorRow:
    """The table's row; an unknown code, such as a newer peer's, is an internal error."""
    return TABLE.get(code, _INTERNAL)


def status_of(error: TruffulaError, dialect: Dialect) -> int:
    row = row_of(error.code)
    if dialect == "anthropic" and error.code in _ANTHROPIC_STATUSES:
        return _ANTHROPIC_STATUSES[error.code]
    return row.native_status if dialect == "native" else row.openai_status


def error_body(error: TruffulaError, dialect: Dialect, request_id: str | None = None) -> dict[str, Any]:
    """The JSON object of ``error`` in ``dialect``; in a stream it is one frame, else the whole body."""
    row = row_of(error.code)
    message = error.message or error.code
    if dialect == "native":
        if row.native_type == "validation" and not error.data.get("verbatim"):
            message = message.replace("max_tokens", "max_new_tokens")  # the layers below know it by OpenAI's name
        text = message if message.startswith(row.prefix) else row.prefix + message
        return {"error": text, "error_type": row.native_type}
    if dialect == "ollama":
        return {"error": message}
    if dialect == "anthropic":
        status = status_of(error, dialect)
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else _BAD)
        if error.code == "prompt_too_long":
            message = f"prompt is too long: {message}"  # by these words Claude Code knows that it must shorten it
        details = {"details": error.data["details"]} if "details" in error.data else {}
        return {"type": "error", "error": {"type": kind, "message": message, **details}, "request_id": request_id}
    # In this dialect adapters are models, whatever field named one.
    param = "model" if error.code in ("adapter_not_found", "model_not_found") else error.param
    return {
        "error": {"message": message, "type": row.openai_type, "param": param, "code": row.openai_code},
    }


def error_headers(error: TruffulaError, dialect: Dialect) -> dict[str, str]:
    """``Retry-After`` in whole seconds where trying again makes sense; the challenge on 401."""
    status = status_of(error, dialect)
    if status in (429, 503, 529):
        return {"retry-after": str(max(1, round(float(error.data.get("retry_after_s", 1)))))}
    if status == 401:
        return {"www-authenticate": "Bearer"}
    return {}


def render(error: TruffulaError, dialect: Dialect, request_id: str | None = None) -> Response:
    """The answer with ``error``, in the form of ``dialect``."""
    body = msgspec.json.encode(error_body(error, dialect, request_id))
    return Response(body, status_of(error, dialect), error_headers(error, dialect), "application/json")


def from_validation(error: ValidationError, *, inside: str = "") -> InvalidRequest:
    """Pydantic's list as one error that names the first invalid field; inputs are never repeated whole."""
    found = error.errors(include_url=False, include_context=False)
    where = _place(found[0]["loc"])
    words: list[str] = []
    for item in found:
        if _place(item["loc"]) == where and (text := _words(item)) not in words:
            words.append(text)
    param = where.removeprefix(f"{inside}.") if inside else where
    more = len({_place(item["loc"]) for item in found}) - 1
    also = f" ({more} more invalid field{'s' if more > 1 else ''}.)" if more else ""
    if found[0]["type"] == "missing":
        return InvalidRequest(f"{param} is required.{also}", param=param)
    shown = type(found[0]["input"]).__name__ if param in SECRETS else _shown(found[0]["input"])
    return InvalidRequest(f"{param}: {' or '.join(words[:4])}, got {shown}.{also}", param=param)


def _words(item: ErrorDetails) -> str:
    """What the field must be: the union's branch where there is one, else pydantic's sentence or a validator's own."""
    branch = next((part for part in item["loc"] if isinstance(part, str) and _is_branch(part)), None)
    if branch is not None:
        return f"should be {_BRANCHES.get(branch, branch)}"
    if item["type"] in ("model_type", "dict_type"):
        return "should be an object"
    return item["msg"].removeprefix("Input ").removeprefix("Value error, ").rstrip(".")


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place(loc: tuple[int | str, ...]) -> str:
    """``messages[0].content``: pydantic's path up to the first union, whose branches are internal."""
    out = ""
    for part in loc:
        if isinstance(part, int):
            out += f"[{part}]"
        elif _is_branch(part):
            break
        else:
            out += f".{part}" if out else part
    return out or "body"


def _is_branch(part: str) -> bool:
    return part in ("str", "int", "float", "bool") or "[" in part
