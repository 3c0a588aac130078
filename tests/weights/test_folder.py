"""Model folders as they are met in the wild: every row of the table of oddities that concerns files."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from truffula.errors import CheckpointError, ModelNotFound
from truffula.testing.files import write_safetensors
from truffula.weights.folder import FolderCheckpoint, conversion_command
from truffula.weights.open import open_checkpoint
from truffula.weights.text_files import read_json
from truffula.weights.texts import read_texts

A, B, C = (np.full((2, 2), value, np.float32) for value in (1, 2, 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shard(number: int, total: int = 2) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def sharded(folder: Path) -> None:
    write_safetensors(folder / shard(1), {"a": A})
    write_safetensors(folder / shard(2), {"b": B})


def values(checkpoint: Any) -> dict[str, float]:
    return {name: float(checkpoint.read(name)[0, 0]) for name in checkpoint.tensors}


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for word in words:
        assert word in caught.value.message, caught.value.message


def test_one_file(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", {"a": A, "b": B})
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "chat_template.jinja").write_bytes(b"hi")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "safetensors"
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert values(checkpoint) == {"a": 1, "b": 2}
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == 32
    assert read_texts(folder).tokenizer == {"tokenizer.json": b"{}", "chat_template.jinja": b"hi"}
    assert checkpoint.warnings == ()
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        checkpoint.read("c")
    checkpoint.close()


def test_shards_with_an_index(folder: Path) -> None:
    sharded(folder)
    index(folder, {"a": shard(1), "b": shard(2)})
    checkpoint = open_checkpoint(folder)
    assert values(checkpoint) == {"a": 1, "b": 2}
    assert checkpoint.warnings == ()


def test_shards_without_an_index_that_form_a_full_set(folder: Path) -> None:
    sharded(folder)
    checkpoint = open_checkpoint(folder)
    assert values(checkpoint) == {"a": 1, "b": 2}
    assert len(checkpoint.warnings) == 1


def test_shards_without_an_index_that_do_not(folder: Path) -> None:
    write_safetensors(folder / shard(1, 3), {"a": A})
    write_safetensors(folder / shard(3, 3), {"b": B})
    refused(folder, shard(2, 3), "missing")
    write_safetensors(folder / shard(2, 3), {"a": C})
    refused(folder, "a is in", shard(1, 3), shard(2, 3))
    write_safetensors(folder / shard(2, 3), {"c": C})
    assert values(open_checkpoint(folder)) == {"a": 1, "b": 2, "c": 3}
    write_safetensors(folder / shard(1, 4), {"d": C})
    refused(folder, "no complete set", shard(1, 4))


def test_a_shard_of_a_set_of_none_is_no_shard(folder: Path) -> None:
    write_safetensors(folder / shard(1, 0), {"a": A})
    refused(folder, "holds neither", shard(1, 0))


def test_the_same_tensor_in_two_shards_is_the_one_the_index_names(folder: Path) -> None:
    write_safetensors(folder / shard(1), {"a": A, "b": C})
    write_safetensors(folder / shard(2), {"b": B})
    index(folder, {"a": shard(1), "b": shard(2)})
    checkpoint = open_checkpoint(folder)
    assert values(checkpoint) == {"a": 1, "b": 2}
    assert any("b is in" in warning for warning in checkpoint.warnings)
    write_safetensors(folder / shard(1), {"a": A, "c": C})
    write_safetensors(folder / shard(2), {"b": B, "c": A})
    refused(folder, "c is in", "says which")


def test_a_tensor_the_index_does_not_list_is_there_all_the_same(folder: Path) -> None:
    write_safetensors(folder / shard(1), {"a": A, "lm_head.weight": C})
    write_safetensors(folder / shard(2), {"b": B})
    index(folder, {"a": shard(1), "b": shard(2)})
    checkpoint = open_checkpoint(folder)
    assert values(checkpoint) == {"a": 1, "b": 2, "lm_head.weight": 3}
    assert any("lm_head.weight" in warning for warning in checkpoint.warnings)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight", "lm_head.qweight"])
def test_a_head_that_the_index_promises_and_no_shard_has_is_absent(folder: Path, name: str) -> None:
    sharded(folder)
    index(folder, {"a": shard(1), "b": shard(2), name: shard(2)})
    checkpoint = open_checkpoint(folder)
    assert values(checkpoint) == {"a": 1, "b": 2}
    assert any(name in warning for warning in checkpoint.warnings)


def test_any_other_promise_that_is_not_kept(folder: Path) -> None:
    sharded(folder)
    index(folder, {"a": shard(1), "b": shard(2), "model.norm.weight": shard(2)})
    refused(folder, "model.norm.weight", shard(2))
    write_safetensors(folder / shard(1), {"a": A, "c": C})
    for name in ("a", "lm_head.weight"):
        write_safetensors(folder / shard(1), {name: A, "c": C})
        index(folder, {name: shard(2), "b": shard(2), "c": shard(1)})
        refused(folder, f"{name} is in", shard(1), "index is wrong")


BAD_INDEXES = {
    "missing shard": ({"a": shard(1), "b": "model-00009-of-00009.safetensors"}, "is missing"),
    "upwards": ({"a": "../model.safetensors"}, "outside the folder"),
    "upwards inside": ({"a": "x/../../model.safetensors"}, "outside the folder"),
    "backslashes": ({"a": "..\\model.safetensors"}, "outside the folder"),
    "absolute": ({"a": "/etc/model.safetensors"}, "outside the folder"),
    "a drive": ({"a": "C:/model.safetensors"}, "outside the folder"),
    "pickles": ({"a": "pytorch_model-00001-of-00001.bin"}, "only safetensors"),
    "no name": ({"a": 3}, "not a file name"),
    "an empty name": ({"a": ""}, "not a file name"),
    "a zero byte": ({"a": "a\0.safetensors"}, "not a file name"),
    "no map": ([], "weight_map"),
    "an empty map": ({}, "weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_a_bad_index_is_refused(folder: Path, case: str) -> None:
    sharded(folder)
    # what a traversal would find, were it followed
    write_safetensors(folder.parent / "model.safetensors", {"a": C})
    weight_map, words = BAD_INDEXES[case]
    index(folder, weight_map)
    refused(folder, words, "index.json")


def test_other_copies_of_the_weights_are_not_read(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", {"a": A})
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "consolidated-00001-of-00001.safetensors"):
        write_safetensors(folder / name, {"a": C, "x": C})
    (folder / "original").mkdir()
    write_safetensors(folder / "original" / "model.safetensors", {"x": C})
    assert values(open_checkpoint(folder)) == {"a": 1}
    (folder / "model.safetensors").unlink()
    refused(folder, "consolidated.safetensors")


def test_index_and_single_file_together(folder: Path) -> None:
    sharded(folder)
    index(folder, {"a": shard(1), "b": shard(2)})
    write_safetensors(folder / "model.safetensors", {"a": C})
    checkpoint = open_checkpoint(folder)
    assert values(checkpoint) == {"a": 1, "b": 2}
    assert len(checkpoint.warnings) == 1


def test_pickles_are_refused_with_the_command_that_converts(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(folder, "never read", conversion_command(folder))
    program, flag, code = shlex.split(conversion_command(folder))
    assert (program, flag) == ("python", "-c")
    compile(code, "command", "exec")
    assert str(folder) in code


@pytest.mark.parametrize("name", ["it's", 'a "b" $c', "päth with space"])
def test_the_conversion_command_survives_odd_folder_names(tmp_path: Path, name: str) -> None:
    _, _, code = shlex.split(conversion_command(tmp_path / name))
    assert any(str(tmp_path / name) == constant for constant in compile(code, "c", "exec").co_consts)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "no config.json", "x.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "adapter")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "x.gguf")
    (tmp_path / "x.gguf").unlink()
    refused(tmp_path, "neither model.safetensors nor")
    write_safetensors(tmp_path / "model.safetensors", {})
    refused(tmp_path, "no tensor")
    with pytest.raises(ModelNotFound):
        open_checkpoint(tmp_path / "none")
    refused(tmp_path / "model.safetensors", "give its folder")


BAD_JSON = {
    "no JSON": (b"{", "JSON"),
    "empty": (b"", "JSON"),
    "a list": (b"[]", "object"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "infinite": (b'{"a": [-Infinity]}', "Infinity"),
    "overflow": (b'{"a": 1e400}', "1e400"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c'"),
    "no UTF-8": (b'{"a": "\xff"}', "JSON"),
    "too deep": (b'{"a":' + b"[" * 200_000, "JSON"),
    "a pointer": (b"version https://git-lfs.example/spec/v1\n", "git lfs pull"),
}


def test_infinity_is_a_number_in_config_json_alone(folder: Path) -> None:
    """Published configs of Mamba-2 have it as the longest step."""
    write_safetensors(folder / "model.safetensors", {"a": A})
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(folder).config == {"time_step_limit": [0.0, math.inf]}
    (folder / "generation_config.json").write_text('{"temperature": Infinity}')
    refused(folder, "Infinity is not a finite number")


@pytest.mark.parametrize("case", BAD_JSON)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_bad_json_is_refused_naming_the_file(folder: Path, case: str, name: str) -> None:
    write_safetensors(folder / "model.safetensors", {"a": A})
    raw, words = BAD_JSON[case]
    (folder / name).write_bytes(raw)
    refused(folder, name, words)


def test_json_details(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1e-5, "b": 12, "c": null, "d": "\\ud83e\\udd99"}')
    assert read_json(path) == {"a": 1e-5, "b": 12, "c": None, "d": "🦙"}
    path.write_bytes(b'{"a": "' + b"x" * (64 << 20) + b'"}')
    with pytest.raises(CheckpointError, match="larger than"):
        read_json(path)


def test_a_folder_of_links_is_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The Hub's cache is links to blobs elsewhere: only names are judged, not where a link leads."""
    blobs = tmp_path_factory.mktemp("blobs")
    write_safetensors(blobs / "0123", {"a": A})
    (folder / shard(1, 1)).symlink_to(blobs / "0123")
    index(folder, {"a": shard(1, 1)})
    assert values(FolderCheckpoint(folder)) == {"a": 1}
