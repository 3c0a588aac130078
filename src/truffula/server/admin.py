"""vLLM's adapter administration, served only with ``--adapter-admin``, since a path is a path of this machine; and the
list of adapters with what the engine knows of each, which tells where they lie only then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import AdapterNotFound, ConfigError, InvalidRequest
from truffula.lora.sources import AdapterDirectory, reserved
from truffula.server.body import Body, read_body
from truffula.server.replies import json_reply
from truffula.server.state import ServerState, state_of
from truffula.types import AdapterCommand, AdapterRef, AdapterState


class LoadBody(Body):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool | None = None


class UnloadBody(Body):
    lora_name: str = Field(min_length=1)


STATUSES = ("resident", "uploading", "ready", "loading", "failed", "retired")
"""Of several generations of one adapter, the first of these is shown."""


async def list_adapters(request: Request) -> Response:
    """Every adapter that can be named now: status, rank and size as the engine has them. ``source`` and the error of a
    failed load name paths, so they are only given where clients may load by path."""
    state = state_of(request)
    found = await state.service.adapters(AdapterCommand(action="list"))
    known = {one.name: one for one in sorted(found, key=lambda one: -STATUSES.index(one.status))}
    names = await state.adapter_names()
    sources = await state.service.look_up(_sources, state, names) if state.config.adapter_admin else None
    return json_reply({"object": "list", "data": [_row(name, known.get(name), sources) for name in names]})


def _sources(state: ServerState, names: Iterable[str]) -> dict[str, str]:
    """Name → folder or Hub id of the adapters that are still there; asks the file system."""
    found = {}
    for name in names:
        with contextlib.suppress(AdapterNotFound):  # removed since it was listed
            if (ref := state.service.core.resolve_adapter(name)) is not None:
                found[name] = ref.locator
    return found


def _row(name: str, found: AdapterState | None, sources: Mapping[str, str] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"id": name, "status": "not loaded", "rank": None, "size_bytes": None}
    if found is not None:
        row |= {"status": found.status, "rank": found.rank or None, "size_bytes": found.nbytes or None}
    if sources is not None:
        row["source"] = sources.get(name)
        row["error"] = None if found is None or found.error is None else found.error.message
    return row


async def load_adapter(request: Request) -> Response:
    """Loads an adapter from a folder of the server's machine. The answer comes once requests can name it."""
    state = state_of(request)
    body = await read_body(request, LoadBody)
    name = body.lora_name
    if reserved(name, state.base_names):
        raise InvalidRequest(
            f"{name[:80]!r} means the base model; choose another name for the adapter.", param="lora_name"
        )
    if name in await state.adapter_names() and not body.load_inplace:
        raise InvalidRequest(f"{name!r} is already loaded; send load_inplace: true to replace it.", param="lora_name")
    ref = await state.service.look_up(_find, state.directory, name, body.lora_path)
    await state.service.adapters(AdapterCommand(action="load", ref=ref))
    state.directory.add(ref)
    return json_reply(f"Success: LoRA adapter '{name}' added successfully.")


def _find(directory: AdapterDirectory, name: str, path: str) -> AdapterRef:
    """The adapter at ``path`` by its new name; asks the file system."""
    if not os.path.isdir(path):  # noqa: PTH112  (``Path.is_dir`` raises for names that the system does not take)
        raise AdapterNotFound(f"{path[:200]!r} does not contain an adapter.", param="lora_path")
    try:
        return directory.locate(name, path)
    except ConfigError as error:
        raise InvalidRequest(error.message, param="lora_name") from error


async def unload_adapter(request: Request) -> Response:
    """Unloads an adapter. Running requests keep it; new ones no longer find it, unless the server's own options offer
    it: then the reply says so.
    """
    state = state_of(request)
    name = (await read_body(request, UnloadBody)).lora_name
    if name not in await state.adapter_names():
        raise AdapterNotFound(f"There is no adapter {name[:80]!r} to unload.", param="lora_name")
    ref = await state.adapter(name)
    state.directory.remove(name)
    await state.service.adapters(AdapterCommand(action="unload", ref=ref))
    if name in await state.adapter_names():
        return json_reply(
            f"Success: LoRA adapter '{name}' is unloaded. The server's --adapter or --adapter-dir still offers it: the "
            "next request for it loads it again."
        )
    return json_reply(f"Success: LoRA adapter '{name}' removed successfully.")
