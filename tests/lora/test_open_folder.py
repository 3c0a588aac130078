"""``OpenFolder`` opens what the system would open, unless a link leads out of the root. The oracle is ``realpath``."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truffula.lora.paths import OpenFolder

NAMES = ["a", "b", "c"]
TARGETS = st.lists(st.sampled_from([*NAMES, "..", ".", "f"]), min_size=1, max_size=5)


def opened(root: Path, path: str) -> bytes | int:
    """The content of the file at ``path`` below ``root``, or the errno."""
    try:
        folder = OpenFolder(root, root)
        try:
            fd = folder.open(path)
        finally:
            folder.close()
        try:
            return os.read(fd, 100)
        finally:
            os.close(fd)
    except OSError as error:
        assert error.errno is not None
        return error.errno


def expected(root: Path, path: str) -> bytes | None:
    """The content when the file lies below ``root``; None when it does not, or the system opens nothing."""
    try:
        with open(f"{root}/{path}", "rb") as file:  # noqa: PTH123  pathlib would remove a trailing "/."
            return file.read() if Path(os.path.realpath(f"{root}/{path}")).is_relative_to(root) else None
    except OSError:
        return None


@settings(max_examples=80, deadline=None)
@given(
    links=st.lists(st.tuples(TARGETS, st.sampled_from(NAMES), TARGETS, st.booleans()), max_size=6),
    asked=st.lists(TARGETS, min_size=1, max_size=4),
)
def test_what_is_opened_lies_below_the_root(links: list, asked: list) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with tempfile.TemporaryDirectory() as name:
        top = Path(os.path.realpath(name))
        root = top / "root"
        for folder in (root, root / "a", root / "a" / "b", top / "c"):
            folder.mkdir(exist_ok=True)
            (folder / "f").write_text(str(folder.relative_to(top)))
        for where, link, target, absolute in links:
            place = root.joinpath(*where)
            path = Path("/".join(target))
            try:
                if Path(os.path.realpath(place)).is_relative_to(root):
                    (place / link).symlink_to(root / path if absolute else path)
            except OSError:
                continue  # there is something by that name, or the place is no folder
        for parts in asked:
            path = "/".join(parts)
            found, right = opened(root, path), expected(root, path)
            if isinstance(found, bytes):
                assert found.startswith(b"root"), f"{path} was opened outside the root"
            assert (found if isinstance(found, bytes) else None) == right
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert opened(tmp_path, "a") == errno.ELOOP


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert opened(tmp_path, "pipe") == b""


def test_a_renamed_folder_stays_open(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "f").write_text("mine")
    folder = OpenFolder(tmp_path / "x", tmp_path)
    (tmp_path / "x").rename(tmp_path / "y")
    (tmp_path / "x").mkdir()
    assert folder.read("f", 10) == b"mine" and folder.names() == {"f"} and folder.read("g", 10) is None
    tmp_path.rename(tmp_path.with_name("moved"))  # the root too
    tmp_path.mkdir()
    assert folder.read("f", 10) == b"mine"
    folder.close()
    folder.close()
    with pytest.raises(FileNotFoundError):
        OpenFolder(tmp_path / "z", tmp_path)
