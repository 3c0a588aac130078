"""Reads a ``quantization_config`` key by key; a key that no reader knows is refused by name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from truffula.errors import UnsupportedModel

MISSING = object()


class Keys:
    """One object of a ``quantization_config``, which records the keys that are read.

    ``where`` is its name in messages. Every reader raises ``UnsupportedModel`` naming key and value when the value has
    the wrong type or is not supported. A key with null counts as missing.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self._read: set[str] = set()

    def raw(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def error(self, key: str, why: str) -> UnsupportedModel:
        shown = json.dumps(self.values.get(key), default=repr)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        return UnsupportedModel(
            f"{self.where}.{key} is {shown}; {why}", param=f"{self.where}.{key}".split()[-1], value=shown
        )

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**31:
            raise self.error(key, f"it must be an integer of at least {minimum}.")
        return value

    def group_size(self, key: str, default: int) -> int:
        """The number of inputs that share a scale, or -1 for all of a row."""
        size = self.integer(key, default, minimum=-1)
        if size == 0:
            raise self.error(key, "it must be positive, or -1 for one group.")
        return size

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "it must be true or false.")
        return value

    def choice(self, key: str, options: Collection[str], default: str) -> str:
        """The string under ``key`` in lower case, one of ``options``."""
        value = self.raw(key, default)
        if not isinstance(value, str) or value.lower() not in options:
            raise self.error(key, f"supported are {', '.join(sorted(options))}.")
        return value.lower()

    def names(self, key: str) -> tuple[str, ...]:
        """A list of module names or patterns; empty when it is missing."""
        value = self.raw(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "it must be a list of strings.")
        return tuple(value)

    def integers(self, key: str, length: int) -> tuple[int, ...] | None:
        value = self.raw(key)
        if value is None:
            return None
        good = isinstance(value, list) and all(type(item) is int and 0 < item < 2**31 for item in value)
        if not good or len(value) != length:
            raise self.error(key, f"it must be a list of {length} positive integers.")
        return tuple(value)

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        value = self.raw(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, "it must be an object.")
        return value

    def nested(self, key: str) -> Keys | None:
        value = self.mapping(key)
        return None if value is None else Keys(value, f"{self.where}.{key}")

    def must_be(self, key: str, allowed: Collection[Any], why: str) -> None:
        """Raise unless the value is missing or one of ``allowed``."""
        value = self.raw(key)
        if value is not None and not any(type(value) is type(item) and value == item for item in allowed):
            raise self.error(key, why)

    def skip(self, *keys: str) -> None:
        """Mark ``keys`` as known: they say how the weights were made, or how kernels of other engines run."""
        self._read.update(keys)

    def finish(self) -> None:
        """Raise for the first key that was not read."""
        for key in self.values:
            if key not in self._read:
                raise self.error(key, "this key is not supported here, and it may change the values of the weights.")
