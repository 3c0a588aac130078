"""What is known of the adapters: ``GET /v1/adapters``, one of them, and mistral.rs's list.

A key sees the adapters that it may use. Sources and the errors of failed loads name paths, so they are only given where
adapters may be loaded by path, and to keys that may do so; so are adapters that one client's credential opened, and
merged ones, whose names are those of their parts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import AdapterNotFound, InvalidRequest
from truffula.lora.registry import Alias
from truffula.lora.sources import SOURCES
from truffula.server.auth import access_of
from truffula.server.keys import Access
from truffula.server.replies import json_reply
from truffula.server.state import ServerState, state_of
from truffula.server.vllm_metrics import max_loras
from truffula.types import AdapterCommand, AdapterRef, AdapterState

STATUSES = ("resident", "uploading", "ready", "loading", "failed", "retired")
"""Of several generations of one adapter, the first of these is shown."""
NOT_LOADED = "not loaded"
TIERS = {"resident": "resident", "uploading": "mapped", "ready": "mapped"}
PAGE, MOST = 100, 1000


@dataclass(frozen=True)
class Known:
    """The engine's adapters by full name, for a client with the rights ``access``."""

    state: ServerState
    access: Access
    with_sources: bool
    listed: Sequence[AdapterState]
    states: Mapping[str, AdapterState]

    def row(self, name: str) -> dict[str, Any]:
        """What is known of the adapter that ``name`` means; of an alias, of its first target."""
        directory = self.state.directory
        alias = self.alias(name)
        target = name if alias is None else next(iter(alias.targets), "")
        ref = directory.peek(target)
        made = {
            "id": name,
            "object": "adapter",
            **self.facts(target if ref is None else ref.name, ref),
            "versions": [version for version in directory.registry.versions(name) if version],
            "targets": None if alias is None else alias.targets,
        }
        return made if alias is None or alias.shadow is None else made | {"shadow": alias.shadow}

    def alias(self, name: str) -> Alias | None:
        """The alias ``name``, with those of its targets that the key may see."""
        return visible(self.state.directory.registry.alias(name), self.access)

    def facts(self, name: str, ref: AdapterRef | None) -> dict[str, Any]:
        """What the engine says of one adapter by its full name."""
        one = self.states.get(name)
        made: dict[str, Any] = {
            "status": NOT_LOADED if one is None else one.status,
            "tier": None if one is None else TIERS.get(one.status),
            "kind": None if one is None or not one.parts else "+".join(one.parts),
            "rank": None if one is None else one.rank or None,
            "sites": None if one is None else one.sites or None,
            "size_bytes": None if one is None else one.nbytes or None,
            "generation": None if one is None else one.generation,
            "pinned": self.state.directory.registry.is_pinned(name) or (one is not None and one.pinned),
            "requests": 0 if one is None else one.leases,
            "last_used": None if one is None or one.used_at is None else _wall_time(one.used_at),
            "source_kind": None if ref is None else ref.kind,
        }
        if self.with_sources:
            made["source"] = None if ref is None else ref.locator
            made["revision"] = (one.commit if one is not None else "") or (None if ref is None else ref.revision)
            made["error"] = None if one is None or one.error is None else one.error.message
        return made

    def full(self, name: str) -> dict[str, Any]:
        """``row`` with each version and the aliases."""
        registry = self.state.directory.registry
        versions = [
            {
                "version": version or None,
                "id": one.ref.name,
                "created": int(one.created),
                **self.facts(one.ref.name, one.ref),
            }
            for version, one in registry.versions(name.partition("@")[0]).items()
        ]
        aliases = [one for one in registry.aliases_of(name) if self.access.may_see(one)]
        return {**self.row(name), "versions": versions, "aliases": aliases}


def visible(alias: Alias | None, access: Access) -> Alias | None:
    """``alias`` without what ``access`` may not see."""
    if alias is None:
        return None
    shadow = alias.shadow if alias.shadow is not None and access.may_see(alias.shadow) else None
    return replace(
        alias, targets={name: weight for name, weight in alias.targets.items() if access.may_see(name)}, shadow=shadow
    )


def _wall_time(monotonic: float) -> int:
    return int(time.time() - (time.monotonic() - monotonic))


async def known(state: ServerState, access: Access) -> Known:
    """What the engine knows of its adapters now."""
    found = await state.service.adapters(AdapterCommand(action="list"))
    with_sources = state.config.adapter_admin and access.admin
    listed = [one for one in found if with_sources or not one.private]
    ordered = sorted(listed, key=lambda one: -STATUSES.index(one.status))
    return Known(state, access, with_sources, listed, {one.name: one for one in ordered})


@dataclass(frozen=True)
class _Query:
    """The parameters of the list."""

    prefix: str = ""
    status: str = ""
    kind: str = ""
    source: str = ""
    after: str = ""
    limit: int = PAGE

    @classmethod
    def of(cls, request: Request) -> _Query:
        """Raises ``InvalidRequest`` for a parameter or a value that has no meaning."""
        given: dict[str, Any] = dict(request.query_params)
        if unknown := sorted(set(given) - set(cls.__dataclass_fields__)):
            names = ", ".join(cls.__dataclass_fields__)
            name = unknown[0][:40] or "A parameter without a name"
            raise InvalidRequest(f"{name} has no effect here; use {names}.", param=unknown[0][:40] or "query")
        for name, allowed in (("status", (*STATUSES, NOT_LOADED)), ("source", SOURCES)):
            if name in given and given[name] not in allowed:
                text = f"{name}: should be one of {', '.join(allowed)}, got {given[name][:40]!r}."
                raise InvalidRequest(text, param=name)
        if "limit" in given:
            text = given["limit"]
            given["limit"] = int(text) if text.isascii() and text.isdigit() and len(text) < 5 else 0
            if not 1 <= given["limit"] <= MOST:
                raise InvalidRequest(f"limit: should be from 1 to {MOST}, got {text[:20]!r}.", param="limit")
        return cls(**given)

    def rows(self, found: Known, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows behind the cursor; ``names`` are sorted."""
        for name in names:
            if name <= self.after or not name.startswith(self.prefix) or not found.access.may_see(name):
                continue
            row = found.row(name)
            fits = (
                self.status in ("", row["status"])
                and self.source in ("", row["source_kind"])
                and (not self.kind or self.kind in (row["kind"] or "").split("+"))
            )
            if fits:
                yield row

    def page(self, found: Known, names: Sequence[str]) -> dict[str, Any]:
        page: list[dict[str, Any]] = []
        for row in self.rows(found, names):
            page.append(row)
            if len(page) > self.limit:
                break
        more = len(page) > self.limit
        page = page[: self.limit]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return {"object": "list", "data": page, **ends, "has_more": more}


async def list_adapters(request: Request) -> Response:
    """The adapters that can be named now, by name: status, rank and size as the engine has them.

    Query: `limit` (100), `after` (the `last_id` of the page before), `prefix` of the name, `status`, `kind` of a part,
    `source` (its kind, such as local or hub).
    """
    state, query = state_of(request), _Query.of(request)
    found = await known(state, access_of(request))
    names = await state.adapter_names()
    return json_reply(await state.service.look_up(query.page, found, names))


async def show_adapter(request: Request) -> Response:
    """One adapter by name, NAME@VERSION or alias: as in the list, with each of its versions, and its aliases."""
    return await shown(request, request.path_params["name"])


async def shown(request: Request, name: str) -> Response:
    """The reply of ``show_adapter``. Raises ``AdapterNotFound``, also for what the key may not see."""
    state, access = state_of(request), access_of(request)
    found = await known(state, access)
    registry = state.directory.registry
    there = access.may_see(name) and (
        registry.alias(name) is not None
        or await state.service.look_up(state.directory.peek, name) is not None
        or (name in found.states and found.states[name].status in TIERS)  # loaded on first use
    )
    if not there:
        raise AdapterNotFound(f"There is no adapter {name[:80]!r}; GET /v1/adapters lists them.", param="model")
    return json_reply(await state.service.look_up(found.full, name))


async def mistral_list(request: Request) -> Response:
    """The adapters that are loaded, in the form of mistral.rs."""
    state = state_of(request)
    found = await known(state, access_of(request))
    return json_reply(await state.service.look_up(_as_mistral, found))


def _as_mistral(found: Known) -> dict[str, Any]:
    state = found.state
    loaded = [one for one in found.listed if one.generation is not None and found.access.may_see(one.name)]
    generations: dict[str, dict[str, Any]] = {}
    data = []
    for one in loaded:
        row = generations.setdefault(
            str(one.generation),
            {
                "generation": one.generation,
                "aliases": [],
                "bytes": one.nbytes,
                "rank": one.rank,
                "active_leases": one.leases,
                "retired": one.status == "retired",
            },
        )
        row["aliases"].append(one.name)
        if one.status != "retired":
            ref = state.directory.peek(one.name) if found.with_sources else None
            data.append(
                {
                    "id": one.name,
                    "object": "lora_adapter",
                    "generation": one.generation,
                    "rank": one.rank,
                    "bytes": one.nbytes,
                    "revision": one.commit or None,
                    "source": None if ref is None else ref.locator,
                }
            )
    stats, info = state.service.known_stats(), state.service.info
    retired = sum(row["retired"] for row in generations.values())
    return {
        "object": "list",
        "data": data,
        "generations": list(generations.values()),
        "max_adapters": max_loras(stats, info),
        "max_bytes": info.budget_bytes if stats is None else stats.adapter_limit_bytes,
        "max_rank": 512,  # any rank is served; this is the highest that clients of vLLM know
        "resident_bytes": sum(row["bytes"] for row in generations.values()),
        "resident_generations": len(generations) - retired,
        "retired_generations": retired,
    }
