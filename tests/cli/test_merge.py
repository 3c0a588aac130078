"""``truffula merge`` and ``truffula fold``: what they write is served, and what they refuse, without a file left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import here

from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.oracle import Oracle
from truffula.testing.tiny import tiny_config, write_tiny_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("merge")
    base = write_tiny_checkpoint(root / "base", tiny_config("llama", vocab_size=97, num_hidden_layers=2), seed=1)
    for name, rank in (("a", 4), ("b", 4), ("c", 2)):
        write_tiny_adapter(root / name, base, rank=rank, seed=rank + ord(name))
    return {path.name: str(path) for path in root.iterdir()}


def test_a_merged_adapter_and_a_folded_model_answer_alike(folders: dict[str, str], tmp_path: Path) -> None:
    done = here("merge", folders["a"], folders["c"], "--weights", "0.5,-0.25", "-o", str(tmp_path / "new/both"))
    assert done.returncode == 0, done.stderr
    assert "4 modules, rank 6" in done.stdout
    report = json.loads(here("inspect", str(tmp_path / "new/both"), "--base", folders["base"], "--json").stdout)
    assert report.get("error") is None
    done = here("fold", folders["base"], str(tmp_path / "new/both"), "--output", str(tmp_path / "folded"))
    assert done.returncode == 0 and "4 of 21 tensors changed" in done.stdout, done.stderr + done.stdout
    prompt = [3, 1, 4, 1, 5]
    expected = Oracle(Path(folders["base"]), tied=False, adapter=tmp_path / "new/both").logits(prompt)
    np.testing.assert_allclose(Oracle(tmp_path / "folded", tied=False).logits(prompt), expected, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded", "new"], "nothing else is left"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weights", "1"], "--weights is '1'; 2 adapters need 2 numbers"),
        (["--weights", "1,x"], "--weights is '1,x'"),
        (["--weights", "1,5000"], "a weight is a number from -1000 to 1000"),
        (["--strategy", "ties"], "ties needs --density"),
        (["--strategy", "slerp", "--density", "0.5"], "The merge is invalid"),
        (["--strategy", "ties", "--density", "0"], "The merge is invalid"),
        (["--strategy", "ties", "--density", "0.5", "--rank", "2"], "--rank has no effect on ties"),
        (["--density", "0.5"], "--density has no effect on a linear merge"),
        (["--rank", "0"], "--rank is 0"),
        (["--strategy", "ties", "--density", "0.5"], "need equal ranks"),
    ],
    ids=str,
)
def test_what_does_not_merge(folders: dict[str, str], tmp_path: Path, flags: list[str], said: str) -> None:
    done = here("merge", folders["a"], folders["c"], "-o", str(tmp_path / "out"), *flags)
    assert done.returncode == 1 and said in " ".join(done.stderr.split()), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_kept(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    for command in (["merge", folders["a"], folders["b"]], ["fold", folders["base"], folders["a"]]):
        done = here(*command, "-o", str(tmp_path / "kept"))
        assert done.returncode == 1 and "exists; name a new folder" in " ".join(done.stderr.split()), done.stderr
    done = here("fold", folders["base"], str(tmp_path), "-o", str(tmp_path / "out"))
    assert done.returncode != 0 and not (tmp_path / "out").exists()


def test_text_files_are_copied_where_the_adapters_agree(folders: dict[str, str], tmp_path: Path) -> None:
    made = {name: tmp_path / name for name in ("a", "b", "c")}
    for name, folder in made.items():
        shutil.copytree(folders[name], folder)
    for name in ("a", "b"):
        (made[name] / "chat_template.jinja").write_text("own")
    done = here("merge", *map(str, made.values()), "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "other adapters have no such files" in " ".join(done.stderr.split())
    assert (tmp_path / "out/chat_template.jinja").read_text() == "own"
    (made["c"] / "chat_template.jinja").write_text("another")
    done = here("merge", *map(str, made.values()), "-o", str(tmp_path / "none"))
    assert done.returncode == 1 and "have different files chat_template.jinja" in " ".join(done.stderr.split())
    assert not (tmp_path / "none").exists()
    done = here("fold", folders["base"], str(made["a"]), "-o", str(tmp_path / "folded"))
    assert done.returncode == 0 and "chat_template.jinja are not copied" in " ".join(done.stderr.split()), done.stderr
