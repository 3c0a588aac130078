"""Downloads models from the Hugging Face Hub, and explains the errors of ``huggingface_hub``."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import logging
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truffula.errors import ModelNotFound, TruffulaError
from truffula.types import Progress
from truffula.weights.gguf.header import PartName
from truffula.weights.text_files import TOKENIZER_FILES

logger = logging.getLogger(__name__)

# The files of a model folder, without other copies of the weights in the vendor's format or other precisions.
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    *TOKENIZER_FILES,
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_FILE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)/(?P<file>.+\.gguf)")
_NOT_CONNECTED = (ConnectionRefusedError, socket.gaierror, ssl.SSLError)
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
_NOT_CACHED = "it is not complete in the local cache, and offline mode forbids downloads"
_RETRIES = re.compile(r"Retrying in|Trying to resume|thrown while requesting|Rate limited|Max retries")


def is_hub_name(source: str) -> bool:
    """Whether ``source`` may name a repository (``org/name``, ``name``) or a GGUF file in one (``org/name/x.gguf``)."""
    if _FILE.fullmatch(source):
        return True
    return _REPOSITORY.fullmatch(source) is not None and not source.endswith(".gguf")


@dataclass(frozen=True)
class HubError:
    """Why a call of ``huggingface_hub`` failed.

    ``kind``: ``repository``, ``revision`` or ``file`` was not found; ``access`` was denied; ``offline``: not in the
    cache; ``network``; ``storage`` on this machine; ``answer``: the server is not a Hub; ``unexpected``: any other
    error, whose traceback should be logged. ``text`` is a clause that continues a sentence and contains no request
    data.
    """

    kind: str
    text: str


def explain(error: BaseException, *, offline: bool, hub: str = "the Hub") -> HubError:
    """The meaning of an error of ``huggingface_hub``: by its own classes, then by the errors that caused it.

    Args:
        error: The exception.
        offline: Whether offline mode is on.
        hub: The name of the Hub in the text.
    """
    chain = list(_chain(error))
    if known := _of_library(chain):
        return known
    if offline:
        return HubError("offline", _NOT_CACHED)
    unexpected = HubError("unexpected", f"huggingface_hub failed ({type(error).__name__})")
    return _of_status(chain, hub) or _of_network(chain, hub) or unexpected


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and its causes, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_library(chain: list[BaseException]) -> HubError | None:
    from huggingface_hub import errors

    agreement = "its author requires an agreement: accept it on the model's page and log in with `hf auth login`"
    private = "there is no such repository, or it is private (log in with `hf auth login` to read it)"
    known = (
        (errors.GatedRepoError, "access", agreement),
        (errors.RepositoryNotFoundError, "repository", private),
        (errors.RevisionNotFoundError, "revision", "the repository has no such revision"),
        (errors.RemoteEntryNotFoundError, "file", "the repository has no such file"),
        (errors.HFValidationError, "repository", "the Hub does not allow this name"),
    )
    return next((HubError(kind, text) for cls, kind, text in known if any(isinstance(e, cls) for e in chain)), None)


def _of_status(chain: list[BaseException], hub: str) -> HubError | None:
    from huggingface_hub.errors import HfHubHTTPError

    status = next((error.response.status_code for error in chain if isinstance(error, HfHubHTTPError)), 0)
    if status in (401, 403):
        return HubError("access", f"{hub} denies access (HTTP {status}): log in with `hf auth login`, or set HF_TOKEN")
    if status == 404:
        return HubError("repository", f"{hub} has no repository or file of this name (HTTP 404)")
    if status == 429:
        return HubError(
            "network", f"{hub} limits requests (HTTP 429): wait a few minutes, or log in with `hf auth login`"
        )
    return HubError("network", f"{hub} answers HTTP {status}: try again later") if status >= 400 else None


def _of_network(chain: list[BaseException], hub: str) -> HubError | None:
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, LocalEntryNotFoundError

    # The HTTP client (httpx, httpx2) depends on the library's version, so its errors are recognised by name.
    http_error = HfHubHTTPError.__mro__[1]
    for error in reversed(chain):  # the innermost error has the system's message
        name = type(error).__name__
        if isinstance(error, TimeoutError) or (isinstance(error, http_error) and "Timeout" in name):
            return HubError("network", f"{hub} does not respond in time")
        no_route = isinstance(error, OSError) and error.errno in _NO_ROUTE
        if no_route or isinstance(error, _NOT_CONNECTED) or name in ("ConnectError", "ProxyError"):
            why = error.strerror if isinstance(error, OSError) else None
            return HubError("network", f"{hub} cannot be reached ({why or name}); check the network")
    for error in chain:
        if isinstance(error, ConnectionError | http_error) or "Consistency check" in str(error):
            return HubError("network", f"the connection to {hub} was lost; try again, the download continues")
        if isinstance(error, json.JSONDecodeError | FileMetadataError):
            return HubError("answer", f"{hub} does not respond like a Hub (is HF_ENDPOINT or a proxy set?)")
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            return HubError("storage", f"it cannot be stored: {error.strerror}")
    if isinstance(chain[0], LocalEntryNotFoundError):
        return HubError("network", f"{hub} cannot be reached; check the network")
    return None


def download_model(
    source: str, *, cache_dir: Path | None, offline: bool, revision: str | None, progress: Progress | None
) -> Path:
    """The model folder or ``.gguf`` file of a Hub repository, downloaded or from the cache.

    Raises ``ModelNotFound`` for every error; its message is a clause that continues "from the Hub: ".
    """
    import huggingface_hub
    from huggingface_hub import constants

    common: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": offline}
    if progress is not None:
        common["tqdm_class"] = byte_progress(progress)
    single = _FILE.fullmatch(source)
    files = _gguf_files(single["file"]) if single else []
    repo, wanted = (single["repo"], [glob.escape(file) for file in files]) if single else (source, list(HUB_FILES))
    # Also for one file: ``hf_hub_download`` retries for half a minute when the Hub cannot be reached.
    snapshot = huggingface_hub.snapshot_download  # this import installs its log handler
    try:
        with _retries_in_one_line(progress):
            folder = Path(snapshot(repo, allow_patterns=wanted, **common))
    except (TruffulaError, MemoryError):
        raise
    except Exception as error:
        reason = explain(error, offline=offline, hub=constants.ENDPOINT)
        if reason.kind == "unexpected":
            logger.warning("downloading %s from the Hub failed", source, exc_info=error)
        raise ModelNotFound(reason.text, param="model", reason=reason.kind) from error
    lacking = [file for file in files if not (folder / file).is_file()]
    if lacking and offline:
        raise ModelNotFound(_NOT_CACHED, param="model", reason="offline")
    if lacking:
        raise ModelNotFound(f"the repository has no file {lacking[0]}", param="model", reason="file")
    if files:
        return folder / files[0]
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            "the repository has no config.json, so it is not a model folder. For a GGUF repository, name the file: "
            f"{source}/FILE.gguf. To use an adapter, serve its base and give the adapter with --adapter",
            param="model",
        )
    return folder


def _gguf_files(name: str) -> list[str]:
    """The files of the GGUF model whose first or only file is ``name``. Raises ``ModelNotFound`` for a later part."""
    part = PartName.of(name)
    if part is None:
        return [name]
    names = part.names()
    if part.number > 1:
        raise ModelNotFound(
            f"{name} is part {part.number} of {part.total} of a split GGUF model; give the first part, {names[0]}",
            param="model",
        )
    return names


@contextlib.contextmanager
def _retries_in_one_line(progress: Progress | None) -> Iterator[None]:
    """Report retries once as progress, instead of the library's log line for each attempt."""
    reported = False

    def keep(record: logging.LogRecord) -> bool:
        nonlocal reported
        if not record.name.startswith("huggingface_hub") or not _RETRIES.search(record.getMessage()):
            return True
        if not reported and progress is not None:
            progress("the Hub does not respond: retrying", 0, None)
        reported = True
        return False

    handlers = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)


def byte_progress(progress: Progress) -> type:
    """A class for the progress bars of ``huggingface_hub`` that reports bytes to ``progress`` and draws nothing."""
    # Not a subclass of the library's own bar, which is silent when bars are disabled in this process.
    from tqdm.auto import tqdm

    class ByteProgress(tqdm):  # type: ignore[misc]  # the library has no types here
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            name = kwargs.pop("name", "")
            # The library has three bars: bytes transferred, bytes written, files. The second is reported.
            self._reports = kwargs.get("unit") == "B" and not str(name).endswith(".transfer")
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            updated: bool | None = super().update(n)
            if self._reports:
                progress("download", int(self.n), int(self.total) if self.total else None)
            return updated

    return ByteProgress
