"""What a user may write for a model, and what is said when it cannot be had. Nothing here needs a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from truffula.errors import ModelNotFound
from truffula.weights.packages import ALIASES
from truffula.weights.sources import byte_progress, resolve_source


def resolve(source: str, cache_dir: Path, offline: bool = True) -> Path:
    return resolve_source(source, cache_dir=cache_dir, offline=offline)


def test_paths_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "model"), tmp_path) == tmp_path / "model"
    assert resolve(str(tmp_path / "x.gguf"), tmp_path) == tmp_path / "x.gguf"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("model", tmp_path) == Path("model")
    assert resolve("~/model", tmp_path) == tmp_path / "model"
    (tmp_path / "smollm2").mkdir()
    assert resolve("smollm2", tmp_path) == Path("smollm2")


@pytest.mark.parametrize("source", ["./none", "/none/at/all", "a/b/c", "no such thing", "", "../x", "none.gguf/"])
def test_what_is_no_model_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source == "":
        assert resolve(source, tmp_path) == Path()  # the current folder, as everywhere
        return
    with pytest.raises(ModelNotFound, match="does not exist") as caught:
        resolve(source, tmp_path, offline=False)
    assert all(alias in caught.value.message for alias in ALIASES)


def hub_cache(folder: Path, repo: str, files: dict[str, bytes]) -> Path:
    """A cache as the Hub's library keeps one."""
    home = folder / f"models--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, data in files.items():
        (snapshot / name).write_bytes(data)
    return snapshot


def test_the_hubs_cache_is_used_offline(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, "org/model", {"config.json": b"{}"})
    assert resolve("org/model", tmp_path) == snapshot
    gguf = hub_cache(tmp_path, "org/model-GGUF", {"model-q4.gguf": b"GGUF"})
    assert resolve("org/model-GGUF/model-q4.gguf", tmp_path) == gguf / "model-q4.gguf"
    with pytest.raises(ModelNotFound, match=r"org/model-GGUF/FILE\.gguf"):
        resolve("org/model-GGUF", tmp_path)


@pytest.mark.parametrize("source", ["org/none", "org/none/x.gguf", "nothing-here"])
def test_offline_and_not_in_the_cache(source: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="offline") as caught:
        resolve(source, tmp_path)
    assert source in caught.value.message
    assert caught.value.param == "model"


def test_progress_is_told_in_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, int, int | None]] = []
    bar = byte_progress(lambda *step: told.append(step))
    with bar(total=100, unit="B", unit_scale=True, name="download") as shown:
        shown.update(40)
        shown.total = 200
        shown.update(60)
    with bar(total=3, desc="Fetching 3 files") as shown:
        shown.update(1)
    with bar(total=0, unit="B", name="x.transfer") as shown:
        shown.update(1)
    assert told == [("download", 40, 100), ("download", 100, 200)]
    assert capfd.readouterr() == ("", "")


def test_importing_the_loader_is_light() -> None:
    code = (
        "import sys, truffula.weights.open, truffula.weights.sources;"
        "print(*sorted({'huggingface_hub', 'torch', 'transformers', 'tokenizers', 'httpx', 'gguf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
