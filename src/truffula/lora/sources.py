"""``AdapterDirectory``: which adapters may be named, and where their files are. Clients only send names.

A name is looked up in this order:

1. names that were registered while it runs (by an administrator, or by the caller of a library), see ``registry.py``:
   for such a NAME, what follows in NAME@VERSION is one of its versions and nothing else;
2. names the operator gave (``name=path-or-hub-id``);
3. the adapter folder: each of its subfolders by name, looked up when it is asked for;
4. loading on first use: a path below an allowed folder, or a Hub id or URL that matches an allowed pattern.

An unknown name raises ``AdapterNotFound`` with the same message for every reason, so that clients cannot find out the
server's paths.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import re
import secrets
import stat
import time
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace as _replace

from truffula.environment import expanded
from truffula.errors import AdapterError, ConfigError, InvalidRequest, unknown_adapter
from truffula.lora.fields import MAX_CONFIG_BYTES, parse_config
from truffula.lora.foreign import close_path, describe_file, describe_folder, meant_as_adapter
from truffula.lora.locations import URL_KINDS, Location, allows, is_url, parse_location, parse_pattern, url_of
from truffula.lora.method_fields import check_config
from truffula.lora.paths import CONFIG, TENSORS, fingerprint
from truffula.lora.registry import CONTENT, AdapterRegistry, split_content
from truffula.types import AdapterRef, Credential

SOURCES = ("local", "hub", *URL_KINDS)
DEFAULT_SOURCES = ("local", "hub")
# Names that clients of huggingface_hub and text-generation send for the base, whatever its name is.
BASE_WORDS = ("", "tgi", "dummy")
MAX_NAME_CHARS = 512
_UNKNOWN = "it is neither set with --adapter nor a subfolder of --adapter-dir"
LISTING_S = 1.0
"""How long a listing of the adapter folder is good."""
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
SETTLED_NS = 2 * 10**9
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?(@[\w./-]{1,128})?\Z", re.ASCII)
MAX_TOKEN_CHARS = 4096
_TOKEN = re.compile(rf"[\x21-\x7e]{{1,{MAX_TOKEN_CHARS}}}\Z")
log = logging.getLogger(__name__)


def reserved(name: str, base_names: Collection[str]) -> bool:
    """Whether ``name`` means the base to some client, or (``base:…``) an adapter by another name: no adapter has it."""
    return name in BASE_WORDS or name in base_names or any(name.startswith(f"{base}:") for base in base_names if base)


def _printable(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME_CHARS and name.isprintable() and CONTENT not in name


def _is_folder_name(name: str) -> bool:
    """Whether ``name`` is one printable path component that does not begin with a dot."""
    return _printable(name) and not name.startswith(".") and "/" not in name and "\\" not in name


def _has_no_links(folder: Path) -> bool:
    """Whether ``folder`` is a folder, and both files of an adapter are files in it; False where one is a link. It costs
    a tenth of resolving links, and adapter folders hold thousands of adapters.
    """
    try:
        files = [os.lstat(f"{folder}/{name}").st_mode for name in (CONFIG, TENSORS)]
        return stat.S_ISDIR(os.lstat(folder).st_mode) and all(map(stat.S_ISREG, files))
    except (OSError, ValueError):  # missing, or a name that the system does not take
        return False


def _resolved(folder: Path) -> Path:
    """``folder`` without links. Raises ``ConfigError`` when its path is not UTF-8, as an adapter's must be."""
    real = folder.resolve()
    if not _is_utf8(real):
        raise ConfigError(f"The folder {str(folder)!r} has a path that is not UTF-8; rename it.", param="adapters")
    return real


def _is_utf8(path: Path) -> bool:
    """Whether frames to a loading worker can hold ``path``."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True)
class _Listing:
    """The folder's adapters ``at`` a time (monotonic seconds), when its mtime was ``changed``."""

    changed: int
    at: float
    names: frozenset[str]


class AdapterDirectory:
    """Resolves a client's name to an ``AdapterRef``. Thread-safe.

    Args:
        adapters: Name → folder, or Hub id (``org/name``, ``org/name@revision``). A folder that exists is preferred.
        adapter_dir: Each of its subfolders is an adapter by the folder's name. Links that leave it are not followed.
        allow_local: Folders below which a client may name an adapter by absolute path (or by a path relative to one).
        allow_hub: Shell patterns of Hub ids a client may name, such as ``my-org/*``.
        default_source: Where a name is looked up that is in neither of the first two and names no source.
        allow_source: Patterns of URLs a client may name, such as ``s3://bucket/adapters/*``.
        allow_credentials: Whether a client's own token is sent to what it names (Hub ids and https URLs). It proves the
            client's right: nothing that was loaded by it serves requests without it.
        recheck_s: A source that is not local is checked for changes by the first use in each period of this length;
            None: only when it is loaded.
        base_names: The names of the base. Names that are ``reserved`` besides them are not served as adapters. None:
            the caller is the only client, and nothing is reserved.
        registry: What is registered at run time; by default, nothing yet, and kept in memory.

    Raises ``ConfigError`` for a name or a source that can't be used.
    """

    def __init__(
        self,
        adapters: Mapping[str, Path | str] | None = None,
        *,
        adapter_dir: Path | None = None,
        allow_local: tuple[Path, ...] = (),
        allow_hub: tuple[str, ...] = (),
        default_source: str = "hub",
        allow_source: tuple[str, ...] = (),
        allow_credentials: bool = False,
        recheck_s: float | None = None,
        base_names: Collection[str] | None = None,
        registry: AdapterRegistry | None = None,
    ) -> None:
        if default_source not in DEFAULT_SOURCES:
            raise ConfigError(f"adapter source {default_source!r} must be one of {', '.join(DEFAULT_SOURCES)}.")
        self._base_names = base_names
        self._left_out: set[str] = set()
        self._listing: _Listing | None = None
        self._plain: dict[str, int] = {}  # subfolders that are adapters without links, and their mtimes
        for name in adapters or ():
            if self._is_reserved(name):
                raise ConfigError(f"{name!r} is not a valid adapter name: it means the base model.", param="adapters")
        if adapter_dir is not None and not adapter_dir.is_dir():
            why = "is a file, not a folder of adapters" if adapter_dir.exists() else "does not exist"
            raise ConfigError(f"The adapter folder {adapter_dir} {why}.", param="adapter_dir")
        self._named = {name: _parse_source(name, source) for name, source in (adapters or {}).items()}
        self.registry = registry or AdapterRegistry()
        self._renewed: dict[tuple[str, str, str | None], str] = {}
        self._dir = _resolved(adapter_dir) if adapter_dir is not None else None
        self._allow_local = tuple(map(_resolved, allow_local))
        self._allow_hub = allow_hub
        self._default_source = default_source
        self._allow_source = tuple(map(parse_pattern, allow_source))
        self._allow_credentials = allow_credentials
        self._recheck_s = recheck_s
        self._salt = secrets.token_bytes(16)

    def resolve(
        self,
        name: str | None,
        source: str | None = None,
        base_names: Collection[str] = (),
        token: str | None = None,
    ) -> AdapterRef | None:
        """The adapter called ``name``; None when the name means the base (None, empty, or one of ``base_names``). Of
        NAME@sha:GENERATION the adapter ``wanted`` in that generation.

        ``token``: the client's own for the source of the adapter. It has no effect on what the operator named.

        Raises ``AdapterNotFound`` when the operator allows no such adapter, ``InvalidRequest`` for an unknown source.
        Costs a few ``stat`` calls for local adapters: their fingerprint is taken here, so that a changed folder is read
        again by the next request.
        """
        if not name or name in base_names:
            return None
        if source is not None and source not in SOURCES:
            raise InvalidRequest(
                f"adapter_source {source[:40]!r} is not one of {', '.join(SOURCES)}.", param="adapter_source"
            )
        name, wanted = split_content(name)
        ref = self._find(name, source, token)
        ref = _replace(ref, wanted=wanted) if wanted else ref
        renewed = self._renewed.get((ref.kind, ref.locator, ref.revision))
        return ref if renewed is None else _replace(ref, fingerprint=f"{ref.fingerprint}+{renewed}")

    def _find(self, name: str, source: str | None, token: str | None) -> AdapterRef:
        if not _printable(name):
            reason = f"an adapter's name has 1 to {MAX_NAME_CHARS} printable characters"
            raise unknown_adapter(name, reason)
        if self._is_reserved(name):
            raise unknown_adapter(name, "the name is reserved for the base model")
        for named in (self.registry.find(name), self._named.get(name)):
            if named is not None and source in (None, named.kind):
                return self._current(named)
        if source is None and self.registry.owns(name):
            raise unknown_adapter(name, "that adapter has no such version")
        if source in (None, "local"):
            folder = self._in_dir(name)
            if folder is not None:
                return _with_fingerprint(AdapterRef(name=name, kind="local", locator=str(folder), root=str(self._dir)))
        if is_url(name) or (source is not None and source in URL_KINDS):
            return self._current(self._with_token(self._at_url(name, source), token))
        if (source or self._default_source) == "hub":
            return self._current(self._with_token(self._on_hub(name), token))
        return self._allowed_path(name)

    def _at_url(self, name: str, source: str | None) -> AdapterRef:
        try:
            location = parse_location(url_of(source, name) if source in URL_KINDS else name)
        except ValueError as error:
            raise unknown_adapter(name, f"{_UNKNOWN}, and {error}") from None
        root = next((pattern for pattern in self._allow_source if allows(pattern, location)), None)
        if root is None or source not in (None, location.kind):
            above = location.url.rpartition("/")[0]
            raise unknown_adapter(name, f"{_UNKNOWN}; as a URL --allow-source '{above}/*' allows it")
        return _of_location(location.url, location, root)

    def _with_token(self, ref: AdapterRef, token: str | None) -> AdapterRef:
        if not token or not self._allow_credentials or ref.kind not in ("hub", "http"):
            return ref
        if not _TOKEN.match(token):
            raise InvalidRequest(
                f"api_token must have 1 to {MAX_TOKEN_CHARS} visible ASCII characters.", param="api_token"
            )
        digest = hashlib.blake2b(token.encode(), key=self._salt, digest_size=16).hexdigest()
        return _replace(ref, credential=Credential(digest, token))

    def _current(self, ref: AdapterRef) -> AdapterRef:
        """``ref`` with the fingerprint that it has now."""
        if ref.kind == "local":
            return _with_fingerprint(ref)
        fixed = ref.kind == "hub" and ref.credential is None and _COMMIT.match(ref.revision or "")
        if self._recheck_s is None or fixed:
            return ref
        # Not all of them at one time. The clock is the machine's, so that the period is the same after a restart.
        shift = zlib.crc32(ref.locator.encode()) / 2**32
        return _replace(ref, fingerprint=str(int(time.time() / self._recheck_s + shift)))

    def names(self) -> list[str]:
        """The names of registered adapters, of aliases, of the operator's adapters and of the folder's, sorted.
        Versions, and what is loaded on first use, are not listed.
        """
        return sorted({*self.registry.names(), *self._named, *self._listed()})

    def peek(self, name: str) -> AdapterRef | None:
        """The adapter that is listed as ``name``, without the state of its files; None for any other name."""
        named = self.registry.find(name) or self._named.get(name)
        folder = None if named is not None or self._is_reserved(name) else self._in_dir(name)
        if folder is None:
            return named
        return AdapterRef(name=name, kind="local", locator=str(folder), root=str(self._dir))

    def locate(self, name: str, source: Path | str) -> AdapterRef:
        """The adapter that ``add`` would register as ``name`` for this folder or Hub id. Nothing is added.

        Raises ``ConfigError`` for a name or a source that can't be used.
        """
        return _with_fingerprint(_parse_source(name, source))

    def add(self, ref: AdapterRef) -> None:
        """Register ``ref``, which ``locate`` returned, under its name. It replaces an adapter of the same name."""
        self.registry.add([ref])

    def remove(self, name: str) -> None:
        """Remove the adapter that ``add`` registered under ``name``. The operator's own adapters remain."""
        self.registry.remove(name)

    def is_offered(self, name: str) -> bool:
        """Whether the operator's options offer an adapter of this name, whatever is registered."""
        return name in self._named or self._in_dir(name) is not None

    def renewed(self, ref: AdapterRef) -> AdapterRef:
        """``ref`` as another state of its source, so that it is read again: a branch of the Hub may have moved."""
        current = self._current(_replace(ref, fingerprint=""))
        return (
            current if ref.kind == "local" else _replace(current, fingerprint=f"{current.fingerprint}+{time.time_ns()}")
        )

    def accept(self, ref: AdapterRef) -> None:
        """From now on ``resolve`` gives its source the state of ``ref``, which ``renewed`` returned."""
        if ref.kind != "local":
            self._renewed[ref.kind, ref.locator, ref.revision] = ref.fingerprint.rpartition("+")[2]

    def warnings(self) -> list[str]:
        """Warnings for the operator at the start: sources without an adapter, and adapters that cannot be served.

        Reads the names of files and ``adapter_config.json``, of each named folder and of each subfolder of the adapter
        folder; no tensors.
        """
        texts = {name: _named_warning(ref) for name, ref in self._named.items()}
        found = [f"adapter {name!r}: {text}" for name, text in texts.items() if text is not None]
        try:
            return [*found, *self._dir_warnings()]
        except OSError as error:
            return [*found, f"--adapter-dir {self._dir} cannot be read: {error.strerror or error}"]

    def _dir_warnings(self) -> Iterator[str]:
        if self._dir is None:
            return
        if describe_folder(self._dir) is None:
            yield (
                f"--adapter-dir {self._dir} is an adapter itself, not a folder of adapters: serve it with "
                f"--adapter {self._dir.name}={self._dir}"
            )
            return
        listed = self._listed()
        with os.scandir(self._dir) as entries:
            names = sorted(entry.name for entry in entries if _is_folder_name(entry.name) and entry.is_dir())
        for name in names:
            if why := self._why_not_served(self._dir / name, listed):
                yield f"--adapter-dir: {name} cannot be served: {why}"
        if not listed:
            yield f"--adapter-dir {self._dir}: no subfolder is an adapter (a folder with {CONFIG} and {TENSORS})"

    def _why_not_served(self, folder: Path, listed: Collection[str]) -> str | None:
        """Why a subfolder that was meant as an adapter, or contains some, is not served; None for any other."""
        try:
            if not meant_as_adapter(folder):
                return None
        except OSError as error:
            return f"it cannot be read: {error.strerror or error}"
        why = _why_refused(folder)
        if why is None and folder.name not in listed and self._in_dir(folder.name) is None:
            return f"its files are links to places outside of {self._dir}"
        return why

    def _listed(self) -> frozenset[str]:
        """The folder's adapters. Listed again when the folder itself has changed, and after ``LISTING_S``, since a file
        that is added to a subfolder does not change the folder.
        """
        if self._dir is None:
            return frozenset()
        kept = self._listing
        try:
            changed = self._dir.stat().st_mtime_ns
            if kept is not None and kept.changed == changed and time.monotonic() - kept.at < LISTING_S:
                return kept.names
            at = time.monotonic()
            with os.scandir(self._dir) as entries:
                there = {entry.name for entry in entries if self._is_adapter(entry)}
        except OSError:
            return frozenset()  # the folder was removed; the named adapters are still served
        for gone in self._plain.keys() - there:
            self._plain.pop(gone, None)
        listed = frozenset() if kept is None else kept.names
        left_out = {name for name in there - listed if self._is_reserved(name)}
        for name in sorted(left_out - self._left_out):
            log.warning("--adapter-dir: %r is not served: that name means the base model", name)
        self._left_out |= left_out
        self._listing = _Listing(changed, at, frozenset(there - left_out))
        return self._listing.names

    def _is_adapter(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry of the folder is an adapter. A subfolder that was one and has its mtime still is one: files
        were neither added to it nor removed. It saves most of the time that listing thousands takes.
        """
        try:
            changed = entry.stat(follow_symlinks=False).st_mtime_ns
        except OSError:
            return False  # it has vanished
        if self._plain.get(entry.name) == changed:
            return True
        if self._in_dir(entry.name) is None:
            self._plain.pop(entry.name, None)
            return False
        # Not one with links, whose targets may vanish, nor one that changed just now and may do so within this mtime.
        if time.time_ns() - changed > SETTLED_NS and _has_no_links(Path(entry.path)):
            self._plain[entry.name] = changed
        return True

    def _is_reserved(self, name: str) -> bool:
        return self._base_names is not None and reserved(name, self._base_names)

    def _in_dir(self, name: str) -> Path | None:
        if self._dir is None or not _is_folder_name(name):
            return None
        path = self._dir / name
        if _has_no_links(path):
            return path
        try:
            folder = path.resolve(strict=True)
            files = [(folder / file).resolve() for file in (CONFIG, TENSORS)]
            inside = self._dir in folder.parents and all(file.is_relative_to(self._dir) for file in files)
            return folder if inside and files[0].is_file() and _is_utf8(folder) else None
        except (OSError, RuntimeError, ValueError):  # vanished, a loop of links, a name the system does not take
            return None

    def _allowed_path(self, name: str) -> AdapterRef:
        for root in self._allow_local:
            try:
                folder = (root / name).resolve(strict=True)  # an absolute name replaces the root
                if folder.is_relative_to(root) and (folder / CONFIG).is_file() and _is_utf8(folder):
                    # One name per folder, however it was spelt: names are keys of the pool's and the metrics' tables.
                    own = str(folder.relative_to(root)) if folder != root else root.name
                    return _with_fingerprint(AdapterRef(name=own, kind="local", locator=str(folder), root=str(root)))
            except (OSError, RuntimeError, ValueError):
                continue
        where = ", ".join(map(str, self._allow_local)) or "none is allowed; --allow-local FOLDER allows one"
        raise unknown_adapter(
            name, f"{_UNKNOWN}, and it is not a path to an adapter below a folder that clients may name ({where})"
        )

    def _on_hub(self, name: str) -> AdapterRef:
        if _HUB_ID.match(name) and ".." not in name:
            repo, _, revision = name.partition("@")
            if any(fnmatch.fnmatchcase(repo, pattern) for pattern in self._allow_hub):
                return AdapterRef(name=name, kind="hub", locator=repo, revision=revision or None)
            if "/" in repo:
                owner = repo.split("/")[0]
                raise unknown_adapter(
                    name, f"{_UNKNOWN}; if it is a Hub id, --allow-hub {repo!r} or --allow-hub '{owner}/*' allows it"
                )
        raise unknown_adapter(name, f"{_UNKNOWN}, and it is not a Hub id")


def _parse_source(name: str, source: Path | str) -> AdapterRef:
    """The adapter of an operator's ``name=source``."""
    if not _printable(name):
        raise ConfigError(
            f"{name[:80]!r} is not a valid adapter name: names have 1 to {MAX_NAME_CHARS} printable characters, "
            f"without {CONTENT}.",
            param="adapters",
        )
    if is_url(name):
        raise ConfigError(
            f"{name[:80]!r} is not a valid adapter name: it begins like a URL. Write NAME=URL.", param="adapters"
        )
    folder = expanded(source)
    if folder.is_dir():
        return AdapterRef(name=name, kind="local", locator=str(_resolved(folder)))
    text = str(source)
    who = "" if text == name else f"Adapter {name!r}: "
    if isinstance(source, str) and is_url(text):
        try:
            location = parse_location(text)
        except ValueError as error:
            raise ConfigError(f"{who}{text!r} is not the URL of an adapter: {error}.", param="adapters") from None
        return _of_location(name, location, f"{location.url}/*")
    if folder.is_file():
        raise ConfigError(f"{who}{describe_file(folder)}", param="adapters")
    if isinstance(source, str) and _HUB_ID.match(text) and "/" in text and not text.startswith("."):
        repo, _, revision = text.partition("@")
        return AdapterRef(name=name, kind="hub", locator=repo, revision=revision or None)
    raise ConfigError(
        f"{who}{text!r} is neither an existing folder nor a Hub id such as org/name.{close_path(folder)}",
        param="adapters",
    )


def _of_location(name: str, location: Location, root: str) -> AdapterRef:
    return AdapterRef(name=name, kind=location.kind, locator=location.url, root=root)


def _named_warning(ref: AdapterRef) -> str | None:
    """Why an operator's adapter cannot be served, from file names and ``adapter_config.json`` alone."""
    if ref.kind in URL_KINDS:
        return None  # it is fetched when it is used
    if ref.kind == "hub":
        # A Hub id looks like a relative path: a mistyped folder would only show when the Hub does not know it.
        folder = Path(ref.locator)
        if not folder.parent.is_dir():
            return None
        return f"there is no folder {folder} here, so it is fetched from the Hub when it is used.{close_path(folder)}"
    why = _why_refused(Path(ref.locator))
    return None if why is None else f"{ref.locator} cannot be served: {why}"


def _why_refused(folder: Path) -> str | None:
    """Why the adapter in ``folder`` will be refused, from file names and ``adapter_config.json`` alone."""
    try:
        if (lacking := describe_folder(folder)) is not None:
            return lacking[0]
        with (folder / CONFIG).open("rb") as file:
            check_config(parse_config(file.read(MAX_CONFIG_BYTES + 1)))
    except AdapterError as error:
        return error.message
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return None


def _with_fingerprint(ref: AdapterRef) -> AdapterRef:
    if ref.kind != "local":
        return ref
    folder = Path(ref.locator)
    names = lambda: {file.name for file in folder.iterdir()}
    return _replace(ref, fingerprint=fingerprint(lambda name: (folder / name).stat(), names))
