"""Lists the models and adapters that can be used by name: aliases, and the Hub's cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from truffula.weights.gguf_header import PartName
from truffula.weights.packages import ALIASES, cached_package, package_cache

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")


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
                nbytes, what = (
                    sum(sizes[other] for other in names),
                    f"GGUF, {len(names)} files" if part else "GGUF file",
                )
                yield CachedModel(f"{repo_id}/{name}", "hub", revision.snapshot_path / name, nbytes, what)
    shards = [shard for name in sizes if (shard := _SHARD.fullmatch(name))]
    complete = "model.safetensors" in sizes or (bool(shards) and len(shards) == int(shards[0][1]))
    if "config.json" in sizes and complete:
        yield CachedModel(repo_id, "hub", revision.snapshot_path, revision.size_on_disk, "model folder")
    if {"adapter_config.json", "adapter_model.safetensors"} <= sizes.keys():
        usage = f"--adapter NAME={repo_id}"
        yield CachedModel(repo_id, "adapter", revision.snapshot_path, revision.size_on_disk, usage)
