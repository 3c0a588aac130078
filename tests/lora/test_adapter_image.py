"""The laid-out file: bits unchanged, shared tensors once, damage noticed, memory given back."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.errors import AdapterLoadError
from truffula.kernels.backend import SiteTensors
from truffula.lora.image import ALIGN, image_nbytes, map_image, write_image

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def laid_out(seed: int = 0, count: int = 5) -> SimpleNamespace:
    """Sites out of order, of mixed dtypes and ranks, two of which share an A."""
    rng = np.random.default_rng(seed)
    sites = []
    for n in rng.permutation(count):
        dtype, rank = DTYPES[n % 3], 1 + int(n) % 4
        a = rng.normal(size=(rank, 3 + n)).astype(dtype)
        sites.append(SiteTensors(int(2 * n), a, rng.normal(size=(7 + n, rank)).astype(dtype), float(n) / 3))
    twin = sites[0]
    sites.append(SiteTensors(99, twin.a, np.asarray(twin.b[:2]), -1.5))
    return SimpleNamespace(generation="f" * 64, rank=4, sites=sites)


def written(path: Path, seed: int = 0) -> tuple[SimpleNamespace, bytes]:
    made = laid_out(seed)
    write_image(made, path)
    return made, path.read_bytes()


def test_what_is_mapped_is_what_was_written(tmp_path: Path) -> None:
    made = laid_out()
    nbytes = write_image(made, tmp_path / "image")
    image = map_image(tmp_path / "image")
    assert (image.generation, image.rank, image.nbytes) == (made.generation, 4, nbytes)
    assert (tmp_path / "image").stat().st_size == nbytes
    for mine, other in zip(image.sites, sorted(made.sites, key=lambda s: s.site), strict=True):
        assert (mine.site, mine.scale) == (other.site, float(np.float32(other.scale)))
        for one, two in ((mine.a, other.a), (mine.b, other.b)):
            assert one.dtype == two.dtype and one.tobytes() == two.tobytes()
            assert one.ctypes.data % ALIGN == 0 and one.flags.writeable
    twins = [s for s in image.sites if s.a is image.sites[-1].a]
    assert len(twins) == 2


def test_a_shared_a_is_stored_once() -> None:
    made = laid_out()
    separate = [SiteTensors(s.site, s.a.copy(), s.b, s.scale) for s in made.sites]
    assert image_nbytes(made.sites) < image_nbytes(separate)


def test_a_file_that_exists_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_image(laid_out(), tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == b"mine"


def test_no_room_leaves_no_half_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_image(laid_out(), tmp_path / "image")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_open_descriptor_stays_the_callers(tmp_path: Path) -> None:
    written(tmp_path / "image")
    fd = os.open(tmp_path / "image", os.O_RDONLY)
    (tmp_path / "image").unlink()
    assert map_image(fd).rank == 4
    os.close(fd)


def test_memory_goes_with_the_last_array(tmp_path: Path) -> None:
    written(tmp_path / "image")

    def mapped() -> bool:
        return str(tmp_path / "image") in Path("/proc/self/maps").read_text()

    image = map_image(tmp_path / "image")
    kept = image.sites[0].a
    before = kept.tobytes()
    image.close()
    image.close()
    del image
    gc.collect()
    assert mapped() and kept.tobytes() == before
    del kept
    gc.collect()
    assert not mapped()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_noticed_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut anywhere, or a byte of the header changed: an error in words, or arrays that lie within the file."""
    path = tmp_path_factory.mktemp("damaged") / "image"
    _, raw = written(path)
    header_end = 16 + int.from_bytes(raw[8:16], "little")
    if data.draw(st.booleans()):
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        with pytest.raises(AdapterLoadError, match="damaged"):
            map_image(path)
        return
    position, value = data.draw(st.integers(0, header_end - 1)), data.draw(st.integers(0, 255))
    path.write_bytes(raw[:position] + bytes([value]) + raw[position + 1 :])
    try:
        image = map_image(path)
    except AdapterLoadError as error:
        assert "damaged" in error.message
        return
    for site in image.sites:
        assert np.isfinite(site.scale) and site.a.shape[0] == site.b.shape[1]
        assert site.a.tobytes() is not None and site.b.tobytes() is not None
