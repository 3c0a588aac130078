"""``open_adapter``: opens an adapter's two files, with limits, and hashes them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from truffula.errors import AdapterError, AdapterLoadError, AdapterNotFound, CheckpointError
from truffula.lora.fields import MAX_CONFIG_BYTES
from truffula.lora.foreign import describe_folder, describe_names
from truffula.lora.paths import CONFIG, TENSORS, OpenFolder
from truffula.lora.shards import INDEX, MAX_INDEX_BYTES, check_total, tensor_files, weight_map
from truffula.weights.checkpoint import Array, TensorInfo
from truffula.weights.safetensors import SafetensorsFile

_HASH_CHUNK = 16 << 20
"""Bytes that are hashed without the interpreter's lock. Each chunk waits for it, up to milliseconds."""


class AdapterTensors:
    """``tensors`` by name, of one file or of all shards, and the ``header`` of all as stored. Read as
    ``SafetensorsFile`` reads them.

    Raises ``CheckpointError`` for a damaged file, ``AdapterError`` for shards that hold a tensor twice, or that
    ``index`` (None: there is none) does not describe.
    """

    def __init__(self, files: Iterable[SafetensorsFile], index: bytes | None) -> None:
        self._files = list(files)
        self.header = b"".join(file.header for file in self._files)
        self._of: dict[str, SafetensorsFile] = {}
        for file in self._files:
            if twice := self._of.keys() & file.tensors.keys():
                name, other = min(twice), self._of[min(twice)].path.name
                raise AdapterError(f"{name} is in {other} and in {file.path.name}; save the adapter again.", param=name)
            self._of |= dict.fromkeys(file.tensors, file)
        self.tensors: Mapping[str, TensorInfo] = {name: info for f in self._files for name, info in f.tensors.items()}
        if index is not None and len(self._files) > 1:
            self._check_index(weight_map(index))

    def _check_index(self, listed: Mapping[str, str]) -> None:
        held = {name: file.path.name for name, file in self._of.items()}
        if wrong := sorted(name for name in {*held, *listed} if held.get(name) != listed.get(name)):
            name = wrong[0]
            raise AdapterError(
                f"{INDEX} says that {name} is in {listed.get(name, 'no file')}, and it is in "
                f"{held.get(name, 'none of the shards')}: a file is of another save. Save the adapter again.",
                param=INDEX,
            )  # fmt: skip

    def read(self, name: str) -> Array:
        return self._of[name].read(name)

    def runs(self, infos: Iterable[TensorInfo]) -> Iterator[Array]:
        """See ``SafetensorsFile.runs``."""
        by_file: dict[int, list[TensorInfo]] = {}
        for info in infos:
            by_file.setdefault(self._files.index(self._of[info.name]), []).append(info)
        return chain.from_iterable(self._files[number].runs(some) for number, some in by_file.items())

    def data(self) -> list[memoryview]:
        """The bytes of each file."""
        return [file.file.data() for file in self._files]

    def close(self) -> None:
        for file in self._files:
            file.close()


@dataclass(frozen=True)
class AdapterFiles:
    """The files of one adapter, open: ``config_bytes`` as stored, ``tensors`` with their headers checked."""

    folder: OpenFolder
    config_bytes: bytes
    tensors: AdapterTensors

    def generation(self) -> str:
        """sha256 over the files' bytes: the identity of what is served. One pass over them."""
        return self._hash(self.tensors.data(), threading.Event())

    @contextmanager
    def hashing(self) -> Iterator[Future[str]]:
        """``generation``, computed in a thread while the block runs, and not to its end when the block ends before."""
        data, stop = self.tensors.data(), threading.Event()
        with ThreadPoolExecutor(1, "hash") as thread:
            try:
                generation = thread.submit(self._hash, data, stop)
            except RuntimeError as error:  # no thread can be started: its stack is above this process's limit
                raise MemoryError(str(error)) from error
            try:
                yield generation
            finally:
                stop.set()

    def _hash(self, files: Sequence[memoryview], stop: threading.Event) -> str:
        digest = hashlib.sha256(len(self.config_bytes).to_bytes(8, "little") + self.config_bytes)
        for data in files:
            if len(files) > 1:
                digest.update(len(data).to_bytes(8, "little"))
            for start in range(0, len(data), _HASH_CHUNK):
                if stop.is_set():
                    break
                digest.update(data[start : start + _HASH_CHUNK])
        return digest.hexdigest()


@contextmanager
def open_adapter(folder: Path | OpenFolder, max_file_bytes: int | None = None) -> Iterator[AdapterFiles]:
    """The files of the adapter in ``folder``: a path, or a folder that the caller has opened.

    Raises ``AdapterNotFound`` when the folder does not exist, ``AdapterError`` when it is not an adapter (the message
    says what it seems to be), a link leads out of its root, or the file of tensors is damaged, also where the block
    notices that; ``AdapterLoadError`` when it can't be read. Messages name files, never this machine's paths.
    """
    with ExitStack() as stack:
        if isinstance(folder, Path):
            folder = stack.enter_context(closing(open_folder(folder)))
        try:
            if (lacking := _describe(folder)) is not None:
                raise AdapterError(lacking[0], param=lacking[1])
            with os.fdopen(_open(folder, CONFIG, max_file_bytes), "rb") as file:
                config = file.read(MAX_CONFIG_BYTES + 1)
            names = tensor_files(folder.names())
            opened = [SafetensorsFile(folder.path / one, _open(folder, one, max_file_bytes)) for one in names]
            if max_file_bytes is not None:
                check_total((len(file.file.data()) for file in opened), max_file_bytes)
            index = None if names == [TENSORS] else _read_index(folder)
            yield AdapterFiles(folder, config, stack.enter_context(closing(AdapterTensors(opened, index))))
        except CheckpointError as error:
            raise AdapterError(_without_path(error.message, folder.path), param=TENSORS) from error
        except OSError as error:
            raise _unreadable("The adapter", "adapter", error) from error


def open_folder(path: Path, root: Path | None = None) -> OpenFolder:
    """The folder held open.

    Raises ``AdapterNotFound`` when it does not exist, ``AdapterError`` when a link leads out of ``root``,
    ``AdapterLoadError`` when it cannot be opened.
    """
    try:
        return OpenFolder(path, root)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterNotFound("The adapter's folder does not exist.", param="adapter") from error
    except OSError as error:
        raise _unreadable("The adapter's folder", "adapter", error) from error


def _describe(folder: OpenFolder) -> tuple[str, str] | None:
    """Why the folder is not an adapter, and the name of the missing file; None when both files are in it."""
    # Below a root the path is not safe: the folder may have been replaced by a link.
    return describe_folder(folder.path) if folder.root is None else describe_names(folder.names())


def _read_index(folder: OpenFolder) -> bytes | None:
    if INDEX not in folder.names():
        return None
    with os.fdopen(_open(folder, INDEX, MAX_INDEX_BYTES), "rb") as file:
        return file.read()


def _open(folder: OpenFolder, name: str, max_bytes: int | None) -> int:
    try:
        fd = folder.open(name)
    except OSError as error:
        raise _unreadable(name, name, error) from error
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and (max_bytes is None or found.st_size <= max_bytes):
        return fd
    os.close(fd)
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device would block, or never end
        raise AdapterError(f"{name} is not a regular file.", param=name)
    raise AdapterError(f"{name} has {found.st_size} bytes; the limit is {max_bytes} (--max-adapter-file).", param=name)


def _unreadable(name: str, param: str, error: OSError) -> AdapterError | AdapterLoadError:
    if error.errno == errno.EXDEV:
        return AdapterError(
            f"{name} is a link that leads out of the folder that adapters may be in; it is not followed. Copy the "
            "files into that folder.",
            param=param,
        )
    return AdapterLoadError(f"{name} cannot be read: {error.strerror or error}.", param=param)


def _without_path(text: str, folder: Path) -> str:
    return text.replace(f"{folder}/", "").replace(str(folder), "its folder")
