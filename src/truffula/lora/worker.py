"""The loading worker: ``python -m truffula.lora.worker FD FOLDER…``, started by ``lora/loading.py``.

It executes one load at a time: download the adapter, validate it, write its image into a staging folder. It is a
process of its own with low priority and limits on memory and CPU time, and it can be killed: a hostile or huge adapter
does not disturb the engine. It imports neither torch nor transformers. It ends when its socket closes, in the middle of
a load too, and then removes the staging folders of its engine if that was killed; those of other killed engines it
removes at its start.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import resource
import select
import shutil
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from truffula.errors import AdapterError, AdapterLoadError, ErrorInfo, KernelError, TruffulaError, WireError
from truffula.frames import Channel, Disconnected, Frame
from truffula.kernels.adapters import STORED, AdapterLayout
from truffula.kernels.program import Site
from truffula.lora.base import BaseSource, BaseWeights
from truffula.lora.disk_cache import DiskCache
from truffula.lora.fields import MERGE
from truffula.lora.folder import open_adapter, open_folder
from truffula.lora.hub import download
from truffula.lora.image import ImageHeader, ImageWriter, Reserve, check_size
from truffula.lora.merging import MergePart, merge_adapters
from truffula.lora.paths import CONFIG, OpenFolder, fingerprint
from truffula.lora.peft import BaseFacts, Matched, PeftAdapter, validate_adapter
from truffula.lora.remote import Fetched, fetch
from truffula.lora.shards import tensor_files
from truffula.lora.staging import remove_abandoned, sweep
from truffula.types import AdapterRef

VERSION = 4
CLEAN_UP_TRIES, CLEAN_UP_PAUSE_S = 10, 0.05
CHANGED_FILES_TRIES = 4
MAX_MESSAGE_CHARS = 4000
_SPARE_BYTES = 1 << 20


class LoadLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one load, in bytes and seconds.

    ``image_bytes`` bounds an adapter in memory (the engine's budget), ``file_bytes`` on disk; ``memory_bytes`` is how
    much the worker's own data may grow besides. ``cpu_s`` counts computing, ``wall_s`` and ``download_s`` waiting too.
    """

    image_bytes: int = 8 << 30
    file_bytes: int = 8 << 30
    memory_bytes: int = 1 << 30
    cpu_s: float = 120.0
    wall_s: float = 120.0
    download_s: float = 1800.0


class Setup(Frame, frozen=True, kw_only=True):
    """The first frame to a worker: the base, the layout and the limits of all its loads.

    ``model`` is the base's name, for messages; ``base`` where its weights are; ``layout`` the executable's.
    ``offline`` and ``cache_dir`` are for adapters of the Hub, ``adapter_cache`` (a folder; "": none) and its limit in
    bytes for those of URLs.
    """

    sites: Sequence[Site]
    model: str
    limits: LoadLimits = LoadLimits()
    layout: AdapterLayout = STORED
    base: BaseSource | None = None
    offline: bool = False
    cache_dir: str | None = None
    adapter_cache: str = ""
    adapter_cache_bytes: int = 0


class LoadRequest(Frame, frozen=True, kw_only=True):
    """One adapter to load; answered by one ``LoadResponse``. ``has``: the commit that is loaded already, or ""."""

    ticket: int
    ref: AdapterRef
    has: str = ""


class LoadResponse(Frame, frozen=True, kw_only=True):
    """The result of one load: an image and its file (the receiver maps it, then unlinks it), or the error, or neither:
    the commit that the request ``has`` is the current one.

    ``last``: the worker ends after this response, because it has reached its memory limit.
    """

    ticket: int
    image_path: str | None = None
    image: ImageHeader | None = None
    error: ErrorInfo | None = None
    commit: str = ""  # of an adapter that is not local: identifies the state of its source
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    last: bool = False


ToWorker = Setup | LoadRequest


def serve(fd: int, staging: Sequence[Path]) -> int:
    """Serve the socket ``fd`` until it closes."""
    channel = Channel(socket.socket(fileno=fd), msgspec.msgpack.Decoder(ToWorker).decode, VERSION)
    inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox, staging), name="listen", daemon=True).start()
    sweep(staging)
    setup = inbox.get()
    if not isinstance(setup, Setup):
        raise WireError("The first frame to a loading worker must be its setup.")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ImageWriter("", 0, (), setup.layout)  # imports what packs for this layout, before a load waits for it
    allowed = _data_bytes() + setup.limits.memory_bytes
    matched, reserve = Matched(), Reserve(staging[0])
    reserve.fill(_usual_bytes(setup.sites))
    with contextlib.suppress(Disconnected):
        while True:
            request = inbox.get()
            if not isinstance(request, LoadRequest):
                raise WireError("The setup frame was sent twice.")
            _limit_cpu(setup.limits)
            _limit_memory(allowed)
            # The adapter's file is mapped privately, hence counted as data: its size is added once it is known.
            try:
                response = load(
                    request, setup, staging, matched, reserve, on_files=lambda nbytes: _limit_memory(allowed + nbytes)
                )
            except MemoryError:
                break
            channel.send(response)
            if response.image is not None and inbox.empty():
                reserve.fill(response.image.nbytes)
        # Some memory stays allocated, and the next load may use the full limit: that needs a new worker.
        _limit_memory(_data_bytes() + (16 << 20))
        channel.send(msgspec.structs.replace(out_of_memory(request, setup), last=True))
    return 0


def _listen(channel: Channel[ToWorker], inbox: queue.SimpleQueue[ToWorker], staging: Sequence[Path]) -> None:
    """Put frames into ``inbox``. The end of the stream ends the process, whatever the main thread is doing."""
    waiter = select.poll()
    waiter.register(channel, select.POLLIN)
    status = 0
    try:
        while True:
            waiter.poll()
            frames = channel.receive()
            if frames is None:
                break
            for frame in frames:
                inbox.put(frame)
    except (WireError, MemoryError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        status = 1
    for _ in range(CLEAN_UP_TRIES):  # a killed engine's lock may be released a moment after its socket closes
        if all(remove_abandoned(folder) for folder in staging):
            break
        time.sleep(CLEAN_UP_PAUSE_S)
    os._exit(status)


# One load


def load(
    request: LoadRequest,
    setup: Setup,
    staging: Sequence[Path],
    matched: Matched | None = None,
    reserve: Reserve | None = None,
    *,
    on_files: Callable[[int], None] = lambda nbytes: None,
) -> LoadResponse:
    """Execute ``request``; returns an image in a staging folder, or the error. ``matched``: of earlier loads;
    ``reserve``: for the image.

    ``on_files`` is called with the size of the adapter's files before they are read. Only ``MemoryError`` is raised.
    """
    started = time.monotonic()
    try:
        response = _load_unchanged(request, setup, staging, matched, reserve, on_files)
    except TruffulaError as error:
        info = error.info()
        if len(info.message) > MAX_MESSAGE_CHARS:  # it quotes the adapter's files, which may hold texts of any length
            info = msgspec.structs.replace(info, message=f"{info.message[:MAX_MESSAGE_CHARS]}...")
        return LoadResponse(ticket=request.ticket, error=info)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        failed = AdapterLoadError(f"The adapter cannot be written to shared memory or the temporary folder: {reason}.")
        return LoadResponse(ticket=request.ticket, error=failed.info())
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  of a library, or a bug here: only this load fails
        traceback.print_exception(error, file=sys.stderr)
        failed = AdapterLoadError(
            f"Loading adapter {request.ref.name!r} failed unexpectedly ({type(error).__name__}); the log has the "
            "traceback.",
            unexpected=True,
        )
        return LoadResponse(ticket=request.ticket, error=failed.info())
    return msgspec.structs.replace(response, seconds=time.monotonic() - started)


def _load_unchanged(
    request: LoadRequest,
    setup: Setup,
    staging: Sequence[Path],
    matched: Matched | None,
    reserve: Reserve | None,
    on_files: Callable[[int], None],
) -> LoadResponse:
    """The image of files that did not change while they were read: a load that meets a replaced file starts again."""
    for attempt in range(1, CHANGED_FILES_TRIES + 1):
        try:
            with _adapter_files(request, setup, staging, on_files) as found:
                if found.folder is None:
                    return LoadResponse(ticket=request.ticket, commit=found.commit, warnings=found.warnings)
                made = _prepare(found.folder, request, setup, staging, matched, reserve, on_files)
                warnings = (*found.warnings, *made.warnings)
                return msgspec.structs.replace(made, commit=found.commit, warnings=warnings)
        except _FilesChanged:
            if attempt == CHANGED_FILES_TRIES:
                raise
    raise AssertionError("unreachable")


def _prepare(
    folder: Path,
    request: LoadRequest,
    setup: Setup,
    staging: Sequence[Path],
    matched: Matched | None,
    reserve: Reserve | None,
    on_files: Callable[[int], None],
) -> LoadResponse:
    """Validate the adapter in ``folder`` and write its image."""
    with (
        contextlib.closing(open_folder(folder, _root(request.ref))) as opened,
        _base(setup, matched) as base,
    ):
        before = fingerprint(opened.stat, opened.names)
        on_files(_files_nbytes(opened))
        try:
            adapter = _validate(opened, request.ref, setup, base)
        except AdapterError as error:
            if fingerprint(opened.stat, opened.names) != before:  # two versions of the files may not fit each other
                raise _FilesChanged from error
            raise
        try:
            image = ImageWriter(
                adapter.generation, adapter.rank, adapter.sites, setup.layout, adapter.facts, adapter.prefix
            )
        except KernelError as error:  # a kind that this base has no kernel for, such as a changed weight of latents
            text = f"The adapter cannot be served on this base: {error.message} {MERGE[0].upper()}{MERGE[1:]}."
            raise AdapterError(text, param=error.param) from error
        check_size(image.header.nbytes, setup.limits.image_bytes)
        path = _new_file(request, staging, image.header.nbytes)
        image.write(path, reserve)
        if fingerprint(opened.stat, opened.names) != before:
            # The image was copied from the mapped file, which may have been written to after it was checked.
            path.unlink()
            raise _FilesChanged
    return LoadResponse(ticket=request.ticket, image_path=str(path), image=image.header, warnings=adapter.warnings)


@contextlib.contextmanager
def _base(setup: Setup, matched: Matched | None = None) -> Iterator[BaseFacts]:
    """The base, whose weights can be read while the block runs."""
    if setup.base is None:
        yield BaseFacts(setup.model, matched=matched)
        return
    with contextlib.closing(BaseWeights(setup.base)) as weights:
        yield BaseFacts(setup.model, weights, matched)


def _validate(folder: OpenFolder, ref: AdapterRef, setup: Setup, base: BaseFacts) -> PeftAdapter:
    return validate_adapter(
        folder,
        setup.sites,
        base=base,
        max_bytes=setup.limits.image_bytes,
        max_file_bytes=setup.limits.file_bytes,
        untrained=ref.untrained,
        own_texts=ref.kind == "local",
    )


def _root(ref: AdapterRef) -> Path | None:
    """The folder that no link may lead out of."""
    return Path(ref.root) if ref.root and ref.kind == "local" else None


class _FilesChanged(AdapterLoadError):
    def __init__(self) -> None:
        text = f"The adapter's files changed while they were read, {CHANGED_FILES_TRIES} times; send the request again."
        super().__init__(text, param="adapter")


def out_of_memory(request: LoadRequest, setup: Setup) -> LoadResponse:
    """The response to a load that ended with ``MemoryError``."""
    limit = setup.limits.memory_bytes
    what = (
        f"Loading the adapter takes more than the {limit} bytes of memory that a loading worker may use beside the "
        "adapter's files (--adapter-worker-memory)."
    )
    return LoadResponse(ticket=request.ticket, error=AdapterLoadError(what, limit_bytes=limit).info())


@contextlib.contextmanager
def _adapter_files(
    request: LoadRequest, setup: Setup, staging: Sequence[Path], on_files: Callable[[int], None]
) -> Iterator[Fetched]:
    """The adapter's folder, on this machine or fetched."""
    ref = request.ref
    if ref.kind == "merged":
        with _merged(request, setup, staging, on_files) as found:
            yield found
    elif ref.kind == "local":
        yield Fetched(Path(ref.locator), "")
    elif ref.kind == "hub" and ref.credential is None:
        yield _from_hub(request, setup)
    else:
        folder = Path(setup.adapter_cache) if setup.adapter_cache else staging[-1] / "fetched"
        cache = DiskCache(folder, setup.adapter_cache_bytes)
        most = setup.limits.file_bytes
        with fetch(ref, request.has, cache, offline=setup.offline, max_file_bytes=most) as found:
            yield found


@contextlib.contextmanager
def _merged(
    request: LoadRequest, setup: Setup, staging: Sequence[Path], on_files: Callable[[int], None]
) -> Iterator[Fetched]:
    """The merged adapter of the parts of ``request``, in a folder that is removed afterwards."""
    with contextlib.ExitStack() as made:
        folder, warnings = _merge(request, setup, staging, on_files, made)
        yield Fetched(folder, "", warnings)


def _merge(
    request: LoadRequest,
    setup: Setup,
    staging: Sequence[Path],
    on_files: Callable[[int], None],
    made: contextlib.ExitStack,
) -> tuple[Path, tuple[str, ...]]:
    """Write the merged adapter into a new folder, which ``made`` removes. Each part must be an adapter that is served
    by itself.
    """
    parts: list[MergePart] = []
    opened: list[tuple[OpenFolder, str]] = []
    nbytes = 0
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(_base(setup))
        for part in request.ref.parts:
            wanted = msgspec.structs.replace(request, ref=part.ref, has="")
            found = stack.enter_context(_adapter_files(wanted, setup, staging, on_files))
            assert found.folder is not None
            folder = stack.enter_context(contextlib.closing(open_folder(found.folder, _root(part.ref))))
            opened.append((folder, fingerprint(folder.stat, folder.names)))
            nbytes += _files_nbytes(folder)
            on_files(nbytes)
            try:
                _validate(folder, part.ref, setup, base)
                files = stack.enter_context(open_adapter(folder, setup.limits.file_bytes))
            except AdapterError as error:
                raise AdapterError(f"{part.ref.name}: {error.message}", param=error.param) from error
            parts.append(MergePart(part.ref.name, files, part.weight))
        merged = merge_adapters(parts, request.ref.merge)
        check_size(merged.nbytes, setup.limits.image_bytes)
        path = _new_file(request, staging, 2 * merged.nbytes)  # the image comes beside it
        path.mkdir()
        made.callback(shutil.rmtree, path)
        merged.write(path)
        if any(fingerprint(folder.stat, folder.names) != before for folder, before in opened):
            raise _FilesChanged
    return path, tuple(merged.warnings)


def _from_hub(request: LoadRequest, setup: Setup) -> Fetched:
    """The snapshot of a repository in the Hub library's cache, which names it by its commit."""
    ref, most = request.ref, setup.limits.file_bytes
    folder = download(ref.locator, ref.revision, cache_dir=setup.cache_dir, offline=setup.offline, max_file_bytes=most)
    unchanged = folder.name == request.has
    return Fetched(None if unchanged else folder, folder.name)


def _files_nbytes(folder: OpenFolder) -> int:
    """Size of the adapter's files; 0 for one that cannot be opened, which is refused later."""
    total = 0
    for name in (CONFIG, *tensor_files(folder.names())):
        with contextlib.suppress(OSError):
            total += folder.stat(name).st_size
    return total


def _new_file(request: LoadRequest, staging: Sequence[Path], nbytes: int) -> Path:
    """A new name in the first staging folder that has room; memory comes before disk."""
    for folder in staging:
        found = os.statvfs(folder)
        if found.f_bavail * found.f_frsize >= nbytes + _SPARE_BYTES:
            return folder / f"{request.ticket}-{uuid.uuid4().hex}"
    raise AdapterLoadError(
        f"There is not enough space for the adapter: it needs {nbytes} bytes in shared memory or the temporary folder.",
        requested_bytes=nbytes,
    )


def _usual_bytes(sites: Sequence[Site]) -> int:
    """Of an image of rank 16 in two bytes on all linear layers."""
    return 2 * 16 * sum(site.in_features + site.out_features for site in sites if site.kind == "linear")


# Limits


def _data_bytes() -> int:
    """Private writable memory of this process (VmData)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))


def _limit_memory(data_bytes: int) -> None:
    """From here on, allocations that take this process's data above ``data_bytes`` raise ``MemoryError``."""
    _limit(resource.RLIMIT_DATA, data_bytes)


def _limit_cpu(limits: LoadLimits) -> None:
    """Allow ``cpu_s`` seconds of computing for the next load; past them the system ends the process by SIGXCPU."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + limits.cpu_s))


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]]))
