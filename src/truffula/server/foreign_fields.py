"""Refuses fields that belong to another route or another server, and names the field that this route has instead.

Such a field would change the answer there, so it is never ignored here. A field is also refused where it stands in the
wrong object (``max_new_tokens`` beside ``inputs``, ``extra_body.top_k`` on ``/v1/``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest
from truffula.server.adapter_fields import adapter_named, is_adapter_field
from truffula.server.field_names import ALIASES, HOLDERS, INERT, UNSUPPORTED, Aliases, has_no_effect, squeezed

MAX_DEPTH = 4
"""How many objects inside each other are searched for fields."""

_ALIASES: Mapping[str, Aliases] = MappingProxyType(
    {squeezed(name): row for row in reversed(ALIASES) for name in row.names}  # a name's first row wins
)
_UNSUPPORTED = MappingProxyType({squeezed(name): values for name, values in UNSUPPORTED.items()})
_INERT = MappingProxyType({squeezed(name): values for name, values in INERT.items()})
_KNOWN = _ALIASES.keys() | _UNSUPPORTED.keys()
_HOLDERS = frozenset(squeezed(name) for name in HOLDERS)


def is_ignored(name: str, value: Any) -> bool:
    """Whether a field that passed ``RouteFields.check`` and that no route reads belongs in ``x-truffula-ignored``.

    An unknown one does; a known one without effect on the text does unless its value has no meaning either.
    """
    key = squeezed(name)
    if key in _INERT:
        return not has_no_effect(value, _INERT[key])
    return key not in _ALIASES and key not in _UNSUPPORTED and not is_adapter_field(name)


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
                if name in names or value is None or is_adapter_field(name):  # ``answering`` reads those
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
        key = squeezed(name)
        if key not in _KNOWN and key not in self._paths:
            return
        place = f"{prefix}{name[:64]}"
        if key in _UNSUPPORTED and not has_no_effect(value, _UNSUPPORTED[key]):
            raise InvalidRequest(f"{place} is not supported by this server; leave it out.", param=place)
        row, path = _ALIASES.get(key), self.path_of(name)
        if key in _UNSUPPORTED or has_no_effect(value, row.no_effect if row else ()):
            return
        if path is None:
            raise self._unsupported(place, row.advice if row else "leave it out")
        outside = "." in place and "." not in path
        raise self._unsupported(place, f"use {path}{' at the top level of the body' if outside else ''}")

    def _unsupported(self, place: str, advice: str) -> InvalidRequest:
        """The error for the field at ``place``, whose name is the client's and stays as it was sent (``verbatim``)."""
        return InvalidRequest(f"{place} has no effect on {self.where}; {advice}.", param=place, verbatim=True)
