"""Adapters in shards, with an index as ``accelerate`` writes it or without one, are read as one file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lora_bases import BASE, llama_sites, validate
from safetensors.numpy import load_file, save_file
from source_server import Source
from test_adapter_fetching import Loads, source

from truffula.errors import AdapterError
from truffula.kernels.adapters import tensors_of
from truffula.lora.folder import open_adapter
from truffula.lora.peft import validate_adapter
from truffula.lora.shards import INDEX
from truffula.lora.sources import AdapterDirectory
from truffula.lora.worker import LoadLimits
from truffula.testing.adapters import write_tiny_adapter

__all__ = ["source"]
TENSORS = "adapter_model.safetensors"


def sharded(folder: Path, count: int = 3, *, seed: int = 0, index: bool = True) -> Path:
    """The same tensors as the adapter of this seed, in shards."""
    write_tiny_adapter(folder, llama_sites(), seed=seed)
    tensors = load_file(folder / TENSORS)
    (folder / TENSORS).unlink()
    placed = {}
    for number in range(count):
        name = f"adapter_model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, folder / name, {"format": "pt"})
        placed |= dict.fromkeys(part, name)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return folder


def parts_of(folder: Path) -> list[tuple[int, list[np.ndarray]]]:
    sites = validate(folder).sites
    return [(made.site, [np.array(a) for part in made.parts for a in tensors_of(part)]) for made in sites]


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_the_adapter_of_one_file(tmp_path: Path, index: bool) -> None:
    one = write_tiny_adapter(tmp_path / "one", llama_sites())
    many = sharded(tmp_path / "many", index=index)
    for (site, mine), (other, theirs) in zip(parts_of(many), parts_of(one), strict=True):
        assert site == other
        for left, right in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(left, right)
    assert validate(many).generation != validate(sharded(tmp_path / "other", seed=1, index=index)).generation
    assert validate(many).generation == validate(sharded(tmp_path / "same", index=index)).generation
    with open_adapter(many) as files:
        assert files.generation() == validate(many).generation


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", "of 3 shards 1 are missing, the first is number 2"),
        ("mixed", "shards of several adapters"),
        ("twice", "is in adapter_model-00001-of-00003.safetensors and in adapter_model-00002"),
        ("not listed", "is in no file, and it is in adapter_model-"),
        ("elsewhere", "says that .* is in adapter_model-00001-of-00003.safetensors, and it is in adapter_model-"),
        ("no map", "weight_map must map tensors to files"),
        ("not JSON", "is not valid JSON"),
        ("truncated", "truncated"),
        ("index alone", "there are no shards beside"),
    ],
)
def test_shards_and_indexes_that_do_not_fit_are_refused(tmp_path: Path, fault: str, words: str) -> None:
    folder = sharded(tmp_path / "a")
    index = json.loads((folder / INDEX).read_text())
    first, second, third = sorted(folder.glob("adapter_model-*"))
    match fault:
        case "missing":
            second.unlink()
        case "mixed":
            third.rename(folder / "adapter_model-00003-of-00004.safetensors")
        case "twice":
            save_file(load_file(second) | dict(list(load_file(first).items())[:1]), second)
        case "not listed":
            index["weight_map"].popitem()
        case "elsewhere":
            index["weight_map"] = dict.fromkeys(index["weight_map"], first.name)
        case "no map":
            index = {"weight_map": []}
        case "not JSON":
            (folder / INDEX).write_text("{")
        case "truncated":
            second.write_bytes(second.read_bytes()[:-5])
        case "index alone":
            for file in (first, second, third):
                file.unlink()
    if fault != "not JSON":
        (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(AdapterError, match=words):
        validate(folder)


def test_a_folder_of_adapters_lists_them_and_sees_their_changes(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    sharded(root / "a")
    directory = AdapterDirectory(adapter_dir=root)
    assert directory.names() == ["a"] and directory.warnings() == []
    before = directory.resolve("a")
    (root / "a" / "adapter_model-00002-of-00003.safetensors").write_bytes(b"x" * 100)
    after = directory.resolve("a")
    assert before is not None and after is not None and before.fingerprint != after.fingerprint


@pytest.mark.parametrize("sizes", [True, False], ids=["sizes known", "sizes unknown"])
def test_shards_have_the_limit_of_one_file_together(tmp_path: Path, source: Source, sizes: bool) -> None:
    folder = sharded(tmp_path / "made")
    total = sum(path.stat().st_size for path in folder.glob("adapter_model-*"))
    source.lengths = sizes
    url = source.put("a", folder)
    with pytest.raises(AdapterError, match=f"have {total} bytes together; the limit is {total - 1} "):
        validate_adapter(folder, llama_sites(), base=BASE, max_file_bytes=total - 1)
    refused = Loads(tmp_path / "small", source, limits=LoadLimits(file_bytes=total - 1))(url, fingerprint="1")
    assert "together; the limit is" in refused.error.message
    assert Loads(tmp_path / "enough", source, limits=LoadLimits(file_bytes=total))(url, fingerprint="1").error is None


def test_a_source_that_lists_nothing_is_read_by_its_index(tmp_path: Path, source) -> None:  # type: ignore[no-untyped-def]
    loads = Loads(tmp_path, source)
    url = source.put("a", sharded(tmp_path / "made"))
    response = loads(url, fingerprint="1")
    assert response.error is None, response.error
    assert response.image.generation == validate(tmp_path / "made").generation
    again = loads(url, fingerprint="2", has=response.commit)
    assert again.error is None and again.image is None and not [path for path in source.bodies() if "of-0" in path]
    shutil.rmtree(tmp_path / "made")
    source.put("a", sharded(tmp_path / "made", seed=1))
    changed = loads(url, fingerprint="3", has=response.commit)
    assert changed.image.generation == validate(tmp_path / "made").generation != response.image.generation
    del source.files["/a/adapter_model-00002-of-00003.safetensors"]
    assert "has no adapter_model-00002" in loads(url, fingerprint="4").error.message
    source.files[f"/a/{INDEX}"] = b'{"weight_map": {"x": "../secret.safetensors"}}'
    assert "does not name the shards" in loads(url, fingerprint="5").error.message
