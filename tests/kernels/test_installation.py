"""Advice to install something is a whole command for the way this truffula was installed."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from truffula.kernels.installation import Installation, installation


def recorded(monkeypatch: pytest.MonkeyPatch, folder: Path, direct_url: dict[str, object] | None) -> Installation:
    """What is found where pip wrote ``direct_url`` into the package's metadata."""
    info = folder / "truffula-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: truffula\nVersion: 0.0\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(json.dumps(direct_url))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return installation()


def clone(folder: Path) -> Path:
    folder.mkdir()
    for name in ("pyproject.toml", "Makefile"):
        (folder / name).touch()
    return folder


def test_of_a_package_index_it_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = recorded(monkeypatch, tmp_path, None)
    python = shlex.quote(sys.executable)
    assert here.compile_again() == (
        f"{python} -m pip install --force-reinstall --no-deps --no-cache-dir truffula"
    )  # fmt: skip
    assert here.pip_install("train") == f"{python} -m pip install 'truffula[train]'"


@pytest.mark.parametrize("editable", [False, True])
def test_of_a_folder_it_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, editable: bool) -> None:
    folder = clone(tmp_path / "my clone")
    url = {"url": folder.as_uri(), "dir_info": {"editable": editable}}
    words = shlex.split(recorded(monkeypatch, tmp_path, url).compile_again())
    assert words[:4] == [sys.executable, "-m", "pip", "install"] and words[-1] == str(folder)
    assert ("-e" in words) == editable


def test_in_a_clone_that_make_set_up_it_is_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone")
    monkeypatch.setattr(sys, "prefix", str(folder / ".venv"))
    url = {"url": folder.as_uri(), "dir_info": {"editable": True}}
    here = recorded(monkeypatch, tmp_path, url)
    assert here.compile_again() == f"make -C {folder} native"
    assert shlex.split(here.pip_install("torch"))[-2:] == ["-e", f"{folder}[torch]"]


@pytest.mark.parametrize("url", ["https://example.org/truffula.zip", "file:///no/such/folder"])
def test_a_source_that_is_not_here_is_not_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    assert recorded(monkeypatch, tmp_path, {"url": url}) == Installation()
