"""The model's files change under a server: no answer comes from other weights, by the running engine or the next."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from following import Answer, ask, eventually, fold, follow, run, tiny_engine
from msgspec.structs import replace

from truffula.engine.build import build_engine
from truffula.engine.client import EngineClient
from truffula.engine.inline import InlineClient
from truffula.errors import CheckpointChanged
from truffula.service.files import texts_of
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint
from truffula.types import EngineInfo, EngineRequest
from truffula.weights.watch import stamp

Start = Callable[..., EngineClient]
WEIGHTS = "model.safetensors"
LAST = "r19"


def one_after_another() -> list[EngineRequest]:
    """Work for much longer than the second in which a change is noticed, however fast steps are (with one row each)."""
    return [ask(f"r{number}", [3, 4, 5], max_tokens=4000, ignore_eos=True) for number in range(20)]


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same shapes, other weights, in a file of the same size."""
    write_tiny_checkpoint(tmp_path / "other", tiny_llama_config(max_position_embeddings=4096), seed=4, dtype="float32")
    return tmp_path / "other"


def kill(client: EngineClient) -> None:
    os.kill(client.pid, signal.SIGKILL)  # type: ignore[attr-defined]


def lost(client: EngineClient) -> CheckpointChanged:
    error = eventually(client.fatal_error, "it is given up")
    assert isinstance(error, CheckpointChanged)
    return error


def test_after_a_death_other_weights_do_not_answer_in_the_models_name(start: Start, model: Path, other: Path):
    client = start("process", model=model)
    expected = run(client, [ask("a", [3, 4, 5])])["a"].token_ids
    (other / WEIGHTS).replace(model / WEIGHTS)
    assert run(client, [ask("b", [3, 4, 5])])["b"].token_ids == expected, "the running engine keeps what it has mapped"
    client.submit([ask("open", [3], max_tokens=4000, ignore_eos=True)])
    kill(client)
    answer = follow(client, ["open"])["open"]
    assert (answer.finish, answer.code) == ("error", "engine_died")
    error = lost(client)
    assert str(model / WEIGHTS) in error.message and "Restart the server" in error.message
    assert "rename" not in error.message, "a rename is what happened: no advice to do it"
    late = run(client, [ask("late", [3])])["late"]
    assert (late.finish, late.code) == ("error", "checkpoint_changed")
    assert not client.alive()


def remove(model: Path) -> None:
    shutil.rmtree(model)


def rewrite_config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace("}", " }", 1))


def add_defaults(model: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": 5}')


@pytest.mark.parametrize("change", [remove, rewrite_config, add_defaults], ids=lambda c: c.__name__)
def test_other_changes_of_the_folder_are_refused_by_name(start: Start, model: Path, change: Callable[[Path], None]):
    client = start("process", model=model)
    change(model)
    kill(client)
    assert str(model) in lost(client).message


def test_a_link_that_points_elsewhere_since_is_another_model(start: Start, tmp_path: Path, model: Path, other: Path):
    link = tmp_path / "link"
    link.symlink_to(model)
    client = start("process", model=link)
    link.unlink()
    link.symlink_to(other)
    kill(client)
    lost(client)


@pytest.mark.parametrize("transport", ["inline", "process"])
def test_weights_overwritten_in_place_end_the_engine(start: Start, model: Path, other: Path, transport: str):
    client = start(transport, model=model, max_running=1)
    client.submit(one_after_another())
    answers: dict[str, Answer] = {}
    eventually(lambda: fold(answers, client.events(0.1)) or answers, "the first token")
    with (model / WEIGHTS).open("r+b") as file:  # without cutting it: who has a cut file mapped is killed by SIGBUS
        file.write((other / WEIGHTS).read_bytes())
    answer = follow(client, [LAST], answers)[LAST]
    assert (answer.finish, answer.code) == ("error", "checkpoint_changed")
    error = lost(client)
    assert "overwritten" in error.message and str(model / WEIGHTS) in error.message


def test_weights_cut_short_end_the_engine_by_a_signal_or_an_error_and_there_is_no_next(start: Start, model: Path):
    client = start("process", model=model, max_running=1)
    client.submit(one_after_another())
    eventually(lambda: client.events(0.1), "the first token")
    os.truncate(model / WEIGHTS, 0)
    assert follow(client, [LAST])[LAST].code in ("engine_died", "checkpoint_changed")
    lost(client)


def build_while(model: Path, change: Callable[[], object]) -> tuple[EngineInfo, list[int]]:
    """Start an engine and make ``change`` when its loading begins; what it is, and its answer."""
    stages: list[str] = []

    def tell(stage: str, done: int, total: int | None) -> None:
        stages.append(stage)
        if stages.count("loading weights") == 1 and stage == "loading weights":
            change()

    client = InlineClient(tiny_engine(model), tell)
    try:
        assert "loading weights" in stages
        return client.info, run(client, [ask("a", [3, 4, 5])])["a"].token_ids
    finally:
        client.close()


def test_a_rename_while_the_model_is_loaded_is_no_change(model: Path, other: Path):
    before = stamp(model / WEIGHTS)
    _, expected = build_while(model, lambda: None)
    info, answer = build_while(model, lambda: (other / WEIGHTS).replace(model / WEIGHTS))
    assert answer == expected, "what was opened is what was loaded"
    loaded = [replace(item, sample="") for item in info.files]
    assert before in loaded and stamp(model / WEIGHTS) not in loaded


def touch(model: Path) -> None:
    for path in model.iterdir():
        os.utime(path)


@pytest.mark.parametrize("transport", ["inline", "process"])
def test_a_new_time_of_the_same_content_ends_nothing(start: Start, model: Path, transport: str):
    client = start(transport, model=model)
    expected = run(client, [ask("a", [3, 4, 5])])["a"].token_ids
    touch(model)
    noticed = time.monotonic() + 1.5  # a running engine looks at its files once a second
    for number in itertools.count():
        assert run(client, [ask(f"r{number}", [3, 4, 5])])[f"r{number}"].token_ids == expected
        if time.monotonic() > noticed:
            break
    assert client.fatal_error() is None
    if transport == "process":
        kill(client)
        eventually(lambda: client.restarts().count and client.alive(), "the engine is restarted")
    assert run(client, [ask("b", [3, 4, 5])])["b"].token_ids == expected


def test_a_write_while_the_model_is_loaded_is_refused(model: Path, other: Path):
    def write() -> None:
        with (model / WEIGHTS).open("r+b") as file:
            file.write((other / WEIGHTS).read_bytes())

    with pytest.raises(CheckpointChanged, match="changed while the model was loaded") as caught:
        build_while(model, write)
    assert str(model / WEIGHTS) in caught.value.message and "rename" not in caught.value.message


def test_the_texts_of_another_model_is_not_taken(model: Path):
    info, _ = build_while(model, lambda: None)
    texts_of(info)
    (model / "new.json").write_text((model / "config.json").read_text() + " ")
    (model / "new.json").replace(model / "config.json")
    with pytest.raises(CheckpointChanged, match="replaced while the model was loaded"):
        texts_of(info)


def test_a_restarted_engine_decides_nothing_anew(model: Path):
    config = tiny_engine(model, threads=None, memory_bytes=None)
    engine, info = build_engine(config)
    engine.close()
    first = replace(info, dtype="bfloat16", max_model_len=96, threads=1, memory_limit_bytes=2**26)
    engine, again = build_engine(config, None, first)
    engine.close()
    assert (again.dtype, again.max_model_len, again.files) == ("bfloat16", 96, info.files)
    assert (again.threads, again.memory_limit_bytes) == (1, 2**26)
    gone = replace(first, path=str(model / "nowhere"))
    with pytest.raises(Exception, match="nowhere"):
        build_engine(config, None, gone)
