"""An adapter's folder: its two files, opened with limits and hashed."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from truffula.errors import AdapterError, AdapterLoadError, AdapterNotFound, CheckpointError
from truffula.lora.fields import MAX_CONFIG_BYTES
from truffula.lora.foreign import describe_folder
from truffula.lora.place import CONFIG, TENSORS
from truffula.weights.safetensors import SafetensorsFile

_CHUNK = 1 << 20


class AdapterFolder:
    """Both files of one adapter, found and opened: ``config_bytes`` raw, ``tensors`` with its header checked.

    Raises ``AdapterNotFound`` when there is no such folder, ``AdapterError`` when it is no adapter (saying what it
    seems to be), ``AdapterLoadError`` when it can't be read. Messages name files, never this machine's paths.
    """

    def __init__(self, folder: Path, max_file_bytes: int | None = None) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise AdapterNotFound("The adapter's folder does not exist.", param="adapter")
        if (lacking := self._describe()) is not None:
            raise AdapterError(lacking[0], param=lacking[1])
        for name in (CONFIG, TENSORS):
            found = (folder / name).stat()
            if not stat.S_ISREG(found.st_mode):  # a pipe or a device would block, or never end
                raise AdapterError(f"{name} is not a regular file.", param=name)
            if max_file_bytes is not None and found.st_size > max_file_bytes:
                raise AdapterError(
                    f"{name} has {found.st_size} bytes; the limit is {max_file_bytes} (--max-adapter-file).", param=name
                )
        self.config_bytes = self._read_config()
        try:
            self.tensors = SafetensorsFile(folder / TENSORS)
        except CheckpointError as error:
            raise AdapterError(self.without_path(error.message), param=self.without_path(error.param or "")) from error

    def without_path(self, text: str) -> str:
        """``text`` with the folder's path cut out: it may reach a client."""
        return text.replace(f"{self.folder}/", "").replace(str(self.folder), "its folder")

    def generation(self) -> str:
        """sha256 over both files' bytes: the identity of what is served. One pass over the file."""
        digest = hashlib.sha256(len(self.config_bytes).to_bytes(8, "little") + self.config_bytes)
        try:
            with (self.folder / TENSORS).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise AdapterLoadError(f"{TENSORS} cannot be read: {error.strerror or error}.") from error
        return digest.hexdigest()

    def close(self) -> None:
        self.tensors.close()

    def _describe(self) -> tuple[str, str] | None:
        try:
            return describe_folder(self.folder)
        except OSError as error:
            raise AdapterLoadError(f"The adapter's folder cannot be read: {error.strerror or error}.") from error

    def _read_config(self) -> bytes:
        try:
            with (self.folder / CONFIG).open("rb") as file:
                return file.read(MAX_CONFIG_BYTES + 1)
        except OSError as error:
            raise AdapterLoadError(f"{CONFIG} cannot be read: {error.strerror or error}.", param=CONFIG) from error
