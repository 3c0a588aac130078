"""What a user may write for a model, and what is said when it cannot be had. Nothing here needs a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from truffula.errors import ModelNotFound
from truffula.weights.hub import byte_progress
from truffula.weights.packages import ALIASES
from truffula.weights.sources import resolve_source


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


@pytest.mark.parametrize(
    "source", ["./none", "/none/at/all", "a/b/c", "no such thing", "", "../x", "none.gguf/", "none.gguf", "~/none"]
)
def test_what_is_no_model_is_not_looked_for_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if source == "":
        assert resolve(source, tmp_path) == Path()  # the current folder, as everywhere
        return
    with pytest.raises(ModelNotFound) as caught:
        resolve(source, tmp_path, offline=False)
    assert caught.value.message.startswith(f"There is no file or folder {source!r}")
    assert "from the Hub" not in caught.value.message and "Did you mean" not in caught.value.message
    assert all(alias in caught.value.message for alias in ALIASES)


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("smolm2", "smollm2"),
        ("SmolLM2", "smollm2"),
        ("smollm2-135m", "smollm2"),
        ("gemma3-270", "gemma3-270m"),
        ("tinny.gguf", "tiny.gguf"),
        ("models/lama", "models/llama"),
        ("./models/lama", "models/llama"),
        ("models/tiny-q4_0.guf", "models/tiny-q4_0.gguf"),
        ("elsewhere/lama", None),
        ("qwen", None),
    ],
)
def test_a_mistyped_name_is_said_to_be_no_path_first_and_another_is_suggested(
    source: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    (tmp_path / "tiny.gguf").touch()
    (tmp_path / "models" / "tiny-q4_0.gguf").touch()
    (tmp_path / "models" / "lama.txt").touch()
    with pytest.raises(ModelNotFound) as caught:
        resolve(source, tmp_path / "cache")
    message = caught.value.message
    assert message.startswith(f"There is no file or folder {source!r} here. ")
    assert f"Did you mean {meant}?" in message if meant else "Did you mean" not in message
    assert "Aliases: smollm2, gemma3-270m." in message


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


def test_a_home_folder_of_an_unknown_user_is_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"There is no file or folder '~nosuchuser/x\.gguf'"):
        resolve_source("~nosuchuser/x.gguf", cache_dir=tmp_path, offline=True)


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
