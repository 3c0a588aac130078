"""The file of an adapter: every kind of part unchanged, shared tensors once, damage detected, memory released."""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import on_every_backend
from llama_program import llama_program

from truffula.errors import AdapterLoadError, KernelError
from truffula.kernels.adapters import (
    ALIGN,
    KIND,
    KINDS,
    AdapterLayout,
    Bias,
    ColumnScale,
    InputScale,
    LowRank,
    Part,
    Replace,
    Rows,
    SiteTensors,
    low_rank,
    make_image,
    pack,
    tensors_of,
)
from truffula.kernels.backend import Backend, Executable
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program
from truffula.lora.image import ImageHeader, ImageWriter, Reserve, map_image
from truffula.testing.programs import pull_from, random_weights

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
RNG = np.random.default_rng(1)
ALL_KINDS: dict[str, Part] = {
    "low_rank": LowRank(RNG.normal(size=(2, 32)).astype(np.float32), RNG.normal(size=(32, 2)).astype(np.float16), 0.5),
    "low_rank with an expert axis": LowRank(np.ones((3, 2, 32), np.float32), np.ones((3, 32, 2), np.float32), -2.0),
    "column_scale": ColumnScale(RNG.normal(size=32).astype(np.float32)),
    "input_scale": InputScale(RNG.normal(size=32).astype(ml_dtypes.bfloat16)),
    "bias": Bias(RNG.normal(size=32).astype(np.float32)),
    "replace": Replace(RNG.normal(size=(32, 32)).astype(ml_dtypes.bfloat16)),
    "rows": Rows(np.array([3, 7], np.int32), RNG.normal(size=(2, 32)).astype(np.float32)),
}


def loaded(backend: Backend, program: Program) -> Executable:
    capacity = Capacity(
        max_tokens=8, max_seqs=2, max_logit_rows=8, max_segments=2, num_blocks=8, block_size=4, max_blocks_per_seq=4
    )
    return backend.load(program, "float32", pull_from(random_weights(program)), capacity)


def writer_of(sites: list[SiteTensors]) -> ImageWriter:
    return ImageWriter("f" * 64, 4, sites)


def low_ranks(seed: int = 0, count: int = 5) -> list[SiteTensors]:
    """Sites out of order, of mixed dtypes and ranks, two of which share an A."""
    rng = np.random.default_rng(seed)
    sites = []
    for n in rng.permutation(count):
        dtype, rank = DTYPES[n % 3], 1 + int(n) % 4
        a = rng.normal(size=(rank, 3 + n)).astype(dtype)
        sites.append(low_rank(int(2 * n), a, rng.normal(size=(7 + n, rank)).astype(dtype), float(n) / 3))
    (shared,) = sites[0].parts
    assert isinstance(shared, LowRank)
    sites.append(low_rank(99, shared.a, np.asarray(shared.b[:2]), -1.5))
    return sites


def written(path: Path) -> tuple[ImageHeader, bytes]:
    writer = writer_of(low_ranks())
    writer.write(path)
    return writer.header, path.read_bytes()


def assert_same(mine: Part, other: Part) -> None:
    assert type(mine) is type(other)
    for one, two in zip(tensors_of(mine), tensors_of(other), strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
        assert one.ctypes.data % ALIGN == 0
    if isinstance(mine, LowRank) and isinstance(other, LowRank):
        assert mine.scale == float(np.float32(other.scale))


def test_what_is_mapped_is_what_was_written(tmp_path: Path) -> None:
    sites = low_ranks()
    writer = writer_of(sites)
    writer.write(tmp_path / "image")
    image = map_image(tmp_path / "image", writer.header)
    assert (image.generation, image.rank, image.nbytes) == ("f" * 64, 4, writer.header.nbytes)
    assert (tmp_path / "image").stat().st_size == writer.header.nbytes
    for mine, other in zip(image.sites(), sorted(sites, key=lambda s: s.site), strict=True):
        assert mine.site == other.site
        assert_same(mine.parts[0], other.parts[0])


@pytest.mark.parametrize("name", ALL_KINDS)
def test_every_kind_of_part_has_its_place_in_a_file(tmp_path: Path, name: str) -> None:
    beside = LowRank(np.ones((1, 5), np.float32), np.ones((4, 1), np.float32), 1.0)
    writer = writer_of([SiteTensors(2, (ALL_KINDS[name], beside)), SiteTensors(0, (beside,))])
    writer.write(tmp_path / "image")
    first, second = map_image(tmp_path / "image", writer.header).sites()
    assert (first.site, second.site) == (0, 2)
    for mine, other in zip(second.parts, (ALL_KINDS[name], beside), strict=True):
        assert_same(mine, other)


def test_the_kinds_above_are_all() -> None:
    assert {part.kind for part in ALL_KINDS.values()} == set(KINDS)


@on_every_backend
def test_a_part_that_no_kernel_serves_is_refused_by_name_before_it_is_written(backend: Backend) -> None:
    layout = backend.adapter_layout(llama_program())
    with pytest.raises(KernelError, match=r"model\.layers\.0\.q_proj: no kernel serves the adapter part 'rows'"):
        pack(layout, [SiteTensors(0, (ALL_KINDS["rows"],))])


@on_every_backend
def test_an_executable_refuses_a_table_of_other_kinds(backend: Backend) -> None:
    program = llama_program()
    layout = backend.adapter_layout(program)
    good = make_image(layout, [SiteTensors(0, (ALL_KINDS["low_rank"],))], generation="g")
    executable = loaded(backend, program)
    for number, kind in enumerate(KINDS):
        if number:
            good.table[0, KIND] = number
            with pytest.raises(KernelError, match=f"{kind}|adapter: |values"):
                executable.adapter(good)


@on_every_backend
def test_an_executable_refuses_an_image_packed_for_another(backend: Backend) -> None:
    """Of another backend's kernels, or of the same one's for another program."""
    executable = loaded(backend, llama_program())
    own = backend.adapter_layout(llama_program())
    other = AdapterLayout(own.storage, own.places[1:])
    panels = "float32" if own.storage == "panels" else "panels"
    for layout in (other, AdapterLayout(panels, own.places)):
        image = make_image(own, [SiteTensors(0, (ALL_KINDS["low_rank"],))], generation="g")
        with pytest.raises(KernelError, match="packed for"):
            executable.adapter(dataclasses.replace(image, layout=layout.name))
    executable.adapter(image)


def test_a_shared_a_is_stored_once() -> None:
    made = low_ranks()
    separate = [low_rank(s.site, p.a.copy(), p.b, p.scale) for s in made for p in s.parts if isinstance(p, LowRank)]
    assert writer_of(made).header.nbytes < writer_of(separate).header.nbytes


def test_a_file_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        writer_of(low_ranks()).write(tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == b"mine"


@pytest.mark.parametrize("nbytes", [1, 4096, 3 << 20])
def test_an_image_in_reserved_memory_is_the_same_file(tmp_path: Path, nbytes: int) -> None:
    _, plain = written(tmp_path / "plain")
    reserve = Reserve(tmp_path)
    for name in ("first", "second"):  # the second without a reserve
        if name == "first":
            reserve.fill(nbytes)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]
        writer_of(low_ranks()).write(tmp_path / name, reserve)
        assert (tmp_path / name).read_bytes() == plain and (tmp_path / name).stat().st_mode & 0o777 == 0o600
    reserve.fill(nbytes)
    with pytest.raises(FileExistsError):
        writer_of(low_ranks()).write(tmp_path / "first", reserve)
    assert (tmp_path / "first").read_bytes() == plain
    Reserve(tmp_path / "absent").fill(nbytes)


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no unnamed files")
@pytest.mark.parametrize("reserved", [4096, 3 << 20])
def test_reserved_memory_becomes_the_image(tmp_path: Path, reserved: int) -> None:
    reserve = Reserve(tmp_path)
    reserve.fill(reserved)
    taken = reserve.take(tmp_path / "image", 5000)
    assert taken is not None
    taken[1][:] = 7
    os.close(taken[0])
    assert (tmp_path / "image").read_bytes() == bytes([7]) * 5000
    assert reserve.take(tmp_path / "another", 5000) is None


def test_no_room_leaves_no_half_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            writer_of(low_ranks()).write(tmp_path / "image")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_memory_goes_with_the_last_array(tmp_path: Path) -> None:
    header, _ = written(tmp_path / "image")

    def mapped() -> bool:
        return str(tmp_path / "image") in Path("/proc/self/maps").read_text()

    image = map_image(tmp_path / "image", header)
    kept = tensors_of(image.sites()[0].parts[0])[0]
    before = kept.tobytes()
    del image
    gc.collect()
    assert mapped() and kept.tobytes() == before
    del kept
    gc.collect()
    assert not mapped()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_noticed_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut anywhere, or a byte of the table changed: an error in words, or arrays that lie within the file."""
    path = tmp_path_factory.mktemp("damaged") / "image"
    header, raw = written(path)
    if data.draw(st.booleans()):
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        with pytest.raises(AdapterLoadError, match="damaged"):
            map_image(path, header)
        return
    position, value = data.draw(st.integers(0, header.data_start - 1)), data.draw(st.integers(0, 255))
    path.write_bytes(raw[:position] + bytes([value]) + raw[position + 1 :])
    try:
        parts = [part for site in map_image(path, header).sites() for part in site.parts]
    except AdapterLoadError as error:
        assert "damaged" in error.message
        return
    except KernelError as error:
        assert error.param == "table"
        return
    for part in parts:
        assert all(array.tobytes() is not None for array in tensors_of(part))
        assert not isinstance(part, LowRank) or np.isfinite(part.scale)
