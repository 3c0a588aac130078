"""Changes to adapters and aliases under ``/v1/``, served only with ``--adapter-admin``, as a source may be a path of
this machine. vLLM's and SGLang's routes for the same are in ``admin.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Collection, Sequence
from typing import Annotated

from msgspec.structs import replace
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import (
    AdapterExists,
    AdapterNotFound,
    ConfigError,
    GenerationMismatch,
    InvalidRequest,
    TruffulaError,
)
from truffula.lora.registry import MAX_TARGETS, Alias, split_name
from truffula.lora.sources import MAX_NAME_CHARS, reserved
from truffula.server.adapter_listing import known, shown, visible
from truffula.server.auth import access_of
from truffula.server.body import Body, decode_object, note_ignored, raw_body, read_body, validate
from truffula.server.keys import EVERYTHING
from truffula.server.replies import json_reply
from truffula.server.state import ServerState, state_of
from truffula.types import AdapterCommand, AdapterRef

log = logging.getLogger(__name__)
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
MAX_WEIGHT = 1e9


class NewAdapter(Body):
    name: _Name = Field(description="The name of the adapter in requests.")
    source: _Name
    version: str | None = None
    pinned: bool | None = None

    @property
    def full_name(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


class RegisterBody(Body):
    adapters: list[NewAdapter] = Field(min_length=1)
    load: bool | None = None
    replace: bool | None = None

    def unknown(self) -> list[str]:
        inner = (f"adapters[{i}].{name}" for i, one in enumerate(self.adapters) for name in one.unknown())
        return [*super().unknown(), *inner]


class ReloadBody(Body):
    source: _Name | None = None
    expected_generation: str | None = None


class AliasBody(Body):
    target: _Name | None = None
    targets: dict[str, float] | None = Field(None, min_length=1, max_length=MAX_TARGETS)
    shadow: _Name | None = None
    shadow_percent: float | None = Field(None, gt=0, le=100)


# What the routes of all dialects do


def locate_new(
    state: ServerState, name: str, source: str, *, folder: bool = False, fields: tuple[str, str] = ("name", "source")
) -> AdapterRef:
    """The adapter at ``source`` by its new name; asks the file system. ``folder``: only a folder is a source.
    ``fields`` are what the client calls name and source.

    Raises ``InvalidRequest`` for a name that no adapter may have, ``AdapterNotFound`` where there is none.
    """
    if reserved(name, state.base_names):
        raise InvalidRequest(
            f"{name[:80]!r} means the base model; choose another name for the adapter.", param=fields[0]
        )
    split_name(name)
    is_folder = os.path.isdir(source)  # noqa: PTH112  (``Path.is_dir`` raises for names that the system does not take)
    if not is_folder and (folder or source.startswith(("/", "~", "."))):
        raise AdapterNotFound(f"{source[:200]!r} does not contain an adapter.", param=fields[1])
    try:
        return state.directory.locate(name, source)
    except ConfigError as error:
        raise InvalidRequest(error.message, param=fields[1]) from error


async def load(state: ServerState, ref: AdapterRef, *, pinned: bool = False) -> str | None:
    """Load ``ref``; its generation once requests can use it. Raises why it cannot be loaded."""
    try:
        states = await state.service.adapters(AdapterCommand(action="load", ref=ref, pinned=pinned))
    except TruffulaError:
        if pinned and not state.directory.registry.is_pinned(ref.name):
            await state.service.adapters(AdapterCommand(action="unpin", ref=ref))
        raise
    if pinned:
        await state.service.look_up(state.directory.registry.set_pin, ref.name, True)
    return next((one.generation for one in states if one.name == ref.name), None)


def is_taken(state: ServerState, name: str) -> bool:
    """Whether ``name`` is that of an adapter or of an alias."""
    return state.directory.peek(name) is not None or state.directory.registry.alias(name) is not None


async def reload(state: ServerState, ref: AdapterRef, new: AdapterRef | None, expected: str | None) -> str | None:
    """Put ``new`` (None: what its source holds now) in the place of ``ref``; returns its generation.

    Running requests keep what they have; a load that fails changes nothing. Raises ``GenerationMismatch`` unless the
    present generation is ``expected`` (None: any).
    """
    async with state.changing([ref.name]):
        if expected is not None and (present := await _generation(state, ref)) != expected:
            raise GenerationMismatch(
                f"expected_generation is {expected[:80]!r}, and the generation of {ref.name!r} is "
                f"{'unknown, as it cannot be loaded' if present is None else repr(present)}.",
                param="expected_generation",
                present=present or "",
            )
        wanted = state.directory.renewed(ref) if new is None else new
        generation = await load(state, wanted, pinned=state.directory.registry.is_pinned(ref.name))
        if new is None:
            state.directory.accept(wanted)
        else:
            await state.service.look_up(state.directory.add, new)
        log.info("adapter %r was reloaded: generation %s", ref.name, (generation or "")[:12])
        return generation


async def _generation(state: ServerState, ref: AdapterRef) -> str | None:
    """The generation that requests for ``ref`` get now. It is loaded if it is not in memory; None: it cannot be."""
    one = (await known(state, EVERYTHING)).states.get(ref.name)
    if one is not None and one.generation is not None and one.status != "retired":
        return one.generation
    with contextlib.suppress(TruffulaError):
        return await load(state, ref)
    return None


async def unload(state: ServerState, ref: AdapterRef) -> bool:
    """Drop an adapter from memory and end its pin; whether it was there. Running requests keep it."""
    await state.service.look_up(state.directory.registry.set_pin, ref.name, False)
    try:
        await state.service.adapters(AdapterCommand(action="unload", ref=ref))
    except AdapterNotFound:
        return False
    return True


async def forget(state: ServerState, name: str) -> list[AdapterRef]:
    """Remove NAME with all its versions, or NAME@VERSION, from the registry, and from memory.

    Raises ``InvalidRequest`` while an alias leads to it.
    """
    registry = state.directory.registry
    async with state.naming:
        if registry.find(name) is not None and (aliases := registry.aliases_of(name)):
            raise InvalidRequest(
                f"{name[:80]!r} is a target of the alias {aliases[0]!r}; change or delete the alias first.",
                param="model",
            )
        removed = await state.service.look_up(registry.remove, name)
    for ref in removed:
        await unload(state, ref)
    return removed


async def prepare_adapters(state: ServerState) -> None:
    """Do what no request should wait for: start a loading worker where the server has adapters or takes them from
    clients, and load what was pinned when the server ended. What cannot be loaded is logged and stays pinned."""
    config = state.config
    taken = (config.adapter_dir, config.allow_hub, config.allow_local, config.allow_sources)
    if any(taken) or config.adapter_admin or state.directory.names():
        try:
            await state.service.adapters(AdapterCommand(action="prepare"))
        except TruffulaError as error:
            log.warning("no loading worker is started now (%s): %s", error.code, error.message)
    if config.default is not None:
        await _prepare_default(state, config.default[0])
    for name in state.directory.registry.pins():
        try:
            # Not an alias of the same name: pins are of adapters.
            if (ref := await state.service.look_up(state.service.core.resolve_adapter, name)) is not None:
                await load(state, ref, pinned=True)
        except TruffulaError as error:
            log.warning("the pinned adapter %r is not loaded (%s): %s", name, error.code, error.message)


async def _prepare_default(state: ServerState, name: str) -> None:
    """Load the default adapter, of an alias each target, so that the first request waits for no load."""
    alias = state.directory.registry.alias(name)
    for target in [name] if alias is None else alias.targets:
        try:
            if (ref := await state.service.look_up(state.service.core.resolve_adapter, target)) is not None:
                await load(state, replace(ref, wanted=""))
        except TruffulaError as error:
            why = error.data.get("reason", error.message)
            log.warning("--default-adapter: %r cannot be loaded now (%s): %s", target, error.code, why)


async def exact(state: ServerState, name: str) -> AdapterRef:
    """The one adapter that ``name`` means. Raises ``AdapterNotFound``; ``InvalidRequest`` for an alias of several."""
    alias = state.directory.registry.alias(name)
    if alias is not None and len(alias.targets) > 1:
        raise InvalidRequest(
            f"{name[:80]!r} is an alias of {', '.join(alias.targets)}; name one of these.", param="model"
        )
    ref = await state.adapter(name)
    if ref is None:
        raise AdapterNotFound(f"{name[:80]!r} is the base model, not an adapter.", param="model")
    if ref.wanted:
        text = f"{name[:80]!r} names a generation, which requests may; name the adapter here."
        raise InvalidRequest(text, param="model")
    return ref


# The routes


async def register(request: Request) -> Response:
    """Registers adapters, all or none: folders of the server's machine or Hub ids, each under a name and, if given, a
    version. They are read when they are first used, or now with `load`.
    """
    state, body = state_of(request), await read_body(request, RegisterBody)
    names = [one.full_name for one in body.adapters]
    if len(set(names)) < len(names):
        raise InvalidRequest("adapters: two of them have the same name and version.", param="adapters")

    def find() -> list[AdapterRef]:
        for name in names:
            if not body.replace and is_taken(state, name):
                raise AdapterExists(
                    f"{name[:80]!r} is already registered; send replace: true, or another version.", param="adapters"
                )
        return [locate_new(state, one.full_name, one.source) for one in body.adapters]

    async with state.changing(names):  # of two that register a name, the second finds it taken
        refs = await state.service.look_up(find)
        wanted = [ref for ref, one in zip(refs, body.adapters, strict=True) if body.load or one.pinned]
        pinned = {one.full_name for one in body.adapters if one.pinned}
        loaded = await _load_all(state, wanted, pinned)
        await state.service.look_up(lambda: state.directory.registry.add(refs, replace=bool(body.replace)))
    generations = {ref.name: generation for ref, generation in zip(wanted, loaded, strict=True)}
    rows = [{"id": name, "object": "adapter", "generation": generations.get(name)} for name in names]
    return json_reply({"object": "list", "data": rows})


async def _load_all(state: ServerState, refs: Sequence[AdapterRef], pinned: Collection[str]) -> list[str | None]:
    """Load ``refs``; their generations. If one cannot be loaded, those of new names are unloaded, and it raises why."""
    loads = (load(state, ref, pinned=ref.name in pinned) for ref in refs)
    found = await asyncio.gather(*loads, return_exceptions=True)
    error = next((one for one in found if isinstance(one, BaseException)), None)
    if error is None:
        return [one for one in found if not isinstance(one, BaseException)]
    for ref in refs:
        if state.directory.registry.find(ref.name) is None:
            await unload(state, ref)
    raise error


async def load_named(request: Request) -> Response:
    """Loads an adapter that requests may name, also one that failed recently; answers once it is usable."""
    name: str = request.path_params["name"]
    await load(state_of(request), await exact(state_of(request), name))
    return await shown(request, name)


async def pin(request: Request) -> Response:
    """Loads an adapter and keeps it in memory, also after a restart, until it is unpinned or unloaded."""
    name: str = request.path_params["name"]
    await load(state_of(request), await exact(state_of(request), name), pinned=True)
    return await shown(request, name)


async def unpin(request: Request) -> Response:
    """Ends a pin: the adapter is removed from memory when its bytes are needed."""
    state, name = state_of(request), request.path_params["name"]
    ref = await exact(state, name)
    await state.service.look_up(state.directory.registry.set_pin, ref.name, False)
    await state.service.adapters(AdapterCommand(action="unpin", ref=ref))
    return await shown(request, name)


async def unload_named(request: Request) -> Response:
    """Drops an adapter, of NAME every version, from memory; the next request for it loads it again. Ends its pin."""
    state, name = state_of(request), request.path_params["name"]
    versions = [one.ref for one in state.directory.registry.versions(name).values()]
    for ref in versions or [await exact(state, name)]:
        await unload(state, ref)
    return await shown(request, name)


async def reload_named(request: Request) -> Response:
    """Reads an adapter again, from its source or another one. Running requests keep the former generation, later ones
    get the new one; if it cannot be loaded, nothing changes.

    With `expected_generation` only if that is the present one, else 409 and the present one in the message.
    """
    state, name = state_of(request), request.path_params["name"]
    raw = raw_body(request)
    body = validate(ReloadBody, decode_object(raw) if raw else {}, state.limits)
    note_ignored(request, body.unknown())
    ref = await exact(state, name)
    new = None
    if body.source is not None:
        new = await state.service.look_up(locate_new, state, ref.name, body.source)
    await reload(state, ref, new, body.expected_generation)
    return await shown(request, name)


async def delete_adapter(request: Request) -> Response:
    """Forgets a registered adapter, of NAME every version, and drops it from memory. Running requests keep it."""
    state, name = state_of(request), request.path_params["name"]
    if state.directory.registry.find(name) is None:
        if is_taken(state, name):
            raise InvalidRequest(
                f"{name[:80]!r} cannot be deleted: it is an alias, or the server's --adapter or --adapter-dir "
                "offers it.",
                param="model",
            )
        raise AdapterNotFound(f"There is no adapter {name[:80]!r}; GET /v1/adapters lists them.", param="model")
    removed = await forget(state, name)
    return json_reply({"id": name, "object": "adapter", "deleted": True, "versions": [ref.name for ref in removed]})


async def list_aliases(request: Request) -> Response:
    """The aliases: other names for one adapter, or for several by weights."""
    state, access = state_of(request), access_of(request)
    found = [visible(one, access) for one in state.directory.registry.aliases() if access.may_see(one.name)]
    return json_reply({"object": "list", "data": [_alias_row(one) for one in found if one is not None]})


def _alias_row(alias: Alias) -> dict[str, object]:
    shadow = {} if alias.shadow is None else {"shadow": alias.shadow, "shadow_percent": alias.shadow_percent}
    return {"id": alias.name, "object": "adapter_alias", "targets": alias.targets, **shadow}


async def set_alias(request: Request) -> Response:
    """Makes or replaces an alias: of one `target`, or of several `targets` with their weights.

    With an adapter's own name it decides which version that name means.
    """
    state, name = state_of(request), request.path_params["name"]
    body = await read_body(request, AliasBody)
    if (body.target is None) == (body.targets is None):
        raise InvalidRequest("An alias needs either target or targets.", param="targets")
    if reserved(name, state.base_names):
        raise InvalidRequest(f"{name[:80]!r} means the base model; choose another alias.", param="name")
    if "@" in name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        text = f"{name[:80]!r}: an alias has 1 to {MAX_NAME_CHARS} printable characters and no version."
        raise InvalidRequest(text, param="name")
    targets = {str(body.target): 1.0} if body.targets is None else dict(body.targets)
    if not all(0 < weight <= MAX_WEIGHT for weight in targets.values()):
        text = f"targets: each weight must be above 0 and at most {MAX_WEIGHT:g}; leave a target out to end it."
        raise InvalidRequest(text, param="targets")
    if body.shadow is None and body.shadow_percent is not None:
        raise InvalidRequest("shadow_percent needs shadow.", param="shadow_percent")
    percent = 100.0 if body.shadow_percent is None else body.shadow_percent
    alias = Alias(name=name, targets=targets, shadow=body.shadow, shadow_percent=percent)
    async with state.naming:
        await state.service.look_up(_require_adapters, state, [*targets, *([body.shadow] if body.shadow else [])])
        await state.service.look_up(state.directory.registry.set_alias, alias)
    return json_reply(_alias_row(alias))


def _require_adapters(state: ServerState, targets: Sequence[str]) -> None:
    """Raise ``InvalidRequest`` for a target that is no adapter."""
    for target in targets:
        try:
            if (ref := state.service.core.resolve_adapter(target)) is None or ref.wanted:
                what = "the base model" if ref is None else "one generation of an adapter"
                raise InvalidRequest(f"{target[:80]!r} is {what}, not an adapter.", param="targets")
        except AdapterNotFound as error:
            is_alias = state.directory.registry.alias(target) is not None
            hint = (
                f"{target[:80]!r} is an alias; name its targets."
                if is_alias
                else f"There is no adapter {target[:80]!r}."
            )
            raise InvalidRequest(hint, param="targets") from error


async def delete_alias(request: Request) -> Response:
    """Deletes an alias; the adapters that it led to stay."""
    state, name = state_of(request), request.path_params["name"]
    if not await state.service.look_up(state.directory.registry.remove_alias, name):
        raise AdapterNotFound(f"There is no alias {name[:80]!r}; GET /v1/adapter_aliases lists them.", param="model")
    return json_reply({"id": name, "object": "adapter_alias", "deleted": True})
