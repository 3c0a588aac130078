"""An adapter's two files from the Hugging Face Hub, or from its cache. Blocks: runs in the loading worker only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truffula.errors import AdapterError, AdapterLoadError, AdapterNotFound
from truffula.lora.folder import CONFIG, PICKLE, TENSORS


def download(repo: str, revision: str | None, *, cache_dir: Path | None, offline: bool, max_file_bytes: int) -> Path:
    """Bring one adapter's files into the cache; returns their folder (a snapshot: its files are links to blobs).

    Raises ``AdapterNotFound`` for an unknown repository or revision, ``AdapterError`` when it holds no adapter or a
    file above ``max_file_bytes`` (checked before it is fetched), ``AdapterLoadError`` when the Hub can't be reached
    or, offline, the cache lacks it.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    common: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    try:
        if not offline:
            _check_listing(hub.HfApi().model_info(repo, revision=revision, files_metadata=True), repo, max_file_bytes)
        # One by one: a pool of threads would cost address space that this process does not have.
        paths = [
            Path(hub.hf_hub_download(repo, name, local_files_only=offline, **common)) for name in (CONFIG, TENSORS)
        ]
    except errors.LocalEntryNotFoundError as error:
        why = "it is not in the cache and we are offline" if offline else "the Hub cannot be reached"
        raise AdapterLoadError(f"{repo}: {why}.", param="adapter") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = "" if revision is None else f" at {revision}"
        raise AdapterNotFound(f"There is no {repo}{at} on the Hub, or we may not read it.", param="adapter") from error
    except errors.EntryNotFoundError as error:
        raise AdapterError(f"{repo} lacks {CONFIG} or {TENSORS}: it is no PEFT adapter.", param=CONFIG) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        # The library's own message may hold a request's URL and ids; its kind says enough for a client.
        raise AdapterLoadError(f"{repo} cannot be fetched ({type(error).__name__}).", param="adapter") from error
    if paths[0].parent != paths[1].parent:
        raise AdapterLoadError(f"{repo} changed while it was fetched; ask again.", param="adapter")
    return paths[0].parent


def _check_listing(info: Any, repo: str, max_file_bytes: int) -> None:
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    if CONFIG not in sizes:
        raise AdapterError(f"{repo} has no {CONFIG}: it is no PEFT adapter.", param=CONFIG)
    if TENSORS not in sizes:
        only = f"only {PICKLE}, a pickle; ask its author for safetensors" if PICKLE in sizes else "no adapter weights"
        raise AdapterError(f"{repo} has no {TENSORS} ({only}).", param=TENSORS)
    if (sizes[TENSORS] or 0) > max_file_bytes:
        raise AdapterError(
            f"{repo}: {TENSORS} has {sizes[TENSORS]} bytes; at most {max_file_bytes} are read.", param=TENSORS
        )
