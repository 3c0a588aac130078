"""vLLM's routes that pause the engine, for trainers that replace adapters while requests run. They are an
administrator's (``--adapter-admin``), as they hold the requests of all clients.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import InvalidRequest
from truffula.server.errors import Aborted
from truffula.server.replies import json_reply
from truffula.server.state import state_of

PAUSE_MODES = ("abort", "wait", "keep")


async def pause(request: Request) -> Response:
    """Pauses the engine; later requests wait until `POST /resume`.

    ``mode``: what happens to the requests that run. ``abort`` (the default) ends them with an error, ``wait`` lets them
    end, ``keep`` holds them as they are. The answer comes when nothing is computed any more. Unless they are kept, the
    prefix cache is cleared (``clear_cache=false``: it stays). Timeouts count during a pause.
    """
    mode = request.query_params.get("mode", "abort")
    if mode not in PAUSE_MODES:
        raise InvalidRequest(f"mode: should be one of {', '.join(PAUSE_MODES)}, got {mode[:40]!r}.", param="mode")
    if flag(request, "wait_for_inflight_requests", default=False):
        mode = "wait"
    clear_cache = flag(request, "clear_cache", default=True)
    service = state_of(request).service
    await service.control("drain" if mode == "wait" else "pause")
    if mode == "abort":
        service.end_all(Aborted("The request ended because the server was paused (POST /pause)."))
    if clear_cache and mode != "keep":
        await service.control("reset_prefix_cache")
    return json_reply({"status": "paused"})


async def resume(request: Request) -> Response:
    """Ends a pause: requests that were held or waited continue."""
    await state_of(request).service.control("resume")
    return json_reply({"status": "resumed"})


async def is_paused(request: Request) -> Response:
    """Whether the engine is paused."""
    stats = state_of(request).service.known_stats()
    return json_reply({"is_paused": stats is not None and stats.paused})


async def reset_prefix_cache(request: Request) -> Response:
    """Forgets all cached prompts. Requests that run keep their own.

    Never needed after an adapter was replaced: cached blocks belong to the adapter's content, not to its name.
    """
    if flag(request, "reset_running_requests", default=False):
        raise InvalidRequest(
            "reset_running_requests: not supported, as a running request keeps its adapter and what was computed with "
            "it. POST /pause?mode=abort ends running requests.",
            param="reset_running_requests",
        )
    await state_of(request).service.control("reset_prefix_cache")
    return Response(status_code=200)


def flag(request: Request, name: str, *, default: bool) -> bool:
    """A query parameter that is true or false."""
    given = request.query_params.get(name)
    if given is None:
        return default
    if given.lower() not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"{name}: should be true or false, got {given[:40]!r}.", param=name)
    return given.lower() in ("true", "1")
