"""``/v1/models``: the base first, then the adapters a client may name. Anthropic's clients get them in their form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import InvalidRequest, ModelNotFound
from truffula.lora.sources import BASE_WORDS
from truffula.server.auth import access_of
from truffula.server.errors import dialect_of_request
from truffula.server.keys import Caller
from truffula.server.replies import json_reply
from truffula.server.state import ServerState, state_of


def entry(state: ServerState, name: str | None) -> dict[str, Any]:
    """One model; ``name`` None is the base."""
    base = state.model_id
    return {
        "id": name or base,
        "object": "model",
        "created": state.created,
        "owned_by": "truffula",
        "root": name or state.service.info.model,
        "parent": base if name else None,
        "max_model_len": state.service.info.max_model_len,
        "permission": [_permission(state.created)],
    }


def _permission(created: int) -> dict[str, Any]:
    """What OpenAI's old clients and vLLM's read of every model: it may be sampled."""
    return {
        "id": "modelperm-truffula",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def anthropic_entry(state: ServerState, name: str | None) -> dict[str, Any]:
    """``entry`` in Anthropic's form."""
    limit = state.service.info.max_model_len
    return {
        "type": "model",
        "id": name or state.model_id,
        "display_name": name or state.model_id,
        "created_at": datetime.fromtimestamp(state.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": limit,
        "max_tokens": limit,
    }


def anthropic_page(query: Mapping[str, str], ids: Sequence[str]) -> tuple[int, int]:
    """Where the page that ``query`` asks for begins and ends. Raises ``InvalidRequest``."""
    given = query.get("limit", "20")
    limit = int(given) if given.isascii() and given.isdigit() and len(given) < 5 else 0
    if not 1 <= limit <= 1000:
        raise InvalidRequest(f"limit is {given[:20]!r}; it must be from 1 to 1000.", param="limit")
    for name in ("after_id", "before_id"):
        if name in query and query[name] not in ids:
            raise InvalidRequest(f"{name} is {query[name][:80]!r}, and no model has this id.", param=name)
    if "before_id" in query:
        end = ids.index(query["before_id"])
        return max(0, end - limit), end
    start = ids.index(query["after_id"]) + 1 if "after_id" in query else 0
    return start, min(len(ids), start + limit)


async def list_models(request: Request) -> Response:
    """Lists the base model and the adapters that requests may name."""
    state = state_of(request)
    if dialect_of_request(request.scope) == "anthropic":
        names = await state.models(access_of(request))
        ids = [name or state.model_id for name in names]
        start, end = anthropic_page(request.query_params, ids)
        page = [anthropic_entry(state, name) for name in names[start:end]]
        more = start > 0 if "before_id" in request.query_params else end < len(ids)
        first, last = (ids[start], ids[end - 1]) if page else (None, None)
        return json_reply({"data": page, "has_more": more, "first_id": first, "last_id": last})
    rows = [entry(state, name) for name in await state.models(access_of(request))]
    return json_reply({"object": "list", "data": rows})


async def one_model(request: Request) -> Response:
    """One entry of that list. The id may contain slashes."""
    state = state_of(request)
    name: str = request.path_params["model_id"]
    if not name or (name in BASE_WORDS and name != state.model_id):
        raise ModelNotFound(f"There is no model {name!r}.", param="model")
    adapter = await state.named_model(name, None, Caller(access_of(request)))
    made = anthropic_entry if dialect_of_request(request.scope) == "anthropic" else entry
    return json_reply(made(state, None if adapter is None else name))
