"""An adapter that is not on this machine: compared with its source, then taken from the disk cache, or downloaded.

All its files are of one state of the source: their stamps are equal before and after the download, so there was a
moment when all of them were the current ones. A client's credential is shown to the source at every
load, before anything is taken from the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from truffula.errors import AdapterError, AdapterLoadError, AdapterNotFound, unknown_adapter
from truffula.lora.disk_cache import CachedSource, DiskCache, Scratch, Stamp
from truffula.lora.extra_files import MAX_BYTES, READ
from truffula.lora.fields import MAX_CONFIG_BYTES
from truffula.lora.hub import HubStore
from truffula.lora.paths import CONFIG, TENSORS
from truffula.lora.shards import INDEX, MAX_INDEX_BYTES, check_total, indexed_files
from truffula.lora.stores import TRIES, SourceError, Store, open_store
from truffula.types import AdapterRef


@dataclass(frozen=True)
class Fetched:
    """Where a load reads its adapter. ``folder`` is None when it is the state that the caller ``has``.

    ``commit`` identifies the state; ``warnings`` are for the operator.
    """

    folder: Path | None
    commit: str
    warnings: tuple[str, ...] = ()


@contextmanager
def fetch(ref: AdapterRef, has: str, cache: DiskCache, *, offline: bool, max_file_bytes: int) -> Iterator[Fetched]:
    """The adapter's files, which stay while the block runs.

    Args:
        ref: Of a kind with a URL, or of the Hub with a credential.
        has: The ``commit`` that the caller has loaded; "" if none.
        offline: Take what the cache has, without asking the source.
        max_file_bytes: Of one file.

    Raises ``AdapterNotFound`` for what is absent or may not be read, with one message for both, ``AdapterError`` for
    what is not an adapter or too large, ``AdapterLoadError`` when the source fails or changes all the time.
    """
    with ExitStack() as stack:
        try:
            found = stack.enter_context(_fetched(_Source(ref, cache, offline, max_file_bytes, stack), has))
        except SourceError as error:
            text = error.text or "its files change while they are read"
            raise AdapterLoadError(f"Adapter {ref.name!r} cannot be fetched: {text}.", param="adapter") from None
        except OSError as error:
            raise AdapterLoadError(
                f"The disk cache of adapters cannot be written to: {error.strerror or error}. Set --adapter-cache-dir "
                "to a folder with room that the server may write to.",
            ) from error
        yield found


@contextmanager
def _fetched(source: _Source, has: str) -> Iterator[Fetched]:
    for _ in range(TRIES):
        stamps, warnings = source.state()
        known = source.known
        if known is not None and known.stamps == stamps:
            if has == known.entry:
                source.note()
                yield Fetched(None, has, warnings)
                return
            with source.cache.open(known.entry) as folder:
                if folder is not None:
                    source.note()
                    yield Fetched(folder, known.entry, warnings)
                    return
            source.known = None  # evicted or damaged
            continue
        with source.cache.scratch() as scratch:
            if source.download(stamps, scratch) and source.ask() == stamps:
                entry, folder = source.cache.store(source.key, stamps, source.checked, scratch)
                damaged = ("its files in the disk cache were damaged, so they were fetched again",)
                yield Fetched(folder, entry, (*warnings, *(damaged if source.cache.damaged else ())))
                return
    raise SourceError("changed", "")


class _Source:
    """A source during one load: what the cache knows of it, and its store, opened when it is needed."""

    def __init__(self, ref: AdapterRef, cache: DiskCache, offline: bool, max_file_bytes: int, stack: ExitStack) -> None:
        self.ref = ref
        self.cache = cache
        self.key = hashlib.sha256("\n".join((ref.kind, ref.locator, ref.revision or "")).encode()).hexdigest()
        self.known: CachedSource | None = cache.find(self.key)
        self._offline = offline
        self._max_file_bytes = max_file_bytes
        self._stack = stack
        self._store: Store | None = None
        self._asked = False
        self._index: tuple[Stamp, list[str]] | None = None

    def state(self) -> tuple[Mapping[str, Stamp], tuple[str, ...]]:
        """The stamps of its files, and warnings: as cached where the source was compared already in this period, and
        where it cannot be reached. A client's credential is always shown to the source.
        """
        known = self.known
        may_read = known is not None and known.checked is not None and self.ref.credential is None
        cached = known if may_read else None
        if cached is not None and (self._offline or (self.ref.fingerprint and cached.checked == self.ref.fingerprint)):
            return cached.stamps, ()
        if self._offline:
            raise SourceError("refused", "the server is offline, and its disk cache lacks the adapter")
        try:
            return self.ask(), ()
        except AdapterNotFound:
            if cached is not None:
                self.cache.note(self.key, replace(cached, checked=None))
            raise
        except SourceError as error:
            if cached is None or error.kind != "network":
                raise
            return cached.stamps, (f"its source cannot be asked for changes ({error.text}); the cached files are used",)

    def ask(self) -> dict[str, Stamp]:
        """The stamps of its files now."""
        store = self._opened()
        stamps = {name: store.stat(name) for name in (CONFIG, TENSORS)}
        if stamps[CONFIG] is None:
            raise unknown_adapter(self.ref.name, f"{self.ref.locator}/{CONFIG} is absent or forbidden", param="model")
        self._asked = True
        if stamps[TENSORS] is None and (index := store.stat(INDEX)) is not None:
            del stamps[TENSORS]
            stamps |= {INDEX: index} | {name: store.stat(name) for name in self._indexed(index)}
        for name, stamp in stamps.items():
            if stamp is None:
                raise AdapterError(
                    f"Adapter {self.ref.name!r} has no {name} at its source, or it may not be read. Save it with "
                    f"PEFT's save_pretrained; pickles (.bin) and shards without {INDEX} are not read.",
                    param=name,
                )
            self._check_size(name, stamp.size or 0)
        found = {name: stamp for name, stamp in stamps.items() if stamp is not None}
        check_total(
            (stamp.size or 0 for name, stamp in found.items() if name not in (CONFIG, INDEX)), self._max_file_bytes
        )
        return found

    def _indexed(self, stamp: Stamp) -> list[str]:
        """The shards that the index names."""
        if self._index is None or self._index[0] != stamp:
            content = b""
            for chunk in self._opened().read(INDEX, stamp):
                content += chunk
                self._check_size(INDEX, len(content))
            self._index = stamp, indexed_files(content)
        return self._index[1]

    def download(self, stamps: Mapping[str, Stamp], scratch: Scratch) -> bool:
        """Write its files, and the small ones that the validation reads, to a scratch folder. False when one of them
        has changed.
        """
        try:
            self._download(stamps, scratch)
        except SourceError as error:
            if error.kind != "changed":
                raise
            return False
        return True

    def _download(self, stamps: Mapping[str, Stamp], scratch: Scratch) -> None:
        store = self._opened()
        extra = {name: store.stat(name) for name in READ}
        wanted = dict(stamps) | {
            name: stamp for name, stamp in extra.items() if stamp is not None and (stamp.size or 0) <= MAX_BYTES
        }
        for name, stamp in wanted.items():
            with (scratch.folder / name).open("wb") as file:
                file.truncate(stamp.size or 0)
        self.cache.make_room()
        before = 0  # of the shards that are here
        for name, stamp in wanted.items():
            done, is_shard = 0, name not in (CONFIG, INDEX, *READ)
            with (scratch.folder / name).open("r+b") as file:
                for chunk in store.read(name, stamp):
                    done += len(chunk)
                    self._check_size(name, done)
                    check_total((before, done * is_shard), self._max_file_bytes)
                    file.write(chunk)
                file.truncate()
            before += done * is_shard
            if stamp.size is not None and done != stamp.size:
                raise SourceError("network", f"it sent {done} of the {stamp.size} bytes of {name}; try again")

    @property
    def checked(self) -> str | None:
        """What to record of this check: one by a client's right is no check of the operator's."""
        return self.ref.fingerprint if self.ref.credential is None else None

    def note(self) -> None:
        """Record that the source was compared, if it was."""
        known, checked = self.known, self.checked
        if self._asked and known is not None and checked is not None and checked != known.checked:
            self.cache.note(self.key, replace(known, checked=checked))

    def _opened(self) -> Store:
        if self._store is None:
            if self.ref.kind == "hub":  # in a scratch folder, since that of a killed process is removed by the next one
                made: Store = HubStore(self.ref, self._stack.enter_context(self.cache.scratch()).folder)
            else:
                made = open_store(self.ref)
            self._store = self._stack.enter_context(closing(made))
        return self._store

    def _check_size(self, name: str, size: int) -> None:
        most = min(MAX_CONFIG_BYTES, self._max_file_bytes) if name == CONFIG else self._max_file_bytes
        most = MAX_BYTES if name in READ else min(MAX_INDEX_BYTES, most) if name == INDEX else most
        if size > most:
            limit = f"the limit is {most} (--max-adapter-file)"
            raise AdapterError(f"Adapter {self.ref.name!r}: {name} has {size} bytes; {limit}.", param=name)
