"""API keys and what each may do: those of ``--api-key``, which may do everything, and those of ``--api-keys-file``."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec

from truffula.errors import AdapterNotFound, ConfigError

CHECK_S = 1.0
"""How often the file is looked at."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """The rights of one key. ``tenant`` is a digest; None without keys.

    ``patterns`` are shell patterns of the names of adapters that the key may use, None for all. What they allow, they
    allow in every version. ``weight`` is the tenant's share of the engine beside other tenants.
    """

    id: str = ""
    tenant: str | None = None
    patterns: tuple[str, ...] | None = None
    base: bool = True
    admin: bool = True
    weight: float = 1.0

    @cached_property
    def _allowed(self) -> re.Pattern[str] | None:
        if self.patterns is None:
            return None
        return re.compile("|".join(map(fnmatch.translate, self.patterns)) or r"(?!)")

    def may_use(self, name: str) -> bool:
        """Whether the key may use the adapter ``name``, or a version of it. A version follows an @ behind the last
        slash: one before that is part of a path.
        """
        folder, slash, last = name.rpartition("/")
        allowed = self._allowed
        return allowed is None or allowed.match(f"{folder}{slash}{last.partition('@')[0]}") is not None

    def may_see(self, name: str) -> bool:
        """Whether listings show the adapter ``name`` to the key."""
        return self.admin or self.may_use(name)

    def require(self, name: str) -> None:
        """Raise ``AdapterNotFound``, as for a name that does not exist, where the key may not use ``name``.

        Comes before anything is looked up, so that the time tells nothing either.
        """
        if not self.may_use(name):
            raise AdapterNotFound(f"There is no adapter {name[:80]!r}.", reason=f"the key {self.id!r} may not use it")

    def require_base(self) -> None:
        """Raise ``AdapterNotFound`` where the key may not use the base."""
        if not self.base:
            raise AdapterNotFound("The base is not served.", reason=f"the key {self.id!r} may not use the base model")


EVERYTHING = Access()


@dataclass(frozen=True)
class Caller:
    """Who names an adapter: its rights, ``key``, which chooses among the targets of an alias, and its own ``token`` for
    the adapter's source.
    """

    access: Access = EVERYTHING
    key: str = ""
    token: str | None = None


OPERATOR = Caller()


class _Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file. By default the tenant is the id: other keys share nothing with it. ``weight`` is the
    tenant's, whichever of its keys gives it.
    """

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    key: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    key_sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{64}$")] | None = None
    tenant: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    adapters: list[Annotated[str, msgspec.Meta(min_length=1)]] = []
    base: bool = True
    admin: bool = False
    weight: Annotated[float, msgspec.Meta(ge=0.01, le=100)] | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[_Key]


def tenant_of(key: str) -> str:
    """A digest that identifies the key in place of the key itself."""
    return hashlib.blake2b(key.encode("latin-1"), digest_size=16, person=b"truffula-tenant").hexdigest()


def named_tenant(name: str) -> str:
    """The digest of a tenant of the file; no key has the same one."""
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"truffula-name").hexdigest()


def digest(key: bytes) -> str:
    """What keys are known by: a look-up by it takes the same time for every key that is not known."""
    return hashlib.sha256(key).hexdigest()


def read_keys(path: Path) -> dict[str, Access]:
    """The keys of the file by their digests. Raises ``ConfigError`` that names the wrong entry, never a key."""
    try:
        found = msgspec.convert(_parse(path), type=_File).keys
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"The file of API keys {path} cannot be used: {error}.", param="api_keys_file") from error
    keys: dict[str, Access] = {}
    ids: set[str] = set()
    weights: dict[str, float] = {}
    for one in found:
        if one.weight is not None and weights.setdefault(one.tenant or one.id, one.weight) != one.weight:
            raise _wrong(path, one, "has another weight than an entry of the same tenant")
    for one in found:
        if (one.key is None) == (one.key_sha256 is None):
            raise _wrong(path, one, "needs either key or key_sha256")
        if any("@" in pattern.rpartition("/")[2] for pattern in one.adapters):
            raise _wrong(
                path, one, "has a pattern with a version; one without @ allows the adapter in all its versions"
            )
        known = digest(one.key.encode()) if one.key is not None else str(one.key_sha256).lower()
        if one.id in ids or known in keys:
            raise _wrong(path, one, "has the id or the key of another entry")
        ids.add(one.id)
        name = one.tenant or one.id
        rights = tuple(one.adapters), one.base, one.admin, weights.get(name, 1.0)
        keys[known] = Access(one.id, named_tenant(name), *rights)
    return keys


def _wrong(path: Path, one: _Key, what: str) -> ConfigError:
    return ConfigError(f"{path}: the entry with id {one.id!r} {what}.", param="api_keys_file")


def _parse(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".json":
        return msgspec.json.decode(text)
    import tomllib

    return tomllib.loads(text)


class KeyRing:
    """The keys that are accepted now. The file is read again by ``reload``, and ``CHECK_S`` after it has changed.
    One that cannot be used then changes nothing and is logged.

    Raises ``ConfigError`` for a file that cannot be used at the start.
    """

    def __init__(self, keys: Sequence[str], path: Path | None = None) -> None:
        self._own = {digest(key.encode()): Access(tenant=tenant_of(_header_text(key))) for key in keys}
        self._path = path
        self._stamp = self._stat()
        self._keys: Mapping[str, Access] = self._own if path is None else {**read_keys(path), **self._own}
        self._checked = time.monotonic()

    def find(self, key: str) -> Access | None:
        """The rights of a key as a header holds it; None for one that is not known."""
        if self._path is not None and time.monotonic() - self._checked >= CHECK_S:
            self._checked = time.monotonic()
            if self._stat() != self._stamp:
                self.reload()
        return self._keys.get(digest(key.encode("latin-1")))

    def reload(self) -> None:
        """Read the file again."""
        if self._path is None:
            return
        self._stamp = self._stat()
        try:
            self._keys = {**read_keys(self._path), **self._own}
        except ConfigError as error:
            log.error("%s The keys that were read before stay valid.", error.message)
        else:
            log.info("read %d API keys from %s", len(self._keys) - len(self._own), self._path)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path or "")  # noqa: PTH116  (a path that may be missing)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def _header_text(key: str) -> str:
    """A key as a header holds it: its bytes, one character each."""
    return key.encode().decode("latin-1")
