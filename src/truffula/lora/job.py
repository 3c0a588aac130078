"""One load from start to finish: fetch, judge, lay out. What the loading worker does, and what it is told."""

from __future__ import annotations

import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from truffula.errors import AdapterLoadError, ErrorInfo, TruffulaError
from truffula.kernels.adapters import STORED, AdapterLayout
from truffula.kernels.program import Site
from truffula.lora.hub import download
from truffula.lora.image import ImageWriter
from truffula.lora.loading import LoadResult
from truffula.lora.peft import BaseFacts, check_size, validate_adapter
from truffula.lora.place import files_nbytes, fingerprint
from truffula.lora.tables import BaseTable
from truffula.types import AdapterRef

WORKER_VERSION = 2
_SPARE_ROOM = 1 << 20


class LoadLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one load may take. Bytes and seconds.

    ``image_bytes`` bounds an adapter in memory (the engine's budget), ``file_bytes`` on disk; ``memory_bytes`` is what
    the worker's own data may grow by beside them. ``cpu_s`` counts computing, ``wall_s`` and ``download_s`` waiting
    too.
    """

    image_bytes: int = 8 << 30
    file_bytes: int = 8 << 30
    memory_bytes: int = 1 << 30
    cpu_s: float = 120.0
    wall_s: float = 120.0
    download_s: float = 1800.0


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="setup"):
    """First frame to a worker: all it needs to know of the engine."""

    version: int = WORKER_VERSION
    sites: list[Site]
    model: str
    spools: list[str]
    limits: LoadLimits
    layout: AdapterLayout = STORED
    tables: dict[str, BaseTable] = {}
    offline: bool = False
    cache_dir: str | None = None


class Order(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="order"):
    """One adapter to load; answered by one ``Outcome``."""

    ticket: int
    ref: AdapterRef


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="ready"):
    """First frame of a worker, once it has read its setup."""

    version: int = WORKER_VERSION


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="outcome"):
    """``last``: the worker ends after this one, because its memory is spent."""

    result: LoadResult
    last: bool = False


ToWorker = Setup | Order
FromWorker = Ready | Outcome


def load(order: Order, setup: Setup, *, on_files: Callable[[int], None] = lambda nbytes: None) -> LoadResult:
    """Carry out ``order``: a new file in the spool, or the reason why not. Errors of the adapter do not raise.

    ``on_files`` hears the size of the adapter's files once they are there, before they are read. Raises ``MemoryError``
    alone: the caller knows what that means for it.
    """
    started = time.monotonic()
    try:
        folder = _folder(order.ref, setup)
        before = fingerprint(folder)
        on_files(files_nbytes(folder))
        adapter = validate_adapter(
            folder,
            setup.sites,
            base=BaseFacts(model=setup.model, tables=setup.tables),
            max_bytes=setup.limits.image_bytes,
            max_file_bytes=setup.limits.file_bytes,
        )
        image = ImageWriter(adapter, setup.layout)
        check_size(image.nbytes, setup.limits.image_bytes)
        path = _place(order, setup, image.nbytes)
        image.write(path)
        if fingerprint(folder) != before:
            # The source was judged and copied from its mapping: written to in between, the copy is not what was judged.
            path.unlink()
            raise AdapterLoadError(
                "The adapter's files changed while they were read; send the request again.", param="adapter"
            )
    except TruffulaError as error:
        return _failed(order, error.info(), started)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        what = f"The adapter cannot be written to shared memory or the temporary folder: {reason}."
        return _failed(order, AdapterLoadError(what).info(), started)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  of a library, or our own mistake: it ends this load and nothing else
        traceback.print_exception(error, file=sys.stderr)
        kind = type(error).__name__
        what = f"Loading adapter {order.ref.name!r} failed unexpectedly ({kind}); the log has the traceback."
        return _failed(order, AdapterLoadError(what, unexpected=True).info(), started)
    return LoadResult(
        ticket=order.ticket,
        image_path=str(path),
        generation=adapter.generation,
        nbytes=image.nbytes,
        rank=adapter.rank,
        commit=folder.name if order.ref.kind == "hub" else "",  # the cache names its snapshots so
        warnings=adapter.warnings,
        seconds=time.monotonic() - started,
    )


def _place(order: Order, setup: Setup, nbytes: int) -> Path:
    """A new name in the first spool that has room; memory comes before disk in the list."""
    name = f"{order.ticket}-{uuid.uuid4().hex}"
    for spool in setup.spools:
        found = os.statvfs(spool)
        if found.f_bavail * found.f_frsize >= nbytes + _SPARE_ROOM:
            return Path(spool) / name
    raise AdapterLoadError(
        f"There is not enough space for the adapter: it needs {nbytes} bytes in shared memory or the temporary folder.",
        requested_bytes=nbytes,
    )


def _folder(ref: AdapterRef, setup: Setup) -> Path:
    if ref.kind == "local":
        return Path(ref.locator)
    cache_dir = Path(setup.cache_dir) if setup.cache_dir is not None else None
    return download(
        ref.locator,
        ref.revision,
        cache_dir=cache_dir,
        offline=setup.offline,
        max_file_bytes=setup.limits.file_bytes,
    )


def out_of_memory(order: Order, setup: Setup) -> LoadResult:
    """What is said of a load that ended with ``MemoryError``."""
    limit = setup.limits.memory_bytes
    what = (
        f"Loading the adapter takes more than the {limit} bytes of memory that a loading worker may use beside the "
        "adapter's files (--adapter-worker-memory)."
    )
    return _failed(order, AdapterLoadError(what, limit_bytes=limit).info(), time.monotonic())


def _failed(order: Order, error: ErrorInfo, started: float) -> LoadResult:
    return LoadResult(ticket=order.ticket, error=error, seconds=time.monotonic() - started)
