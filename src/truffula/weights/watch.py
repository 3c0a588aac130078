"""What the files of a model looked like when they were loaded, and whether somebody has changed them since.

Weights are views of mapped files: who overwrites such a file in place changes answers while they are given. And what
stands under the model's name later may be another model. Both are noticed by size, time of change and inode.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from truffula.errors import CheckpointChanged
from truffula.types import FileStamp

if TYPE_CHECKING:
    from truffula.weights.checkpoint import Checkpoint  # brings arrays

SIDE_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""Read once at the start, with the weights: they decide what the weights mean."""


def stamps_of(checkpoint: Checkpoint) -> list[FileStamp]:
    """One stamp for each file that decides answers, by path."""
    weights = {info.file for info in checkpoint.tensors.values()}
    return [stamp(path) for path in sorted(weights | set(text_stamped(checkpoint.path)))]


def text_stamped(path: Path) -> list[Path]:
    """Of a model at ``path``, the stamped files that say more than weights: side files, or the one ``.gguf`` file."""
    return [file for name in SIDE_FILES if (file := path / name).is_file()] if path.is_dir() else [path]


def stamp(path: Path) -> FileStamp:
    """``path`` as it is now. Raises ``CheckpointChanged`` when it cannot be seen any more."""
    try:
        return _stamp(path, path.stat())
    except OSError as error:
        raise CheckpointChanged(f"{path} cannot be looked at: {error.strerror or error}.", param=str(path)) from error


def require_same(then: Sequence[FileStamp], now: Sequence[FileStamp]) -> None:
    """Raises ``CheckpointChanged`` naming the first file that is not what it was."""
    found = {item.path: item for item in now}
    for item in then:
        if item != found.pop(item.path, None):
            raise _changed(item.path, "was replaced or changed")
    for path in found:
        raise _changed(path, "is new")


class FileWatch:
    """Holds mapped files open and notices when one of them is written to.

    A file that is replaced by a rename, or removed, stays as it was for who holds it: that is no change here.
    """

    def __init__(self, stamps: Iterable[FileStamp]) -> None:
        self._held: dict[int, FileStamp] = {}  # by descriptor
        try:
            for item in stamps:
                self._held[os.open(item.path, os.O_RDONLY | os.O_CLOEXEC)] = item
            self.check()
        except OSError as error:
            self.close()
            raise CheckpointChanged(f"A file of the model is gone: {error}.") from error
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raises ``CheckpointChanged`` when a file is not what its stamp says. A few microseconds a file."""
        for descriptor, item in self._held.items():
            if _stamp(Path(item.path), os.fstat(descriptor)) != item:
                raise _changed(item.path, "was overwritten")

    def close(self) -> None:
        held, self._held = self._held, {}
        for descriptor in held:
            os.close(descriptor)


def _stamp(path: Path, found: os.stat_result) -> FileStamp:
    return FileStamp(path=str(path), size=found.st_size, mtime_ns=found.st_mtime_ns, inode=found.st_ino)


def _changed(path: str, what: str) -> CheckpointChanged:
    return CheckpointChanged(
        f"{path} {what} since the model was loaded, so answers would come from other weights. Restart the server to "
        "serve what is there now; replace a model's files by renaming new ones over them, never in place.",
        param=path,
    )
