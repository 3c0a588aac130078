"""An adapter's two files from the Hugging Face Hub, or from its cache. Blocks: runs in the loading worker only.

``download`` uses the operator's login and the library's cache, ``HubStore`` a client's token and neither.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from truffula.errors import AdapterError, AdapterLoadError, AdapterNotFound, TruffulaError
from truffula.lora.disk_cache import Stamp
from truffula.lora.extra_files import MAX_BYTES, READ
from truffula.lora.fields import MAX_CONFIG_BYTES
from truffula.lora.foreign import describe_names, latest_first
from truffula.lora.paths import CONFIG, TENSORS
from truffula.lora.shards import INDEX, MAX_INDEX_BYTES, check_total, tensor_files
from truffula.lora.stores import CHUNK, SourceError
from truffula.types import AdapterRef
from truffula.weights.hub import HubError, explain


def download(
    repo: str, revision: str | None, *, cache_dir: Path | str | None, offline: bool, max_file_bytes: int
) -> Path:
    """Download one adapter's files into the cache; returns their folder (a snapshot: its files are links to blobs).

    The files that are checked and those that are downloaded are of one commit. The small files that
    ``extra_file_warnings`` reads are downloaded too.

    Raises ``AdapterNotFound`` for an unknown repository or revision, ``AdapterError`` when it holds no adapter or a
    file above ``max_file_bytes`` (checked before it is fetched), ``AdapterLoadError`` when the Hub can't be reached
    or, offline, the cache lacks it.
    """
    import huggingface_hub as hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    common: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    names: tuple[str, ...] = (TENSORS,)
    try:
        if not offline:
            info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
            names = _check_listing(info, repo, max_file_bytes)
            common["revision"] = info.sha
        # One by one: a pool of threads would cost address space that this process does not have.
        paths = [Path(hub.hf_hub_download(repo, CONFIG, local_files_only=offline, **common))]
        if offline:
            names = tuple(tensor_files({file.name for file in paths[0].parent.iterdir()})) or names
        paths += [Path(hub.hf_hub_download(repo, name, local_files_only=offline, **common)) for name in names]
        if not offline:
            with contextlib.suppress(OSError):  # a cache that is complete may be read-only
                _note_branch(paths[0].parent, revision or "main")
    except (TruffulaError, MemoryError):
        raise
    except Exception as error:  # the library also raises errors of its HTTP client and of malformed responses
        failure = explain(error, offline=offline)
        if failure.kind == "unexpected":
            raise
        raise _hub_error(repo, revision, failure) from error
    if len({path.parent for path in paths}) > 1:
        raise AdapterLoadError(f"{repo} changed while it was downloaded; try again.", param="adapter")
    return paths[0].parent


def _hub_error(repo: str, revision: str | None, failure: HubError) -> TruffulaError:
    """The error for a client, without the library's message, which may contain a request's URL and ids."""
    at = "" if revision is None else f" (revision {revision})"
    text = f"The adapter {repo}{at} cannot be downloaded from the Hub: {failure.text}."
    if failure.kind in ("repository", "revision"):
        return AdapterNotFound(text, param="adapter")
    if failure.kind == "file":
        return AdapterError(f"{repo} lacks {CONFIG} or {TENSORS}: it is not a PEFT adapter.", param=CONFIG)
    return AdapterLoadError(text, param="adapter")


def _note_branch(snapshot: Path, revision: str) -> None:
    """Record in the library's cache which commit the branch is. The library does so only for downloads by branch name,
    and offline it finds nothing without this file.
    """
    note = snapshot.parents[1] / "refs" / revision
    if revision == snapshot.name or (note.is_file() and note.read_text() == snapshot.name):
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_name(f"{note.name}.{uuid.uuid4().hex}.tmp")
    fresh.write_text(snapshot.name)
    fresh.replace(note)


def _check_listing(info: Any, repo: str, max_file_bytes: int) -> tuple[str, ...]:
    """The files to fetch besides the configuration. Raises ``AdapterError`` unless the adapter's are there and small
    enough."""
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    lacking = describe_names({name for name in sizes if "/" not in name})
    if lacking is not None:
        text, missing_file = lacking
        tensors = (f"/{TENSORS}", f"/{INDEX}")
        if inside := latest_first(name.rpartition("/")[0] for name in sizes if name.endswith(tensors)):
            text = (
                f"Its folder {inside[0]} is an adapter, but subfolders of a repository are not served: download it "
                f"with hf download {repo} --include '{inside[0]}/*' --local-dir DIR and give DIR/{inside[0]}."
            )
        raise AdapterError(f"{repo} is not a PEFT adapter. {text}", param=missing_file)
    files = tensor_files({name for name in sizes if "/" not in name})
    index = (INDEX,) if INDEX in sizes and files != [TENSORS] else ()
    for name in (CONFIG, *files, *index):
        most = min({CONFIG: MAX_CONFIG_BYTES, INDEX: MAX_INDEX_BYTES}.get(name, max_file_bytes), max_file_bytes)
        if (sizes[name] or 0) > most:
            raise AdapterError(
                f"{repo}: {name} has {sizes[name]} bytes; the limit is {most} (--max-adapter-file).", param=name
            )
    check_total((sizes[name] or 0 for name in files), max_file_bytes)
    return (*files, *index, *(name for name in READ if name in sizes and (sizes[name] or 0) <= MAX_BYTES))


class HubStore:
    """A repository of the Hub, read with a client's token (``stores.Store``). Its files are of the one commit that was
    the revision's when it was opened. They never are in the Hub library's cache, which loads without the token read:
    the library downloads them to ``folder``, which the caller removes.
    """

    def __init__(self, ref: AdapterRef, folder: Path) -> None:
        import huggingface_hub as hub
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        assert ref.credential is not None
        self._repo, self._token = ref.locator, ref.credential.token
        self._folder = folder
        self._commit, self._sizes = "", dict[str, int | None]()
        try:
            info = hub.HfApi().model_info(self._repo, revision=ref.revision, files_metadata=True, token=self._token)
            self._commit = str(info.sha)
            self._sizes = {file.rfilename: file.size for file in info.siblings or ()}
        except MemoryError:
            raise
        except Exception as error:  # as in ``download``
            failure = explain(error, offline=False)
            if failure.kind == "unexpected":
                raise
            if failure.kind not in ("repository", "revision", "access"):  # absent or forbidden: it has no file
                raise _source_error(failure) from None

    def stat(self, name: str) -> Stamp | None:
        return Stamp(self._commit, self._sizes[name]) if name in self._sizes else None

    def read(self, name: str, stamp: Stamp) -> Iterator[bytes]:
        import huggingface_hub as hub

        try:
            path = hub.hf_hub_download(self._repo, name, revision=stamp.mark, token=self._token, cache_dir=self._folder)
        except MemoryError:
            raise
        except Exception as error:  # as in ``download``
            failure = explain(error, offline=False)
            if failure.kind == "unexpected":
                raise
            raise _source_error(failure) from None
        with Path(path).open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def close(self) -> None:
        """Nothing is held."""


def _source_error(failure: HubError) -> SourceError:
    return SourceError("network" if failure.kind == "network" else "refused", failure.text)
