"""``AdapterFolder``: opens an adapter's two files, with limits, and hashes them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

from truffula.errors import AdapterError, AdapterLoadError, AdapterNotFound, CheckpointError
from truffula.lora.fields import MAX_CONFIG_BYTES
from truffula.lora.foreign import describe_names, subfolders_with_adapters
from truffula.lora.paths import CONFIG, TENSORS, OpenFolder
from truffula.weights.safetensors import SafetensorsFile

_CHUNK = 1 << 20


class AdapterFolder:
    """Both files of one adapter, found and opened: ``config_bytes`` raw, ``tensors`` with its header checked.

    Takes a path, which it opens and closes, or a folder that the caller has opened. Raises ``AdapterNotFound`` when the
    folder does not exist, ``AdapterError`` when it is not an adapter (the message says what it seems to be) or a link
    leads out of the folder's root, ``AdapterLoadError`` when it can't be read. Messages name files, never this
    machine's paths.
    """

    def __init__(self, folder: Path | OpenFolder, max_file_bytes: int | None = None) -> None:
        self._own = None
        if isinstance(folder, Path):
            folder = self._own = open_folder(folder)
        self.opened, self.folder = folder, folder.path
        try:
            if (lacking := self._describe()) is not None:
                raise AdapterError(lacking[0], param=lacking[1])
            config = self._open(CONFIG, max_file_bytes)
            with os.fdopen(config, "rb") as file:
                self.config_bytes = file.read(MAX_CONFIG_BYTES + 1)
            self.tensors = SafetensorsFile(self.folder / TENSORS, self._open(TENSORS, max_file_bytes))
        except CheckpointError as error:
            self._close_folder()
            raise AdapterError(self.without_path(error.message), param=self.without_path(error.param or "")) from error
        except OSError as error:
            self._close_folder()
            raise AdapterLoadError(f"{CONFIG} cannot be read: {error.strerror or error}.", param=CONFIG) from error
        except BaseException:
            self._close_folder()
            raise

    def without_path(self, text: str) -> str:
        """``text`` without the folder's path, for clients."""
        return text.replace(f"{self.folder}/", "").replace(str(self.folder), "its folder")

    def generation(self) -> str:
        """sha256 over both files' bytes: the identity of what is served. One pass over the file."""
        digest = hashlib.sha256(len(self.config_bytes).to_bytes(8, "little") + self.config_bytes)
        fd = self.tensors.file.duplicate()
        try:
            at = 0
            while chunk := os.pread(fd, _CHUNK, at):
                digest.update(chunk)
                at += len(chunk)
        except OSError as error:
            raise AdapterLoadError(f"{TENSORS} cannot be read: {error.strerror or error}.") from error
        finally:
            os.close(fd)
        return digest.hexdigest()

    def close(self) -> None:
        self.tensors.close()
        self._close_folder()

    def _close_folder(self) -> None:
        if self._own is not None:
            self._own.close()

    def _describe(self) -> tuple[str, str] | None:
        """Why the folder is not an adapter, and the name of the missing file; None when both files are in it."""
        try:
            names = self.opened.names()
            # Below a root the path is not safe: the folder may have been replaced by a link.
            inside = subfolders_with_adapters(self.folder) if self.opened.root is None else ()
            return describe_names(names, inside)
        except OSError as error:
            raise AdapterLoadError(f"The adapter's folder cannot be read: {error.strerror or error}.") from error

    def _open(self, name: str, max_bytes: int | None) -> int:
        try:
            fd = self.opened.open(name)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise outside_link_error(name) from error
            raise AdapterLoadError(f"{name} cannot be read: {error.strerror or error}.", param=name) from error
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and (max_bytes is None or found.st_size <= max_bytes):
            return fd
        os.close(fd)
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device would block, or never end
            raise AdapterError(f"{name} is not a regular file.", param=name)
        raise AdapterError(
            f"{name} has {found.st_size} bytes; the limit is {max_bytes} (--max-adapter-file).", param=name
        )


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
        if error.errno == errno.EXDEV:
            raise outside_link_error("The adapter's folder") from error
        raise AdapterLoadError(f"The adapter's folder cannot be read: {error.strerror or error}.") from error


def outside_link_error(name: str) -> AdapterError:
    """The error of a link that is not followed."""
    return AdapterError(
        f"{name} is a link that leads out of the folder that adapters may be in; it is not followed. Copy the files "
        "into that folder.",
        param=name if name in (CONFIG, TENSORS) else "adapter",
    )
