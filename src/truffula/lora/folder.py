"""An adapter's folder: its two files, opened with limits and hashed."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from truffula.errors import AdapterError, AdapterLoadError, AdapterNotFound, CheckpointError
from truffula.lora.fields import MAX_CONFIG_BYTES
from truffula.lora.place import CONFIG, PICKLE, TENSORS
from truffula.weights.safetensors import SafetensorsFile

_CHUNK = 1 << 20
_TO_SAFETENSORS = (
    'python -c "import torch, safetensors.torch as s; '
    f"s.save_file({{k: v.contiguous() for k, v in torch.load('{PICKLE}', weights_only=True).items()}}, '{TENSORS}')\""
)


class AdapterFolder:
    """Both files of one adapter, found and opened: ``config_bytes`` raw, ``tensors`` with its header checked.

    Raises ``AdapterNotFound`` when there is no such folder, ``AdapterError`` when it is no adapter (saying what it
    seems to be), ``AdapterLoadError`` when the system does not let us read. Messages name files, never our paths.
    """

    def __init__(self, folder: Path, max_file_bytes: int | None = None) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise AdapterNotFound("There is no adapter at this place (no such folder).", param="adapter")
        if not (folder / CONFIG).exists():
            raise AdapterError(self._without_config(), param=CONFIG)
        if not (folder / TENSORS).exists():
            raise AdapterError(self._without_tensors(), param=TENSORS)
        for name in (CONFIG, TENSORS):
            found = (folder / name).stat()
            if not stat.S_ISREG(found.st_mode):  # a pipe or a device would block, or never end
                raise AdapterError(f"{name} is not a regular file.", param=name)
            if max_file_bytes is not None and found.st_size > max_file_bytes:
                raise AdapterError(f"{name} has {found.st_size} bytes; at most {max_file_bytes} are read.", param=name)
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

    def _read_config(self) -> bytes:
        try:
            with (self.folder / CONFIG).open("rb") as file:
                return file.read(MAX_CONFIG_BYTES + 1)
        except OSError as error:
            raise AdapterLoadError(f"{CONFIG} cannot be read: {error.strerror or error}.", param=CONFIG) from error

    def _without_config(self) -> str:
        names = {path.name for path in self.folder.iterdir()}
        if "config.json" in names:
            return (
                f"There is no {CONFIG}, but a config.json: this is a full model, not an adapter. Serve it as a model."
            )
        return f"There is no {CONFIG} in the adapter's folder; PEFT's save_pretrained writes it."

    def _without_tensors(self) -> str:
        names = {path.name for path in self.folder.iterdir()}
        if PICKLE in names:
            return (
                f"There is only {PICKLE}, a pickle, which can run code when it is read. Convert it where you trust it: "
                f"load it with PEFT and save_pretrained, or in its folder: {_TO_SAFETENSORS}"
            )
        if any(name.startswith("model") and name.endswith(".safetensors") for name in names):
            return f"There is no {TENSORS}, but a model's weights: this looks like a full (merged) model."
        return f"There is no {TENSORS} in the adapter's folder."
