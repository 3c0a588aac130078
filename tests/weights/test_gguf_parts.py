"""A GGUF model split into files is read as the one file it was; what is no whole set says what to give instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import TinyGguf, write_tiny_gguf
from gguf_writer import write_gguf

from truffula import LLM, SamplingParams
from truffula.errors import CheckpointError, UnsupportedModel
from truffula.kernels.mapped import release_pages
from truffula.testing.oracle import Oracle
from truffula.weights.gguf.checkpoint import GgufCheckpoint
from truffula.weights.texts import read_texts
from truffula.weights.watch import stamps_of


def write_parts(tiny: TinyGguf, stem: str, count: int, **first: Any) -> list[Path]:
    """As ``llama-gguf-split`` does: whole tensors in order, all metadata in the first part."""
    names, paths = list(tiny.stored), []
    for index in range(count):
        total = len(names)
        mine = names[index * total // count : (index + 1) * total // count]
        keys = {"split.no": index, "split.count": count, "split.tensors.count": total}
        pairs = {**tiny.metadata, **keys, **first} if index == 0 else keys
        path = tiny.path.with_name(f"{stem}-{index + 1:05d}-of-{count:05d}.gguf")
        paths.append(write_gguf(path, pairs, {name: tiny.stored[name] for name in mine}))
    return paths


@pytest.fixture
def tiny(tmp_path: Path) -> TinyGguf:
    return write_tiny_gguf(tmp_path / "tiny.gguf", "llama", head=True, hidden=64)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_parts_are_read_as_one_file(tiny: TinyGguf, count: int) -> None:
    paths = write_parts(tiny, "m", count)
    whole, parts = GgufCheckpoint(tiny.path), GgufCheckpoint(paths[0])
    assert parts.config == whole.config
    assert parts.warnings == whole.warnings == ()
    assert parts.tensors.keys() == whole.tensors.keys()
    assert {info.file for info in parts.tensors.values()} == set(paths)
    for name, wanted in tiny.tensors.items():
        np.testing.assert_array_equal(parts.read(name), wanted)
        assert parts.raw(name).tobytes() == whole.raw(name).tobytes()
        release_pages(parts.raw(name))
    assert read_texts(paths[0]).tokenizer == read_texts(whole.path).tokenizer
    assert {Path(item.path) for item in stamps_of(parts)} == set(paths)
    parts.close()


def test_a_split_model_answers_as_the_whole_one(tiny: TinyGguf) -> None:
    answers = []
    for path in (tiny.path, write_parts(tiny, "m", 3)[0]):
        with LLM(str(path), dtype="float32", max_model_len=64, memory_bytes=200 << 20) as llm:
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            answers.append(llm.generate([[5, 6, 7]], params)[0].token_ids)
    assert answers[0] == answers[1]


def test_transformers_is_not_asked_to_compare_a_part(tiny: TinyGguf) -> None:
    """It would fill what is in the other parts at random."""
    with pytest.raises(UnsupportedModel, match=r"llama-gguf-split --merge m-00001-of-00002\.gguf"):
        Oracle(write_parts(tiny, "m", 2)[0], tied=False)


def test_a_first_part_without_tensors(tiny: TinyGguf) -> None:
    """``llama-gguf-split --no-tensor-first-split``."""
    keys = {"split.count": 2, "split.tensors.count": len(tiny.stored)}
    first = write_gguf(tiny.path.with_name("m-00001-of-00002.gguf"), {**tiny.metadata, **keys, "split.no": 0}, {})
    second = write_gguf(tiny.path.with_name("m-00002-of-00002.gguf"), {**keys, "split.no": 1}, tiny.stored)
    checkpoint = GgufCheckpoint(first)
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), tiny.tensors["model.norm.weight"])
    assert {Path(item.path) for item in stamps_of(checkpoint)} == {first, second}


def test_one_part_is_a_whole_file(tiny: TinyGguf) -> None:
    for count in (0, 1):
        keys = {"split.no": 0, "split.count": count, "split.tensors.count": len(tiny.stored)}
        path = write_gguf(tiny.path.with_name("any.gguf"), {**tiny.metadata, **keys}, tiny.stored)
        assert GgufCheckpoint(path).warnings == ()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        GgufCheckpoint(path)
    return caught.value.message


def test_a_later_part_says_which_is_the_first(tiny: TinyGguf) -> None:
    paths = write_parts(tiny, "m", 3)
    assert refusal(paths[1]).endswith(
        "is part 2 of 3 of a split GGUF model; give the first part, m-00001-of-00003.gguf."
    )
    renamed = paths[2].rename(paths[2].with_name("last.gguf"))
    assert "part 3 of 3" in refusal(renamed) and "-00001-of-00003.gguf" in refusal(renamed)


def test_missing_parts_are_named(tiny: TinyGguf) -> None:
    paths = write_parts(tiny, "m", 5)
    paths[3].unlink()
    assert "missing beside it: m-00004-of-00005.gguf." in refusal(paths[0])
    for path in paths[1:3]:
        path.unlink()
    paths[4].unlink()
    assert "m-00002-of-00005.gguf, m-00003-of-00005.gguf, m-00004-of-00005.gguf and 1 more" in refusal(paths[0])


@pytest.mark.parametrize("name", ["model.gguf", "m-00001-of-00002.gguf", "m-00002-of-00003.gguf"])
def test_a_name_that_does_not_say_where_the_others_are(tiny: TinyGguf, name: str) -> None:
    first = write_parts(tiny, "m", 3)[0]
    assert "NAME-00001-of-00003.gguf" in refusal(first.rename(first.with_name(name)))


@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
def test_parts_whose_counts_differ(tiny: TinyGguf, key: str) -> None:
    paths = write_parts(tiny, "m", 2)
    total = len(tiny.stored)
    keys = {"split.no": 1, "split.count": 2, "split.tensors.count": total} | {key: 7}
    write_gguf(paths[1], keys, dict(list(tiny.stored.items())[total // 2 :]))
    assert f"{key} is 7" in refusal(paths[0]) and "m-00002-of-00002.gguf" in refusal(paths[0])


def test_parts_of_different_models(tiny: TinyGguf) -> None:
    paths = write_parts(tiny, "m", 2)
    total = len(tiny.stored)
    keys = {"split.no": 1, "split.count": 2, "split.tensors.count": total, "general.name": "another"}
    write_gguf(paths[1], keys, dict(list(tiny.stored.items())[total // 2 :]))
    assert "general.name is 'another'" in refusal(paths[0])


def test_a_tensor_too_few_and_one_twice(tiny: TinyGguf) -> None:
    paths = write_parts(tiny, "m", 2)
    total = len(tiny.stored)
    keys = {"split.no": 1, "split.count": 2, "split.tensors.count": total}
    rest = dict(list(tiny.stored.items())[total // 2 :])
    write_gguf(paths[1], keys, dict(list(rest.items())[1:]))
    assert f"split.tensors.count is {total}, but the 2 parts hold {total - 1} tensors" in refusal(paths[0])
    twice = next(iter(tiny.stored))
    write_gguf(paths[1], keys, dict([*list(rest.items())[1:], (twice, tiny.stored[twice])]))
    assert f"tensor {twice!r} is in both m-00001-of-00002.gguf and m-00002-of-00002.gguf" in refusal(paths[0])


def test_a_damaged_part_is_named(tiny: TinyGguf) -> None:
    paths = write_parts(tiny, "m", 2)
    paths[1].write_bytes(paths[1].read_bytes()[:-64])
    assert refusal(paths[0]).startswith(f"{paths[1]}: truncated")
    paths[1].write_bytes(b"")
    assert refusal(paths[0]) == f"{paths[1]}: the file is empty."


@pytest.mark.parametrize("value", [-1, True, "2", [2]])
def test_counts_of_a_wrong_kind(tiny: TinyGguf, value: Any) -> None:
    assert "split.count" in refusal(write_parts(tiny, "m", 2, **{"split.count": value})[0])


@pytest.mark.parametrize(
    ("suffix", "cut"),
    [(".part1of2", ".part"), ("-split-a", "-split-"), (".split-aa", ".split-"), (".part-b", ".part-")],
)
def test_a_piece_cut_by_bytes_says_how_to_join_it(tiny: TinyGguf, suffix: str, cut: str) -> None:
    piece = tiny.path.with_name(f"big.Q8_0.gguf{suffix}")
    piece.write_bytes(tiny.path.read_bytes()[:5000])
    assert f"`cat big.Q8_0.gguf{cut}* > big.Q8_0.gguf`" in refusal(piece)
