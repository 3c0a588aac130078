"""Fields that belong to another route or another server: refused by name, with the field that this route has instead.

Such a field would change the answer there, so it is never ignored here. A field is also refused where it stands in the
wrong object (``max_new_tokens`` beside ``inputs``, ``extra_body.top_k`` on ``/v1/``). Fields by which clients of other
servers name an adapter are honoured where their value is one name, or names with weights, and refused otherwise: a
request that is answered by the base although it named an adapter looks like any other answer. ``field_names.toml``
lists all of these names.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest
from truffula.server.adapter_mix import AdapterMix, merged_adapters, scaled_adapters

MAX_DEPTH = 4
"""How many objects inside each other are searched for fields."""


def squeezed(name: str) -> str:
    """``name`` without case and separators: ``maxTokens``, ``max-tokens`` and ``max_tokens`` are one name."""
    return name.replace("_", "").replace("-", "").lower()


def _by_key(names: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType({squeezed(name): value for name, value in names.items()})


@dataclass(frozen=True, slots=True)
class Aliases:
    """Names of one field. A route calls it by the first name that is a field of the route.

    ``no_effect`` are values without effect, beside null. ``advice`` is for routes without such a field.
    """

    names: tuple[str, ...]
    no_effect: tuple[Any, ...] = ()
    advice: str = "leave it out"


_TABLES = tomllib.loads(Path(__file__).with_name("field_names.toml").read_text(encoding="utf-8"))
ALIASES = tuple(Aliases(**row | {"names": tuple(row["names"].split())}) for row in _TABLES["aliases"])
UNSUPPORTED: Mapping[str, list[Any]] = MappingProxyType(_TABLES["unsupported"])
"""No route has such a field: name → values that are accepted because they have no effect."""
INERT: Mapping[str, list[Any]] = MappingProxyType(_TABLES["inert"])
"""Known, and without effect on the text: name → values without a meaning. Another value is listed as ignored."""
HOLDERS = frozenset(_TABLES["holders"])
"""Objects in which other servers and clients put fields of a request. What is inside has no effect here."""
ADAPTER_FIELDS: Mapping[str, list[str]] = MappingProxyType(_TABLES["adapters"])
"""Fields that say something of adapters: by ``name``, several ``merged``, by ``scale``, or by something ``other``."""

_ALIASES: Mapping[str, Aliases] = _by_key({name: row for row in reversed(ALIASES) for name in row.names})
_UNSUPPORTED = _by_key(UNSUPPORTED)
_INERT = _by_key(INERT)
_HOLDERS = frozenset(map(squeezed, HOLDERS))
_ADAPTERS = _by_key({name: kind for kind, names in ADAPTER_FIELDS.items() for name in names})
_NO_ADAPTER: tuple[Any, ...] = ("", False, [], {}, [""])
"""Values by which no adapter is named, beside null."""
_NO_SCALE = (1, [1])
"""Scales that an adapter has anyway."""
_SOURCE = squeezed("adapter_source")  # not its name
_LIKELY = re.compile("lora|adapter|peft|dora", re.IGNORECASE)
_WORDS = frozenset({"adapter", "adapters", "lora", "loras", "peft", "dora", "qlora"})
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def has_no_effect(value: Any, no_effect: Iterable[Any]) -> bool:
    """Whether ``value`` has no effect: null, or one of ``no_effect``. A boolean never equals a number."""
    if value is None:
        return True
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in no_effect)


def is_ignored(name: str, value: Any) -> bool:
    """Whether a field that passed ``RouteFields.check`` and that no route reads belongs in ``x-truffula-ignored``.

    An unknown one does; a known one without effect on the text does unless its value has no meaning either.
    """
    key = squeezed(name)
    if key in _INERT:
        return not has_no_effect(value, _INERT[key])
    return key not in _ALIASES and key not in _UNSUPPORTED and not is_adapter_field(name)


def is_adapter_field(name: str) -> bool:
    """Whether ``name`` is of ``ADAPTER_FIELDS``, however it is spelled (``loraName``), or has such a word in it."""
    if not _LIKELY.search(name):
        return False
    key = squeezed(name)
    if key == _SOURCE:
        return False
    return key in _ADAPTERS or any(word.lower() in _WORDS for word in _WORD.findall(name.replace("oRA", "ora")))


def adapter_named(place: str, name: str, value: Any, use: str) -> str | AdapterMix | None:
    """The adapter that field ``name`` names by ``value``, or several with their weights; None where it names none.

    Raises ``InvalidRequest`` for numbers of adapters, weights without names and several adapters without weights, and
    for a field that is not of the table: ``place`` is where the field stands, ``use`` the field that names an adapter
    on this route.
    """
    kind = _ADAPTERS.get(squeezed(name))
    if has_no_effect(value, _NO_ADAPTER) or (kind == "scale" and has_no_effect(value, _NO_SCALE)):
        return None
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    if kind == "name" and isinstance(one, str):
        return one
    if kind == "merged":
        return merged_adapters(place, value)
    if kind == "name" and isinstance(value, list) and all(map(_names_adapter, value)):
        return scaled_adapters(place, value)
    raise InvalidRequest(
        f"{place} is not supported by this server; name one adapter, as a string, in {use}, or several with their "
        "weights in merged_adapters.",
        param=place,
    )


def _names_adapter(item: Any) -> bool:
    """Whether an item of a list is an object that names an adapter; llama.cpp numbers them."""
    return isinstance(item, dict) and (isinstance(item.get("name"), str) or isinstance(item.get("id"), str))


def adapters_named(fields: Iterable[tuple[str, Any]], prefix: str, use: str) -> list[tuple[str, str | AdapterMix]]:
    """Each of an object's fields that names adapters, with its place and what it names. Raises as ``adapter_named``."""
    found: list[tuple[str, str | AdapterMix]] = []
    for field, value in fields:
        if not is_adapter_field(field):
            continue
        place = f"{prefix}{field[:64]}"
        if name := adapter_named(place, field, value, use):
            found.append((place, name))
    return found


@dataclass(frozen=True)
class RouteFields:
    """The fields of one route, by the object they stand in: ``""`` is the body, ``"parameters."`` an object in it.

    ``where`` names the route in messages, ``adapter`` the field that names an adapter. With ``only``, no other foreign
    fields are refused than these.
    """

    where: str
    adapter: str
    levels: Mapping[str, Collection[str]]
    only: Collection[str] | None = None

    @cached_property
    def _only(self) -> Collection[str]:
        return frozenset(squeezed(name) for name in self.only or ())

    @cached_property
    def _paths(self) -> Mapping[str, str]:
        """Squeezed name → the field with its object."""
        return {squeezed(name): f"{level}{name}" for level, names in self.levels.items() for name in names}

    def path_of(self, name: str) -> str | None:
        """The field of this route that ``name`` means, with its object; None where the route has none."""
        key = squeezed(name)
        if key in self._paths:
            return self._paths[key]
        row = _ALIASES.get(key)
        return None if row is None else next((p for n in row.names if (p := self._paths.get(squeezed(n)))), None)

    def check(self, body: Mapping[str, Any], base_names: Collection[str]) -> None:
        """Raises ``InvalidRequest`` for the first field of ``body`` that another route or server would honour."""
        for level, names in self.levels.items():
            held = body.get(level.removesuffix(".")) if level else body
            if not isinstance(held, dict):
                continue
            for name, value in held.items():
                if name in names or value is None or is_adapter_field(name):  # ``adapters_named`` reads those
                    continue
                if self.only is not None and squeezed(name) not in self._only:
                    continue
                self._check_field(name, value, level)
                if isinstance(value, dict):
                    self._search(name, value, f"{level}{name[:64]}", base_names, MAX_DEPTH)

    def _search(self, name: str, value: dict[str, Any], place: str, base_names: Collection[str], depth: int) -> None:
        """``check`` of the fields inside an object that no route reads. Outside the known holders of fields, names are
        the client's own, and only those of adapters are refused."""
        if not value or not depth or squeezed(name) in _INERT:
            return
        holds_fields = squeezed(name) in _HOLDERS
        for inner, given in value.items():
            inside = f"{place}.{inner[:64]}"
            if is_adapter_field(inner) or (holds_fields and inner == "model" and isinstance(given, str)):
                named = given if inner == "model" else adapter_named(inside, inner, given, self.adapter)
                if named and named not in base_names:
                    raise self._unsupported(inside, f"name the adapter in {self.adapter}")
            elif holds_fields and given is not None:
                self._check_field(inner, given, f"{place}.")
            if isinstance(given, dict):
                self._search(inner, given, inside, base_names, depth - 1)

    def _check_field(self, name: str, value: Any, prefix: str) -> None:
        """``check`` of one field in the object that ``prefix`` names."""
        key, place = squeezed(name), f"{prefix}{name[:64]}"
        if key in _UNSUPPORTED:
            if has_no_effect(value, _UNSUPPORTED[key]):
                return
            raise InvalidRequest(f"{place} is not supported by this server; leave it out.", param=place)
        row, path = _ALIASES.get(key), self.path_of(name)
        if (row is None and path is None) or has_no_effect(value, row.no_effect if row else ()):
            return
        if path is None:
            raise self._unsupported(place, row.advice if row else "leave it out")
        outside = "." in place and "." not in path
        raise self._unsupported(place, f"use {path}{' at the top level of the body' if outside else ''}")

    def _unsupported(self, place: str, advice: str) -> InvalidRequest:
        """The error for the field at ``place``, whose name is the client's and stays as it was sent (``verbatim``)."""
        return InvalidRequest(f"{place} has no effect on {self.where}; {advice}.", param=place, verbatim=True)
