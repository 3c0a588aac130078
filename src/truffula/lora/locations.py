"""Adapters at URLs (S3, Google Cloud Storage, Azure, HTTP), and the patterns by which an operator allows them.

A location is the URL of a folder, in one spelling: two that differ are two sources. The patterns' only wildcard is
``*``, in the path: bucket and host are always literal.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from truffula.errors import ConfigError
from truffula.types import AdapterRef

UrlKind = Literal["s3", "gcs", "azure", "http"]
URL_KINDS: tuple[UrlKind, ...] = get_args(UrlKind)
_SCHEMES: MappingProxyType[str, UrlKind] = MappingProxyType(
    {"s3": "s3", "gs": "gcs", "az": "azure", "https": "http", "http": "http"}
)
_EXAMPLES = "s3://BUCKET/PATH, gs://BUCKET/PATH, az://ACCOUNT/CONTAINER/PATH or https://HOST/PATH"
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?(:[0-9]{1,5})?", re.ASCII)
_SEGMENT = re.compile(r"[\w.~+=@-]{1,255}", re.ASCII)
MAX_URL_CHARS = 512


@dataclass(frozen=True)
class Location:
    """The URL of an adapter's folder, without its last slash. ``origin`` is its scheme and its host or bucket."""

    kind: UrlKind
    origin: str
    path: str

    @property
    def url(self) -> str:
        return f"{self.origin}/{self.path}"


def is_url(text: str) -> bool:
    """Whether ``text`` begins with a scheme of these sources."""
    return text.partition("://")[0] in _SCHEMES and "://" in text


def url_of(kind: str, name: str) -> str:
    """``name`` as a URL of that kind of source: LoRAX's clients send ``bucket/path`` and the kind apart."""
    scheme = next(scheme for scheme, known in _SCHEMES.items() if known == kind)
    return name if is_url(name) else f"{scheme}://{name}"


def parse_location(text: str) -> Location:
    """The location that ``text`` is the URL of.

    Raises ``ValueError``, which says what is wrong, for another scheme, user names, queries, escapes (``%20``), empty
    segments, ``.`` and ``..``: they could spell one location in several ways, or leave an allowed prefix.
    """
    scheme, separator, rest = text.partition("://")
    kind = _SCHEMES.get(scheme)
    if kind is None or not separator:
        raise ValueError(f"a source's URL is like {_EXAMPLES}")
    host, _, path = rest.rstrip("/").partition("/")
    if len(text) > MAX_URL_CHARS:
        raise ValueError(f"a source's URL has at most {MAX_URL_CHARS} characters")
    if not _HOST.fullmatch(host):
        raise ValueError(f"{host[:80]!r} is not a host or bucket in lower case")
    segments = path.split("/")
    if len(segments) < (2 if kind == "azure" else 1) or not path:
        raise ValueError(f"it names no folder; a source's URL is like {_EXAMPLES}")
    for segment in segments:
        if not _SEGMENT.fullmatch(segment) or segment in (".", ".."):
            raise ValueError(f"{segment[:80]!r} in its path has other characters than letters, digits and _.~+=@-")
    return Location(kind, f"{scheme}://{host}", path)


def parse_pattern(pattern: str) -> str:
    """A pattern of ``--allow-source`` in its one spelling. Raises ``ConfigError`` for one that cannot match."""
    try:
        if "*" in pattern.partition("://")[2].partition("/")[0]:
            raise ValueError("* is allowed in the path only, not in the host or bucket")
        parse_location(pattern.replace("*", "x"))
    except ValueError as error:
        raise ConfigError(f"allow_source is {pattern!r}: {error}.", param="allow_source") from None
    return pattern


def allows(pattern: str, location: Location) -> bool:
    """Whether a pattern matches. ``*`` matches any characters, slashes too."""
    return fnmatch.fnmatchcase(location.url, pattern)


def origin_of(ref: AdapterRef) -> str:
    """What a slow or failing source has in common with others: its scheme and host or bucket; the kind elsewhere. Of a
    merge that of its first part which is not on this machine."""
    if ref.parts:
        return next((origin for part in ref.parts if (origin := origin_of(part.ref)) != "local"), "local")
    return parse_location(ref.locator).origin if ref.kind in URL_KINDS else ref.kind
