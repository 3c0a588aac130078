"""Detects changes of a model's files since they were loaded.

Weights are views of mapped files, so a write to such a file changes answers. Also, another file may be moved to the
model's path. Both are detected by size, modification time and inode.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from truffula.errors import CheckpointChanged
from truffula.types import FileStamp

if TYPE_CHECKING:
    from truffula.weights.checkpoint import Checkpoint  # brings arrays
    from truffula.weights.mapped import MappedFile

SIDE_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""Files that are read once at the start and define the meaning of the weights."""
SAMPLED_PAGES = 512
log = logging.getLogger(__name__)


def stamps_of(checkpoint: Checkpoint) -> list[FileStamp]:
    """One stamp for each file that affects answers, sorted by path.

    Stamps of weights are those of the open files, so moving another file to their path is not a change. Stamps of side
    files are taken by path.
    """
    weights = {str(file.path): file.stamp() for file in checkpoint.files}
    sides = {str(path): stamp(path) for path in stamped_texts(checkpoint.path) if str(path) not in weights}
    return sorted([*weights.values(), *sides.values()], key=lambda item: item.path)


def stamped_texts(path: Path) -> list[Path]:
    """The files of a model at ``path`` that are stamped and hold more than weights: side files, or a ``.gguf`` file."""
    return [file for name in SIDE_FILES if (file := path / name).is_file()] if path.is_dir() else [path]


def stamp_of(path: Path, found: os.stat_result) -> FileStamp:
    """The stamp of ``path`` from its stat result."""
    return FileStamp(path=str(path), size=found.st_size, mtime_ns=found.st_mtime_ns, inode=found.st_ino)


def stamp(path: Path) -> FileStamp:
    """The current stamp of ``path``. Raises ``CheckpointChanged`` when it cannot be read."""
    try:
        return stamp_of(path, path.stat())
    except OSError as error:
        raise CheckpointChanged(f"{path} cannot be examined: {error.strerror or error}.", param=str(path)) from error


def require_same_files(then: Sequence[FileStamp], now: Sequence[FileStamp], *, restarting: bool = False) -> None:
    """Raise ``CheckpointChanged`` naming a file that changed while it was loaded or, ``restarting``, since the server
    was started with it.
    """
    before, after = {item.path: item for item in then}, {item.path: item for item in now}
    for path in {**before, **after}:
        if path in before and path in after and is_same_file(before[path], after[path]):
            continue
        if restarting:
            raise CheckpointChanged(
                f"The engine ended and is not restarted: {path} is not the file that it had loaded (it was replaced, "
                "removed or written to since), so answers would come from another model. Restart the server to serve "
                "the file that is there now.",
                param=path,
            )
        raise CheckpointChanged(
            f"{path} changed while the model was loaded, so what was loaded may be a mixture. Start again when the "
            "files are complete.",
            param=path,
        )


def require_loaded(path: Path, loaded: Sequence[FileStamp], read: Sequence[FileStamp]) -> None:
    """Raise ``CheckpointChanged`` unless the text files of the model at ``path``, stamped in ``read``, are those
    that the engine has ``loaded``.
    """
    names = {str(file) for file in stamped_texts(path)} | {item.path for item in read}
    if {replace(item, sample="") for item in loaded if item.path in names} != set(read):
        raise CheckpointChanged(
            f"{path} was replaced while the model was loaded: the tokenizer there now may belong to another model than "
            "the weights that were loaded. Start again.",
            param=str(path),
        )


def with_samples(files: Sequence[FileStamp]) -> list[FileStamp]:
    """``files`` with a sample of each content, by which ``is_same_file`` ignores a change of the modification time
    alone.
    """
    return [replace(item, sample=_sample_of_path(item)) for item in files]


def is_same_file(then: FileStamp, now: FileStamp) -> bool:
    """Whether a file is unchanged: by its stamp or, when only the modification time differs, by its sample."""
    if replace(then, sample=now.sample) == now:
        return True
    touched = replace(then, sample=now.sample, mtime_ns=now.mtime_ns) == now
    return touched and bool(then.sample) and then.sample == _sample_of_path(now)


def _sample_of_path(item: FileStamp) -> str:
    try:
        with Path(item.path).open("rb") as file:
            found = stamp_of(Path(item.path), os.fstat(file.fileno()))
            return sample(file.fileno(), item.size) if found == replace(item, sample="") else ""
    except OSError:
        return ""


def sample(descriptor: int, size: int) -> str:
    """A digest of a file's first and last pages and of ``SAMPLED_PAGES`` between, or of all of a small file.

    Overwriting a file by another model changes nearly every page of it.
    """
    page = 4096
    count = min(SAMPLED_PAGES, max(1, size // page))
    places = sorted({index * size // count // page * page for index in range(count)} | {max(0, size - page)})
    digest = hashlib.blake2b(digest_size=16)
    for place in places:
        digest.update(os.pread(descriptor, page, place))
    return digest.hexdigest()


class FileWatch:
    """Holds mapped files open and notices when one of them is written to.

    A file whose time of change is new and whose sampled content is not (``touch``, a backup) is the same. A file that
    is replaced by a rename, or removed, stays as it was for a process that has it open: that is no change here.
    """

    def __init__(self, files: Iterable[MappedFile]) -> None:
        self._held: dict[int, FileStamp] = {}  # by descriptor
        try:
            for file in files:
                descriptor = file.duplicate()
                self._held[descriptor] = file.opened
                self._held[descriptor] = replace(file.opened, sample=sample(descriptor, file.opened.size))
            self.check()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raises ``CheckpointChanged`` when a file is not what it was when it was opened. A few microseconds a file."""
        for descriptor, item in self._held.items():
            now = stamp_of(Path(item.path), os.fstat(descriptor))
            if now.mtime_ns == item.mtime_ns and now.size == item.size:
                continue
            now = replace(now, sample=sample(descriptor, now.size))
            if (now.size, now.sample) == (item.size, item.sample):
                log.warning("%s was touched; its content, as far as it was sampled, is the same", item.path)
                self._held[descriptor] = now
            else:
                raise CheckpointChanged(
                    f"{item.path} was overwritten while it was served, so answers would mix old and new weights. "
                    "Restart the server to serve what is there now. To replace a model's files under a running server, "
                    "rename new files over them; do not write to them in place.",
                    param=item.path,
                )

    def close(self) -> None:
        held, self._held = self._held, {}
        for descriptor in held:
            os.close(descriptor)
