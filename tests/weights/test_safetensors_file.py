"""Reading safetensors: what is written comes back bit for bit, and no byte of a broken header is believed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_safetensors import write_raw_safetensors
from safetensors import safe_open
from safetensors.numpy import save_file

from truffula.errors import CheckpointError
from truffula.kernels.mapped import release_pages
from truffula.testing.files import write_safetensors
from truffula.weights.safetensors import DTYPES, MAX_HEADER_BYTES, SafetensorsFile

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, np.ndarray]:
    made = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=5)):
        dtype, shape = DTYPES[draw(st.sampled_from(sorted(DTYPES)))], draw(SHAPES)
        count = int(np.prod(shape, dtype=int))
        raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        if dtype == np.bool_:
            raw = bytes(byte & 1 for byte in raw)
        made[name] = np.frombuffer(raw, dtype).reshape(shape)
    return made


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(tensors=tensor_dicts(), metadata=st.none() | st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"))))
@settings(max_examples=60, deadline=None)
def test_what_is_written_comes_back(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_safetensors(Path(folder) / "x.safetensors", tensors, metadata)
        file = SafetensorsFile(path)
        assert file.metadata == (metadata or {})
        assert file.tensors.keys() == tensors.keys()
        for name, array in tensors.items():
            assert same_bits(file.read(name), array)
            assert file.raw(name).tobytes() == array.tobytes()
            release_pages(file.raw(name))
            assert same_bits(file.read(name), array)
        with safe_open(path, "numpy") as other:  # the format's own reader takes the file
            assert set(other.keys()) == set(tensors)
        file.close()


def test_files_of_the_formats_own_writer_are_read(tmp_path: Path) -> None:
    tensors = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "brain": np.arange(4).astype(ml_dtypes.bfloat16),
        "ids": np.arange(5, dtype=np.int64),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert all(same_bits(file.read(name), array) for name, array in tensors.items())
    assert file.metadata == {"format": "pt"}


def test_a_misaligned_tensor_is_copied_and_right(tmp_path: Path) -> None:
    entry = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    values = np.array([1.5, -2.25], np.float32)
    file = SafetensorsFile(write_raw_safetensors(tmp_path / "x.safetensors", entry, b"\x07" + values.tobytes()))
    assert np.array_equal(file.read("b"), values)
    assert file.read("b").flags.aligned


def test_views_do_not_reach_the_file(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(4, np.float32)})
    before = path.read_bytes()
    view = SafetensorsFile(path).read("a")
    assert view.flags.writeable
    view[:] = 1
    assert path.read_bytes() == before


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


BROKEN_HEADERS = {
    "not JSON": (b"{nonsense", 8, "JSON"),
    "not an object": (b"[1, 2]", 0, "begin with"),
    "not UTF-8": (b'{"\xff": 1}', 0, "JSON"),
    "NaN": (b'{"a": NaN}', 0, "NaN"),
    "a key twice": (json.dumps({"a": entry()})[:-1].encode() + b', "a": 1}', 8, "written twice"),
    "nested too deeply": (b'{"a":' + b"[" * 100_000, 0, "JSON"),
    "a huge integer": (b'{"a": {"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', 8, "JSON"),
    "half a surrogate pair in an entry": (b'{"a": {"\\ud800": 1}}', 8, "surrogates"),
    "half a surrogate pair as a name": (
        b'{"\\uDFFF": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        "surrogates",
    ),
    "no entry": ({"a": 3}, 8, "'a'"),
    "a field missing": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a'"),
    "a field too many": ({"a": {**entry(), "more": 1}}, 8, "'a'"),
    "unknown dtype": ({"a": entry("F4")}, 8, "F4"),
    "dtype of another type": ({"a": entry(["F32"])}, 8, "dtype"),
    "negative size": ({"a": entry(shape=(-2,))}, 8, "shape"),
    "size as a float": ({"a": entry(shape=(2.0,))}, 8, "shape"),
    "size as a boolean": ({"a": entry(shape=(True, 2))}, 8, "shape"),
    "shape is no list": ({"a": entry(shape=2)}, 8, "shape"),
    "offsets reversed": ({"a": entry(begin=8, end=0)}, 8, "data_offsets"),
    "offsets are text": ({"a": entry(begin="0")}, 8, "data_offsets"),
    "shape and range disagree": ({"a": entry(shape=(3,))}, 8, "12 bytes"),
    "a product that overflows": ({"a": entry(shape=(2**62, 2**62, 0, 4))}, 8, "takes 0 bytes"),
    "data behind the end": ({"a": entry(end=8)}, 4, "truncated"),
    "overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, 12, "overlap"),
    "same range twice": ({"a": entry(), "b": entry()}, 8, "overlap"),
    "a hole": ({"a": entry(), "b": entry(begin=12, end=20)}, 20, "belong to no tensor"),
    "bytes left at the end": ({"a": entry()}, 16, "at its end"),
    "metadata not text": ({"__metadata__": {"a": 1}, "a": entry()}, 8, "__metadata__"),
    "too many dimensions": ({"a": entry(shape=(1,) * 40 + (2,))}, 8, "dimensions"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_a_broken_header_is_refused_by_name(case: str, tmp_path: Path) -> None:
    header, data, words = BROKEN_HEADERS[case]
    path = write_raw_safetensors(tmp_path / "broken.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=r"broken\.safetensors") as caught:
        SafetensorsFile(path)
    assert words in caught.value.message
    if isinstance(header, dict) and case not in {"bytes left at the end", "metadata not text"}:
        assert caught.value.param in header


BROKEN_FILES = {
    "empty": (b"", "empty"),
    "too short": (b"\x01\x02", "too short"),
    "absurd length": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "above"),
    "longest length": (b"\xff" * 8 + b"{}", "above"),
    "length past the end": ((1000).to_bytes(8, "little") + b"{}", "truncated"),
    "pickled": (b"\x80\x02}q\x00." + bytes(100), "begin with"),
    "zip": (b"PK\x03\x04" + bytes(100), "begin with"),
    "LFS pointer": (b"version https://git-lfs.example/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_what_is_no_safetensors_file_is_refused(case: str, tmp_path: Path) -> None:
    raw, words = BROKEN_FILES[case]
    (tmp_path / "broken.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"broken\.safetensors") as caught:
        SafetensorsFile(tmp_path / "broken.safetensors")
    assert words in caught.value.message


def test_a_missing_file_and_a_changed_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsFile(tmp_path / "none.safetensors")
    path = write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(64, np.float32)})
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-128])
    with pytest.raises(CheckpointError, match="changed"):
        file.read("a")


WHOLE = {"model.embed": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_damage_gives_anything_but_a_checkpoint_error(data: st.DataObject) -> None:
    """Flip, cut, insert: the reader answers with tensors that lie within the file or with CheckpointError."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_safetensors(Path(folder) / "x.safetensors", WHOLE, {"format": "pt"})
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(raw)))
            cut = data.draw(st.integers(0, 4))
            raw[at : at + cut] = data.draw(st.binary(max_size=4))
        path.write_bytes(bytes(raw))
        try:
            file = SafetensorsFile(path)
        except CheckpointError as error:
            assert "x.safetensors" in error.message
            return
        for name, info in file.tensors.items():
            assert info.offset + info.nbytes <= len(raw)
            assert file.read(name).nbytes == info.nbytes


@given(st.binary(max_size=64), st.integers(0, 80))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_refused_or_read(raw: bytes, length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + raw)
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
            raise CheckpointError("a header by chance")


@pytest.mark.parametrize("shape", [[2**62, 0], [0, 2**63 - 1], [2**40, 2**40, 0]])
def test_an_empty_tensor_that_no_array_can_be_is_refused(tmp_path: Path, shape: list[int]) -> None:
    path = tmp_path / "x.safetensors"
    write_raw_safetensors(path, {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b"")
    with pytest.raises(CheckpointError, match="too large for an array") as caught:
        SafetensorsFile(path)
    assert caught.value.param == "a"


@given(tensor_dicts())
@settings(max_examples=50, deadline=None)
def test_runs_are_the_bytes_of_all_tensors_each_once(tensors: dict[str, np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        write_safetensors(path, tensors)
        file = SafetensorsFile(path)
        runs = list(file.runs(file.tensors.values()))
        assert b"".join(run.tobytes() for run in runs) == b"".join(file.raw(name).tobytes() for name in file.tensors)
        if len({(info.dtype, info.nbytes > 0) for info in file.tensors.values()}) == 1:
            assert len(runs) == 1
        some = list(file.tensors.values())[::2]
        assert sum(run.nbytes for run in file.runs(some)) == sum(info.nbytes for info in some)
        file.close()
