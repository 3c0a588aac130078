"""Downloads models from the Hugging Face Hub, and explains errors of the Hub's library."""

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
from truffula.weights.part_names import PartName
from truffula.weights.text_files import TOKENIZER_FILES

logger = logging.getLogger(__name__)

# What a model folder needs and nothing else: not the vendor's own copy of the weights, not other precisions.
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
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
_NOT_CACHED = "it is not complete in the local cache, and offline mode forbids downloads"
_RETRIES = re.compile(r"Retrying in|Trying to resume|thrown while requesting|Rate limited|Max retries")


def is_hub_name(source: str) -> bool:
    """Whether ``source`` may name a repository (``org/name``, ``name``) or a GGUF file in one (``org/name/x.gguf``)."""
    if _FILE.fullmatch(source):
        return True
    return _REPOSITORY.fullmatch(source) is not None and not source.endswith(".gguf")


@dataclass(frozen=True)
class HubFailure:
    """Why the Hub's library failed.

    ``kind``: ``repository``, ``revision`` and ``file`` were not found; ``access`` was denied; ``offline``: it is not in
    the cache; ``network``; ``storage`` on this machine; ``answer``: it is not what a Hub answers; ``unexpected``: an
    error of the library that nothing here knows, whose traceback belongs into the log. ``text`` continues a sentence,
    and holds nothing of a request.
    """

    kind: str
    text: str


def explain(error: BaseException, *, offline: bool, hub: str = "the Hub") -> HubFailure:
    """What an error of the Hub's library means. Its classes changed with its HTTP client (requests, httpx, httpx2), so
    its own base class is asked for, then the causes that it wraps.

    Args:
        error: As it was caught.
        offline: Whether the network was forbidden.
        hub: How the text names the Hub.
    """
    chain = list(_chain(error))
    if known := _of_library(chain):
        return known
    if offline:
        return HubFailure("offline", _NOT_CACHED)
    unexpected = HubFailure("unexpected", f"huggingface_hub failed ({type(error).__name__})")
    return _of_status(chain, hub) or _of_network(chain, hub) or _of_answer(chain, hub) or unexpected


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what it was raised from, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_library(chain: list[BaseException]) -> HubFailure | None:
    names = {cls.__name__ for error in chain for cls in type(error).__mro__}
    if "GatedRepoError" in names:
        return HubFailure(
            "access", "its author requires an agreement: accept it on the model's page and log in with `hf auth login`"
        )
    if "RepositoryNotFoundError" in names:
        return HubFailure(
            "repository", "there is no such repository, or it is private (log in with `hf auth login` to read it)"
        )
    if "RevisionNotFoundError" in names:
        return HubFailure("revision", "the repository has no such revision")
    if "EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names:
        return HubFailure("file", "the repository has no such file")
    if "HFValidationError" in names:
        return HubFailure("repository", "the Hub does not allow this name")
    return None


def _of_status(chain: list[BaseException], hub: str) -> HubFailure | None:
    found = (getattr(getattr(error, "response", None), "status_code", None) for error in chain)
    status = next((status for status in found if isinstance(status, int)), None)
    if status is None or status < 400:
        return None
    if status in (401, 403):
        return HubFailure(
            "access", f"{hub} denies access (HTTP {status}): log in with `hf auth login`, or set HF_TOKEN"
        )
    if status == 404:
        return HubFailure("repository", f"{hub} has no repository or file of this name (HTTP 404)")
    if status == 429:
        return HubFailure(
            "network", f"{hub} limits requests (HTTP 429): wait a few minutes, or log in with `hf auth login`"
        )
    return HubFailure("network", f"{hub} answers HTTP {status}: try again later")


def _of_network(chain: list[BaseException], hub: str) -> HubFailure | None:
    http = _http_error()
    for error in reversed(chain):  # the innermost has the system's message
        name = type(error).__name__
        if isinstance(error, TimeoutError) or (isinstance(error, http) and "Timeout" in name):
            return HubFailure("network", f"{hub} does not respond in time")
        if _is_unreachable(error):
            why = error.strerror if isinstance(error, OSError) else None
            return HubFailure("network", f"{hub} cannot be reached ({why or name}); check the network")
    for error in chain:
        if isinstance(error, ConnectionError | http) or "Consistency check" in str(error):
            return HubFailure("network", f"the connection to {hub} was lost; try again, the download continues")
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            return HubFailure("storage", f"it cannot be stored: {error.strerror}")
    return None


def _is_unreachable(error: BaseException) -> bool:
    """Whether no connection came about: no such host, no route, refused, or not trusted."""
    if isinstance(error, ConnectionRefusedError | socket.gaierror | ssl.SSLError):
        return True
    if isinstance(error, OSError) and error.errno in _NO_ROUTE:
        return True
    return type(error).__name__ in ("ConnectError", "ProxyError")


def _of_answer(chain: list[BaseException], hub: str) -> HubFailure | None:
    for error in chain:
        if isinstance(error, json.JSONDecodeError) or type(error).__name__ in ("JSONDecodeError", "FileMetadataError"):
            return HubFailure("answer", f"{hub} does not respond like a Hub (is HF_ENDPOINT or a proxy set?)")
    if type(chain[0]).__name__ == "LocalEntryNotFoundError":
        return HubFailure("network", f"{hub} cannot be reached; check the network")
    return None


def _http_error() -> type[BaseException]:
    """The base of all that the library's HTTP client raises: of an HTTP error's classes, the client's most general."""
    from huggingface_hub.errors import HfHubHTTPError

    own = [cls for cls in HfHubHTTPError.__mro__ if cls.__module__.split(".")[0] not in ("huggingface_hub", "builtins")]
    found: type[BaseException] = own[-1] if own else OSError
    return found


def download_model(
    source: str, *, cache_dir: Path | None, offline: bool, revision: str | None, progress: Progress | None
) -> Path:
    """The folder or ``.gguf`` file of a repository of the Hub, downloaded or from the library's cache.

    Raises ``ModelNotFound`` whatever went wrong; its message is a clause that continues "from the Hub: ".
    """
    import huggingface_hub
    from huggingface_hub import constants

    common: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "local_files_only": offline}
    if progress is not None:
        common["tqdm_class"] = byte_progress(progress)
    single = _FILE.fullmatch(source)
    files = _gguf_files(single["file"]) if single else []
    repo, wanted = (single["repo"], [glob.escape(file) for file in files]) if single else (source, list(HUB_FILES))
    # For one file too: ``hf_hub_download`` tries for half a minute to reach a Hub that cannot be reached.
    snapshot = huggingface_hub.snapshot_download  # imports: then its log handler is there
    try:
        with _retries_in_one_line(progress):
            folder = Path(snapshot(repo, allow_patterns=wanted, **common))
    except (TruffulaError, MemoryError):
        raise
    except Exception as error:
        failure = explain(error, offline=offline, hub=constants.ENDPOINT)
        if failure.kind == "unexpected":
            logger.warning("downloading %s from the Hub failed", source, exc_info=error)
        raise ModelNotFound(failure.text, param="model", reason=failure.kind) from error
    if single:
        return next(iter([_file_in(folder, file, offline) for file in files]))
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


def _file_in(folder: Path, name: str, offline: bool) -> Path:
    if (folder / name).is_file():
        return folder / name
    reason = HubFailure("offline", _NOT_CACHED) if offline else HubFailure("file", f"the repository has no file {name}")
    raise ModelNotFound(reason.text, param="model", reason=reason.kind)


@contextlib.contextmanager
def _retries_in_one_line(progress: Progress | None) -> Iterator[None]:
    """Report retries as progress, once, in place of the library's log line for each attempt."""
    told = False

    def keep(record: logging.LogRecord) -> bool:
        nonlocal told
        if not record.name.startswith("huggingface_hub") or not _RETRIES.search(record.getMessage()):
            return True
        if not told and progress is not None:
            progress("the Hub does not respond: retrying", 0, None)
        told = True
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
    """A class that the Hub library takes for its progress bars: draws nothing, and hands bytes to ``progress``."""
    # Not the Hub library's own subclass: that one is silent when its bars were disabled anywhere in this process.
    from tqdm.auto import tqdm

    class ByteProgress(tqdm):  # type: ignore[misc]  # the library has no types here
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            name = kwargs.pop("name", "")
            # The library has three bars: bytes transferred, bytes written and files. The second is reported.
            self._tells = kwargs.get("unit") == "B" and not str(name).endswith(".transfer")
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if self._tells:
                progress("download", int(self.n), int(self.total) if self.total else None)
            return drawn

    return ByteProgress
