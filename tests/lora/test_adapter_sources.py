"""Names lead where the operator allowed, and nowhere else."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_bases import llama_sites

from truffula.errors import AdapterNotFound, ConfigError, InvalidRequest
from truffula.lora import sources
from truffula.lora.sources import AdapterDirectory
from truffula.testing.adapters import tiny_config, write_tiny_adapter


def adapter(folder: Path, **fields: object) -> Path:
    return write_tiny_adapter(folder, llama_sites(), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, "", "base", "org/base"])
def test_the_base_is_no_adapter(name: str | None) -> None:
    assert AdapterDirectory().resolve(name, base_names=("base", "org/base")) is None


def test_a_named_folder_and_a_named_hub_id(tmp_path: Path) -> None:
    adapter(tmp_path / "a")
    directory = AdapterDirectory({"pirate": tmp_path / "a", "far": "org/name", "old": "org/name@v1.0"})
    pirate = directory.resolve("pirate")
    assert pirate is not None and (pirate.kind, pirate.locator) == ("local", str(tmp_path / "a"))
    far, old = directory.resolve("far"), directory.resolve("old")
    assert far is not None and (far.kind, far.locator, far.revision) == ("hub", "org/name", None)
    assert old is not None and (old.kind, old.locator, old.revision) == ("hub", "org/name", "v1.0")
    assert directory.names() == ["far", "old", "pirate"]


@pytest.mark.parametrize(
    "options",
    [
        {"adapters": {"a": "/nowhere"}},
        {"adapters": {"a": "no-slash"}},
        {"adapters": {"a": "org/name/extra"}},
        {"adapters": {"": "org/name"}},
        {"adapters": {"a\nb": "org/name"}},
        {"adapter_dir": Path("/nowhere")},
        {"default_source": "s3"},
    ],
    ids=str,
)
def test_an_option_that_cannot_work_is_said_at_the_start(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        AdapterDirectory(**options)  # type: ignore[arg-type]


def test_a_new_subfolder_is_served_without_a_restart(tmp_path: Path) -> None:
    directory = AdapterDirectory(adapter_dir=tmp_path)
    with pytest.raises(AdapterNotFound):
        directory.resolve("late")
    assert directory.names() == []
    adapter(tmp_path / "late")
    found = directory.resolve("late")
    assert found is not None and found.locator == str(tmp_path / "late") and directory.names() == ["late"]


def test_a_changed_folder_has_another_fingerprint(tmp_path: Path) -> None:
    directory = AdapterDirectory(adapter_dir=tmp_path)
    adapter(tmp_path / "a", seed=1)
    first, again = directory.resolve("a"), directory.resolve("a")
    assert first == again
    adapter(tmp_path / "a", seed=2, rank=5)
    assert directory.resolve("a") != first


def test_folders_whose_path_is_not_utf_8_are_refused_or_unknown(tmp_path: Path) -> None:
    """A loading worker's frames cannot hold them."""
    odd = tmp_path / os.fsdecode(b"\xff")
    adapter(odd / "a")
    for given in ({"adapters": {"a": odd / "a"}}, {"adapter_dir": odd}, {"allow_local": (odd,)}):
        with pytest.raises(ConfigError, match="not UTF-8; rename"):
            AdapterDirectory(**given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not UTF-8"):
        AdapterDirectory().locate("a", odd / "a")
    (tmp_path / "link").symlink_to(odd / "a")
    for given in ({"adapter_dir": tmp_path}, {"allow_local": (tmp_path,), "default_source": "local"}):
        with pytest.raises(AdapterNotFound):
            AdapterDirectory(**given).resolve("link")  # type: ignore[arg-type]


EVIL = [
    "..",
    ".",
    "../a",
    "a/../a",
    "a/..",
    "/etc",
    "a\x00b",
    "a\\b",
    ".hidden",
    "a\n",
    "\u202ea",
    "x" * 600,
    "~",
    "file:///etc",
]


@pytest.mark.parametrize("name", EVIL)
def test_a_name_never_leaves_the_folder_nor_tells_where_it_is(tmp_path: Path, name: str) -> None:
    root = tmp_path / "served"
    adapter(root / "a")
    adapter(root / ".hidden")
    adapter(tmp_path / "outside")
    directory = AdapterDirectory(adapter_dir=root)
    with pytest.raises(AdapterNotFound) as caught:
        directory.resolve(name)
    assert str(tmp_path) not in caught.value.message
    assert directory.names() == ["a"]


@pytest.mark.parametrize("link", ["folder", "config", "tensors"])
def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path, link: str) -> None:
    root, outside = tmp_path / "served", adapter(tmp_path / "outside")
    root.mkdir()
    if link == "folder":
        (root / "a").symlink_to(outside)
    else:
        name = {"config": "adapter_config.json", "tensors": "adapter_model.safetensors"}[link]
        adapter(root / "a")
        (root / "a" / name).unlink()
        (root / "a" / name).symlink_to(outside / name)
    directory = AdapterDirectory(adapter_dir=root)
    with pytest.raises(AdapterNotFound):
        directory.resolve("a")
    assert directory.names() == []


def test_links_within_the_folder_are_fine(tmp_path: Path) -> None:
    adapter(tmp_path / "v1")
    (tmp_path / "current").symlink_to("v1")
    (tmp_path / "loop").symlink_to("loop")
    directory = AdapterDirectory(adapter_dir=tmp_path)
    found = directory.resolve("current")
    assert found is not None and found.locator == str(tmp_path / "v1")
    assert directory.names() == ["current", "v1"]


def test_first_use_is_where_the_operator_allowed(tmp_path: Path) -> None:
    adapter(tmp_path / "ok" / "team" / "a")
    adapter(tmp_path / "private" / "b")
    directory = AdapterDirectory(allow_local=(tmp_path / "ok",), allow_hub=("my-org/*", "other/one"))
    for name in (str(tmp_path / "ok" / "team" / "a"), "team/a"):
        found = directory.resolve(name, "local")
        assert found is not None and found.locator == str(tmp_path / "ok" / "team" / "a") and found.fingerprint
    for name in (str(tmp_path / "private" / "b"), "../private/b", "team/../../private/b", "team", "/"):
        with pytest.raises(AdapterNotFound):
            directory.resolve(name, "local")
    hub = directory.resolve("my-org/pirate@refs/pr/1")
    assert hub is not None and (hub.kind, hub.locator, hub.revision) == ("hub", "my-org/pirate", "refs/pr/1")
    assert directory.resolve("other/one", "hub") is not None
    for name in ("other/two", "my-org", "my-org/../x", "my-org/a/b", "http://my-org/x", "my-org/a b", "evil/my-org/x"):
        with pytest.raises(AdapterNotFound):
            directory.resolve(name, "hub")


def test_a_folder_has_one_name_however_it_is_spelt(tmp_path: Path) -> None:
    adapter(tmp_path / "ok" / "team" / "a")
    (tmp_path / "ok" / "link").symlink_to("team")
    directory = AdapterDirectory(allow_local=(tmp_path / "ok",))
    absolute = str(tmp_path / "ok" / "team" / "a")
    refs = {
        directory.resolve(name, "local") for name in ("team/a", "team//a", "./team/./a", "team/a/", "link/a", absolute)
    }
    assert [ref.name for ref in refs if ref is not None] == ["team/a"]


def test_without_an_allow_list_nothing_is_loaded_on_first_use(tmp_path: Path) -> None:
    adapter(tmp_path / "a")
    for source in (None, "hub", "local"):
        with pytest.raises(AdapterNotFound):
            AdapterDirectory().resolve("org/name", source)
    with pytest.raises(AdapterNotFound):
        AdapterDirectory(default_source="local").resolve(str(tmp_path / "a"))


def test_a_source_keeps_equal_names_apart(tmp_path: Path) -> None:
    adapter(tmp_path / "dir" / "x")
    directory = AdapterDirectory({"org/x": tmp_path / "dir" / "x"}, allow_hub=("org/*",))
    local, hub = directory.resolve("org/x"), directory.resolve("org/x", "hub")
    assert local is not None and hub is not None and (local.kind, hub.kind) == ("local", "hub")
    with pytest.raises(InvalidRequest) as caught:
        directory.resolve("org/x", "pbase")
    assert caught.value.param == "adapter_source"


def test_the_folder_may_vanish(tmp_path: Path) -> None:
    root = tmp_path / "served"
    adapter(root / "a")
    directory = AdapterDirectory({"far": "org/name"}, adapter_dir=root)
    assert directory.names() == ["a", "far"]
    for path in (root / "a").iterdir():
        path.unlink()
    (root / "a").rmdir()
    root.rmdir()
    assert directory.names() == ["far"]
    with pytest.raises(AdapterNotFound):
        directory.resolve("a")


RESERVED = ["tgi", "dummy", "org/base", "served", "served:x"]


@pytest.mark.parametrize("name", RESERVED)
def test_a_name_that_means_the_base_is_no_adapters(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        AdapterDirectory({name: "org/name"}, base_names=("org/base", "served"))


def test_folders_named_like_the_base_are_left_out_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tgi", "served", "served:x", "fine"):
        adapter(tmp_path / name)
    directory = AdapterDirectory(adapter_dir=tmp_path, allow_local=(tmp_path,), base_names=("org/base", "served"))
    assert directory.names() == directory.names() == ["fine"]
    assert sorted(record.args for record in caplog.records) == [("served",), ("served:x",), ("tgi",)]
    for name in ("tgi", "served", "served:x"):
        for source in (None, "local"):
            with pytest.raises(AdapterNotFound):
                directory.resolve(name, source)
    assert directory.resolve("fine") is not None


def test_a_library_reserves_nothing() -> None:
    assert AdapterDirectory({"tgi": "org/name"}).names() == ["tgi"]


# ---- what the operator is told at the start


def write_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_sound_places_give_no_warning(tmp_path: Path) -> None:
    adapter(tmp_path / "dir" / "a")
    (tmp_path / "dir" / "notes").mkdir()
    write_file(tmp_path / "dir" / "README.md")
    directory = AdapterDirectory({"b": adapter(tmp_path / "b"), "far": "org/name"}, adapter_dir=tmp_path / "dir")
    assert directory.warnings() == []
    assert AdapterDirectory().warnings() == []


def test_an_adapter_given_as_the_adapter_folder_is_warned_of(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "pirate")
    (warning,) = AdapterDirectory(adapter_dir=folder).warnings()
    assert "is an adapter itself" in warning and f"--adapter pirate={folder}" in warning


def test_a_folder_without_adapters_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (warning,) = AdapterDirectory(adapter_dir=tmp_path).warnings()
    assert "no subfolder is an adapter" in warning and "adapter_config.json" in warning


def test_the_warning_of_a_folder_of_adapter_folders_names_the_one_to_give(tmp_path: Path) -> None:
    adapter(tmp_path / "adapters" / "pirate")
    first, second = AdapterDirectory(adapter_dir=tmp_path).warnings()
    assert "adapters cannot be served" in first and "subfolders are: pirate" in first and "--adapter-dir" in first
    assert "no subfolder is an adapter" in second


def test_each_subfolder_that_was_meant_as_an_adapter_is_named_once(tmp_path: Path) -> None:
    root, outside = tmp_path / "served", adapter(tmp_path / "outside")
    adapter(root / "good")
    adapter(root / "no-tensors").joinpath("adapter_model.safetensors").unlink()
    adapter(root / "no-config").joinpath("adapter_config.json").unlink()
    write_file(root / "pickle" / "adapter_model.bin")
    write_file(root / "mlx" / "adapters.safetensors")
    adapter(root / "run" / "checkpoint-5")
    (root / "linked").symlink_to(outside)
    adapter(root / ".hidden").joinpath("adapter_config.json").unlink()
    (root / "notes").mkdir()
    warnings = AdapterDirectory(adapter_dir=root).warnings()
    words = {
        "no-tensors": "no adapter_model.safetensors",
        "no-config": "no adapter_config.json",
        "pickle": "adapter_model.bin",
        "mlx": "MLX",
        "run": "checkpoint-5",
        "linked": "links to places outside of",
    }
    assert len(warnings) == len(words)
    for name, word in words.items():
        (warning,) = (text for text in warnings if f"--adapter-dir: {name} cannot be served: " in text)
        assert word in warning


def test_a_subfolder_that_cannot_be_read_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path / "good")
    (tmp_path / "closed").mkdir()
    listing = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    (warning,) = AdapterDirectory(adapter_dir=tmp_path).warnings()
    assert "closed cannot be served: it cannot be read: Permission denied" in warning


def test_named_adapters_that_cannot_be_served_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "adapters" / "pirate")
    adapter(tmp_path / "out" / "checkpoint-10")
    directory = AdapterDirectory({"trained": "out", "typo": "adapters/pirat", "far": "org/name"})
    trained, typo = directory.warnings()
    assert "'trained'" in trained and "checkpoint-10" in trained
    assert "'typo'" in typo and "no folder adapters/pirat here" in typo and "Did you mean adapters/pirate?" in typo


@pytest.mark.parametrize(
    ("name", "word"), [("x.gguf", "GGUF"), ("x.zip", "Unpack"), ("adapter_model.safetensors", "Give its folder")]
)
def test_a_file_given_as_an_adapter_is_recognised(tmp_path: Path, name: str, word: str) -> None:
    for source in (write_file(tmp_path / name), str(tmp_path / name)):
        with pytest.raises(ConfigError, match=word) as caught:
            AdapterDirectory({"x": source})
        assert name in caught.value.message and "Hub id" not in caught.value.message


def test_a_mistyped_folder_is_suggested(tmp_path: Path) -> None:
    adapter(tmp_path / "pirate")
    with pytest.raises(ConfigError, match=r"Did you mean .*/pirate"):
        AdapterDirectory({"x": tmp_path / "pirat"})


def test_a_file_is_no_adapter_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        AdapterDirectory(adapter_dir=write_file(tmp_path / "x"))


def test_an_adapter_with_a_refused_config_is_warned_of_at_the_start(tmp_path: Path) -> None:
    def with_config(folder: Path, text: str) -> Path:
        adapter(folder).joinpath("adapter_config.json").write_text(text)
        return folder

    refused = tiny_config(rank=2, alpha=4, targets=["q_proj"], layer_replication=[[0, 1]])
    deeper = with_config(tmp_path / "dir" / "deeper", json.dumps(refused))
    with_config(tmp_path / "dir" / "broken", "{")
    adapter(tmp_path / "dir" / "good")
    named, *found = AdapterDirectory({"d": deeper}, adapter_dir=tmp_path / "dir").warnings()
    assert f"'d': {deeper} cannot be served: " in named and "layer_replication" in named
    assert sorted(text.partition(" cannot be served")[0] for text in found) == [
        "--adapter-dir: broken", "--adapter-dir: deeper",
    ]  # fmt: skip
    assert any("not valid JSON" in text for text in found)


def test_a_listing_notices_what_changes_inside_of_subfolders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts are kept by the subfolders' mtimes, but not where those say nothing."""
    monkeypatch.setattr(sources, "LISTING_S", -1.0)
    root = tmp_path / "served"
    for name in ("a", "b", "c"):
        adapter(root / name)
    (root / "c" / "adapter_config.json").rename(root / "c" / "real.json")
    (root / "c" / "adapter_config.json").symlink_to("real.json")
    long_ago = time.time() - 100
    for name in ("a", "b", "c"):
        os.utime(root / name, (long_ago, long_ago))
    directory = AdapterDirectory(adapter_dir=root)
    assert directory.names() == ["a", "b", "c"]
    (root / "a" / "adapter_config.json").unlink()
    (root / "c" / "real.json").rename(root / "c" / "gone.json")
    os.utime(root / "c", (long_ago, long_ago))
    assert directory.names() == ["b"]
    (root / "d").mkdir()
    assert directory.names() == ["b"]
    adapter(root / "d")
    adapter(root / "a")
    assert directory.names() == ["a", "b", "d"]


def test_urls_are_named_by_the_operator_or_match_a_pattern(tmp_path: Path) -> None:
    directory = AdapterDirectory(
        {"ours": "s3://models/team/a/", "hub": f"org/x@{'a' * 40}", "moving": "org/x"},
        allow_source=("s3://models/open/*", "https://host/x/*/y", "az://account/box/*"),
        allow_hub=("org/*",),
        recheck_s=60,
    )
    ours = directory.resolve("ours")
    assert ours is not None and (ours.kind, ours.locator, ours.root) == (
        *("s3", "s3://models/team/a"),
        "s3://models/team/a/*",
    )
    assert ours.fingerprint.isdigit()  # the period in which it is checked
    fixed, moving = directory.resolve("hub"), directory.resolve("moving")
    assert fixed is not None and moving is not None and (fixed.fingerprint, moving.fingerprint != "") == ("", True)
    for name, source, url in (
        ("s3://models/open/a/b", None, "s3://models/open/a/b"),
        ("models/open/a", "s3", "s3://models/open/a"),
        ("host/x/1/y", "http", "https://host/x/1/y"),
        ("az://account/box/a", "azure", "az://account/box/a"),
    ):
        ref = directory.resolve(name, source)
        assert ref is not None and ref.name == ref.locator == url
    wrong = [
        *("s3://models/open", "s3://models/openly", "s3://models/open/../team/a", "s3://models/open/%2e%2e/a"),
        *("s3://other/open/a", "s3://models/open//a", "S3://models/open/a", "s3://models/open/a b", "az://account/box"),
        *(
            "http://host/x/1/y",
            "https://host:444/x/1/y",
            "https://u@host/x/1/y",
            "https://host/x/1/y?q",
            "gs://models/a",
        ),
        *("file:///etc/passwd", "s3://models/team/a", "s3://models/open/" + "a" * 600, "s3://[::1]/open/a"),
    ]
    for name in wrong:
        with pytest.raises(AdapterNotFound, match="GET /v1/models"):
            directory.resolve(name)
    with pytest.raises(AdapterNotFound):
        directory.resolve("s3://models/open/a", "http")
    with pytest.raises(ConfigError, match="Write NAME=URL"):
        AdapterDirectory({"s3://models/x": "1/a"})
    for source in ("s3://Models/a", "https://host/a?b=c", "gs://bucket"):
        with pytest.raises(ConfigError, match="is not the URL of an adapter"):
            AdapterDirectory({"a": source})
