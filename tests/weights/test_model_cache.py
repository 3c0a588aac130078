"""What ``truffula list`` is told: aliases, and the models in a cache that the Hub's library keeps."""

from __future__ import annotations

from pathlib import Path

from truffula.weights.packages import ALIASES, cached_package, package_cache, package_folder
from truffula.weights.sources import CachedModel, cached_models, resolve_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(folder: Path, repo: str, files: dict[str, bytes], kind: str = "models", ref: str = "main") -> Path:
    """A repository in a cache as the Hub's library lays it out."""
    home = folder / f"{kind}--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / ref).write_text(COMMIT)
    (home / "blobs").mkdir()
    for number, (name, data) in enumerate(files.items()):
        (home / "blobs" / str(number)).write_bytes(data)
        file = home / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(home / "blobs" / str(number))
    return home / "snapshots" / COMMIT


def test_an_empty_or_missing_cache_lists_the_aliases(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        found = cached_models(folder)
        assert {model.name: model.path for model in found} == dict.fromkeys(ALIASES)
        assert all(model.kind == "alias" and model.nbytes > 2**20 and model.description for model in found)


def test_an_alias_that_was_fetched_has_its_path(tmp_path: Path) -> None:
    model = ALIASES["smollm2"]
    assert cached_package(model, package_cache(tmp_path)) is None
    kept = package_folder(model, package_cache(tmp_path)) / model.file
    kept.parent.mkdir(parents=True)
    with kept.open("wb") as file:
        file.truncate(model.nbytes)
    found = {item.name: item for item in cached_models(tmp_path)}
    assert found["smollm2"].path == kept == resolve_source("smollm2", cache_dir=tmp_path, offline=True)
    assert found["gemma3-270m"].path is None
    with kept.open("r+b") as file:
        file.truncate(1000)  # cut: as good as not there
    assert cached_models(tmp_path)[0].path is None


def test_models_of_the_hubs_cache(tmp_path: Path) -> None:
    folder = cached(tmp_path, "org/folder", {"config.json": b"{}", "model.safetensors": b"123"})
    shards = {f"model-0000{at}-of-00002.safetensors": b"12" for at in (1, 2)}
    cached(tmp_path, "org/sharded", {"config.json": b"{}", **shards})
    gguf = cached(tmp_path, "org/quants", {"q4.gguf": b"GGUF", "sub/q8.gguf": b"GGUF8"})
    parts = {f"m-0000{at}-of-00002.gguf": b"GGUF" for at in (1, 2)}
    split = cached(tmp_path, "org/split", parts)
    cached(tmp_path, "org/cut-gguf", dict([*parts.items()][:1]))
    cached(tmp_path, "org/cut", {"config.json": b"{}", "model-00001-of-00002.safetensors": b"12"})
    leaf = cached(tmp_path, "org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"12"})
    cached(tmp_path, "org/branch", {"config.json": b"{}", "model.safetensors": b"123"}, ref="old")
    cached(tmp_path, "org/data", {"config.json": b"{}", "model.safetensors": b"123"}, kind="datasets")
    found = [model for model in cached_models(tmp_path) if model.kind == "hub"]
    assert found == [
        CachedModel("org/folder", "hub", folder, 5, "model folder"),
        CachedModel("org/quants/q4.gguf", "hub", gguf / "q4.gguf", 4, "GGUF file"),
        CachedModel("org/quants/sub/q8.gguf", "hub", gguf / "sub" / "q8.gguf", 5, "GGUF file"),
        CachedModel("org/sharded", "hub", tmp_path / "models--org--sharded" / "snapshots" / COMMIT, 6, "model folder"),
        CachedModel("org/split/m-00001-of-00002.gguf", "hub", split / "m-00001-of-00002.gguf", 8, "GGUF, 2 files"),
    ]
    assert cached_models(tmp_path)[-1] == CachedModel("org/adapter", "adapter", leaf, 4, "--adapter NAME=org/adapter")
    for model in found:  # each name is one that the commands take
        assert resolve_source(model.name, cache_dir=tmp_path, offline=True) == model.path
