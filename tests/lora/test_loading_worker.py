"""The loading worker process may be slow, killed or above its limits: only its own load is affected."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from inline_loader import InlineLoader
from kernel_backends import on_the_best
from llama_program import llama_program
from lora_bases import llama_sites, pairs, validate
from pool_rig import Clock, cached
from source_server import source_server

from fake_hub import NOTHING, environment, misbehaving_hub
from processes import running
from truffula.errors import AdapterError, AdapterLoadError
from truffula.kernels.adapters import AdapterLayout, Place, make_image
from truffula.kernels.backend import Backend
from truffula.lora.image import map_image
from truffula.lora.loading import IDLE_WORKER_S, MAX_DOWNLOADS, NICE, ORIGIN_DOWNLOADS, LoadingWorker
from truffula.lora.loads import AdapterLoads
from truffula.lora.peft import Matched
from truffula.lora.sources import AdapterDirectory
from truffula.lora.staging import PREFIX, Staging, remove_abandoned
from truffula.lora.worker import CHANGED_FILES_TRIES, LoadLimits, LoadRequest, LoadResponse, Setup, load
from truffula.testing.adapters import tiny_config, tiny_tensors, write_adapter, write_tiny_adapter
from truffula.types import AdapterRef

PATIENCE_S = 120.0  # for a busy machine; nothing here takes a hundredth of it

Make = Callable[..., LoadingWorker]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Loaders whose images pass through a folder of the test."""
    made: list[LoadingWorker] = []
    (tmp_path / "staging").mkdir()

    def build(max_workers: int = 3, clock: Callable[[], float] = time.monotonic, **options: Any) -> LoadingWorker:
        setup = Setup(sites=llama_sites(), model="tiny-base", **options)
        made.append(LoadingWorker(setup, max_workers=max_workers, clock=clock, staging_roots=[tmp_path / "staging"]))
        return made[-1]

    yield build
    for loader in made:
        pids = loader.pids()
        loader.close()
        assert not any(running(pid) for pid in pids)
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.fixture(scope="module")
def for_the_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoadingWorker, Path]]:
    """A loader with one worker for all tests that do not end it: most of a test would be the start of its own."""
    root = tmp_path_factory.mktemp("staging")
    made = LoadingWorker(Setup(sites=llama_sites(), model="tiny-base"), max_workers=1, staging_roots=[root])
    yield made, root
    made.close()
    assert list(root.iterdir()) == []


@pytest.fixture
def loader(for_the_file: tuple[LoadingWorker, Path]) -> Iterator[LoadingWorker]:
    made, root = for_the_file
    yield made
    for image in root.glob("*/*-*"):
        image.unlink()  # the caller, which maps an image, removes it; here there is none


def ref(folder: Path, kind: Any = "local", **fields: Any) -> AdapterRef:
    return AdapterRef(name=folder.name, kind=kind, locator=str(folder), **fields)


def adapter(folder: Path, seed: int = 0) -> AdapterRef:
    return ref(write_tiny_adapter(folder, llama_sites(), seed=seed))


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``."""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.002)
    return value


def collect(loader: LoadingWorker, count: int) -> dict[int, LoadResponse]:
    results: dict[int, LoadResponse] = {}

    def polled() -> bool:
        results.update({result.ticket: result for result in loader.poll()})
        return len(results) >= count

    until(polled, f"{count} loads")
    return results


def one(loader: LoadingWorker) -> LoadResponse:
    (result,) = collect(loader, 1).values()
    return result


def begun(loader: LoadingWorker) -> int:
    """The only worker, which is begun by a load."""
    if not loader.pids():
        loader.start(AdapterRef(name="nothing", kind="local", locator="/no/such/folder"))
        assert one(loader).error is not None
    (pid,) = loader.pids()
    return pid


def stop(loader: LoadingWorker) -> int:
    """Freeze the only worker: what it is given next, it will not do."""
    pid = begun(loader)
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_an_adapter_is_validated_and_written_in_another_process(loader: LoadingWorker, tmp_path: Path) -> None:
    ticket = loader.start(adapter(tmp_path / "a"))
    result = one(loader)
    assert (
        result.ticket == ticket and result.error is None and result.image_path is not None and result.image is not None
    )
    image = map_image(Path(result.image_path), result.image)
    expected = validate(tmp_path / "a")
    assert image.generation == expected.generation
    assert (image.rank, image.nbytes) == (4, Path(result.image_path).stat().st_size)
    for mine, other in zip(pairs(image.sites()), pairs(expected.sites), strict=True):
        assert (mine.site, mine.scale) == (other.site, other.scale)
        assert np.array_equal(mine.a, other.a) and np.array_equal(mine.b, other.b)
    (pid,) = loader.pids()
    assert pid != os.getpid() and os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + NICE
    assert os.getsid(pid) == os.getsid(0), "Linux may share the processors out by sessions"
    assert os.getpgid(pid) != os.getpgid(0), "a terminal's Ctrl-C is the engine's alone"
    Path(result.image_path).unlink()


@on_the_best
def test_the_worker_packs_for_the_engines_kernels(make: Make, tmp_path: Path, backend: Backend) -> None:
    """Table and data are, byte for byte, those that a packer in this process makes."""
    places = tuple(
        Place(site.module, site.id, site.in_features, site.out_features, kind=site.kind) for site in llama_sites()
    )
    layout = AdapterLayout(backend.adapter_layout(llama_program()).storage, places)
    loader = make(layout=layout)
    loader.start(adapter(tmp_path / "a"))
    result = one(loader)
    assert result.error is None and result.image_path is not None and result.image is not None
    image = map_image(Path(result.image_path), result.image)
    own = make_image(layout, validate(tmp_path / "a").sites, generation=image.generation)
    assert image.layout == layout.name
    assert np.array_equal(image.table, own.table) and np.array_equal(image.data, own.data)
    Path(result.image_path).unlink()


def test_the_worker_imports_no_framework() -> None:
    code = "import sys, truffula.lora.worker; print([m for m in sys.modules if m.partition('.')[0] in sys.argv[1:]])"
    heavy = ["torch", "transformers", "peft", "huggingface_hub", "fastapi"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_workers_begin_with_the_first_load_and_all_but_one_end_when_idle(make: Make, tmp_path: Path) -> None:
    clock = Clock()
    loader = make(clock=clock)
    assert loader.pids() == []
    first = stop(loader)
    waiting = loader.start(adapter(tmp_path / "a"))
    other = loader.start(adapter(tmp_path / "b"))
    assert set(collect(loader, 1)) == {other}  # by a second worker
    os.kill(first, signal.SIGCONT)
    assert set(collect(loader, 1)) == {waiting}
    clock.now += IDLE_WORKER_S + 1
    assert loader.poll() == [] and len(loader.pids()) == 1
    until(lambda: not running(first), "the end of the idle worker")
    clock.now += IDLE_WORKER_S + 1
    assert loader.poll() == [] and len(loader.pids()) == 1
    for image in (tmp_path / "staging").glob("*/*-*"):
        image.unlink()


def test_a_refusal_comes_back_as_it_was_raised(loader: LoadingWorker, tmp_path: Path) -> None:
    loader.start(ref(write_tiny_adapter(tmp_path / "a", llama_sites(), use_dora=True)))
    error = one(loader).error
    assert error is not None and (error.code, error.param) == (AdapterError.code, "use_dora")


def test_a_refusal_names_a_file_whose_name_is_no_text(loader: LoadingWorker, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / os.fsdecode(b"\xff.gguf")).touch()
    loader.start(ref(tmp_path / "a"))
    error = one(loader).error
    assert error is not None and error.code == AdapterError.code and r"\udcff.gguf" in error.message
    assert loader.pids() != []


def test_a_message_that_quotes_a_long_text_is_cut(tmp_path: Path) -> None:
    """Of a tensor's dtype and of its name: clients and logs get a paragraph."""
    folder = write_tiny_adapter(tmp_path / "long", llama_sites())
    for entry in ({"x": {"dtype": "X" * 100_000, "shape": [0], "data_offsets": [0, 0]}}, {"y" * 100_000: 1}):
        header = json.dumps(entry).encode()
        (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        error = load(LoadRequest(ticket=1, ref=ref(folder)), Setup(sites=llama_sites(), model="tiny-base"), []).error
        assert error is not None and error.code == "adapter_invalid"
        assert 100 < len(error.message) < 5000


def test_a_load_whose_worker_is_killed_from_outside_is_tried_again(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("truffula"), "propagate", True)  # whatever a server set up in this process
    loader = make(max_workers=1)
    pid = stop(loader)
    tickets = [loader.start(adapter(tmp_path / name, seed)) for seed, name in enumerate("abc")]
    os.kill(pid, signal.SIGKILL)
    results = collect(loader, 3)
    assert all(results[ticket].error is None for ticket in tickets)
    assert loader.pids() != [pid]
    logged = next(r for r in caplog.records if r.name == "truffula.lora.loading")
    said = logged.getMessage()
    assert logged.levelname == "ERROR" and f"loading worker {pid} died" in said and "SIGKILL" in said and "'a'" in said


def test_an_adapter_that_two_workers_died_with_fails_and_no_other_does(make: Make, tmp_path: Path) -> None:
    loader = make(max_workers=1)
    pid = stop(loader)
    first, *others = [loader.start(adapter(tmp_path / name, seed)) for seed, name in enumerate("abc")]
    os.kill(pid, signal.SIGKILL)
    (second,) = until(lambda: loader.poll() or [one for one in loader.pids() if one != pid], "another worker")
    os.kill(second, signal.SIGKILL)  # it has just started: the load is with it
    results = collect(loader, 3)
    error = results[first].error
    assert error is not None and error.code == AdapterLoadError.code and "SIGKILL" in error.message
    assert all(results[ticket].error is None for ticket in others)


def test_a_load_that_takes_too_long_is_ended_and_the_rest_go_on(make: Make, tmp_path: Path) -> None:
    clock = Clock()
    loader = make(max_workers=1, clock=clock, limits=LoadLimits(wall_s=30))
    loader.start(adapter(tmp_path / "warm"))
    one(loader)
    pid = stop(loader)
    slow, fine = loader.start(adapter(tmp_path / "a")), loader.start(adapter(tmp_path / "b"))
    clock.now += 29
    assert loader.poll() == []
    clock.now += 2
    results = collect(loader, 2)
    error = results[slow].error
    assert error is not None and "30 s" in error.message and error.code == AdapterLoadError.code
    assert results[fine].error is None
    until(lambda: loader.poll() or not running(pid), "the end of the slow worker")


def test_a_blocked_source_does_not_hold_up_the_others(make: Make, tmp_path: Path) -> None:
    loader = make(max_workers=2)
    pid = stop(loader)
    blocked = loader.start(adapter(tmp_path / "a"))
    others = [loader.start(adapter(tmp_path / name)) for name in "bcd"]
    assert set(collect(loader, 3)) == set(others)
    os.kill(pid, signal.SIGCONT)
    assert set(collect(loader, 1)) == {blocked}


def test_a_slow_source_delays_neither_local_adapters_nor_other_sources(make: Make, tmp_path: Path) -> None:
    loader = make(max_workers=1, adapter_cache=str(tmp_path / "cache"))
    with source_server() as slow, source_server() as other:
        folder = write_tiny_adapter(tmp_path / "a", llama_sites())
        directory = AdapterDirectory(allow_source=(f"{slow.url}/*", f"{other.url}/*"))
        named = [directory.resolve(slow.put(f"a{n}", folder)) for n in range(6)]
        slow.hangs.update(f"/a{n}/adapter_config.json" for n in range(6))
        waiting = {loader.start(one) for one in named if one is not None}
        elsewhere = directory.resolve(other.put("a", folder))
        assert elsewhere is not None
        quick = {loader.start(elsewhere), loader.start(ref(folder))}
        assert set(collect(loader, 2)) == quick
        assert len(loader.pids()) <= ORIGIN_DOWNLOADS + 2
        slow.go.set()
        assert set(collect(loader, 6)) == waiting


def test_hung_sources_leave_a_download_to_every_other(make: Make, tmp_path: Path) -> None:
    """Two that hang have taken all shared workers; a third source, and a fourth, are still read."""
    loader = make(max_workers=1, adapter_cache=str(tmp_path / "cache"))
    with ExitStack() as stack:
        servers = [stack.enter_context(source_server()) for _ in range(4)]
        folder = write_tiny_adapter(tmp_path / "a", llama_sites())
        directory = AdapterDirectory(allow_source=tuple(f"{one.url}/*" for one in servers))
        waiting = set()
        for hung in servers[:2]:
            named = [directory.resolve(hung.put(f"a{n}", folder)) for n in range(ORIGIN_DOWNLOADS + 1)]
            hung.hangs.update(f"/a{n}/adapter_config.json" for n in range(len(named)))
            waiting |= {loader.start(one) for one in named if one is not None}
        assert len(loader.pids()) == MAX_DOWNLOADS
        for other in servers[2:]:
            ref = directory.resolve(other.put("a", folder))
            assert ref is not None
            quick = loader.start(ref)
            assert set(collect(loader, 1)) == {quick}
        assert len(loader.pids()) == MAX_DOWNLOADS + 1, "one worker for both, after each other"
        for hung in servers[:2]:
            hung.go.set()
        assert set(collect(loader, len(waiting))) == waiting


def test_computing_for_too_long_ends_the_worker(make: Make, tmp_path: Path) -> None:
    config = tiny_config(rank=4, alpha=8, targets=["q_proj", "v_proj"])
    slow = {"(" + "(.*l)*(.*p)*(.*r)*" * 60 + f")*z{n}": 3 for n in range(60)}  # seconds, within the steps allowed
    write_adapter(tmp_path / "a", config | {"alpha_pattern": slow}, tiny_tensors(llama_sites(), config))
    loader = make(limits=LoadLimits(cpu_s=0.2))
    loader.start(ref(tmp_path / "a"))
    error = one(loader).error
    assert error is not None and error.code == AdapterLoadError.code and "0.2 s of computing (--ad" in error.message
    loader.start(adapter(tmp_path / "b"))
    assert one(loader).error is None


def test_needing_too_much_memory_is_an_error_of_that_adapter(make: Make, tmp_path: Path) -> None:
    config = tiny_config(rank=4, alpha=8, targets=["q_proj", "v_proj"])
    greedy = config | {"alpha_pattern": {f"p{n}": 1.5 for n in range(120_000)}}
    write_adapter(tmp_path / "a", greedy, tiny_tensors(llama_sites(), config))
    loader = make(limits=LoadLimits(memory_bytes=12 << 20))
    loader.start(ref(tmp_path / "a"))
    error = one(loader).error
    assert error is not None and error.code == AdapterLoadError.code and str(12 << 20) in error.message
    loader.start(adapter(tmp_path / "b"))
    assert one(loader).error is None


def test_a_cancelled_load_never_answers_and_leaves_no_file(make: Make, tmp_path: Path) -> None:
    loader = make(max_workers=1)
    pid = stop(loader)
    loads = AdapterLoads(loader, failure_ttl_s=10.0)
    for name in ("running", "queued", "last"):
        loads.begin(adapter(tmp_path / name))
    assert [source[1] for name in ("running", "queued") for source in loads.cancel(name)] == [
        str(tmp_path / "running"),
        str(tmp_path / "queued"),
    ]
    os.kill(pid, signal.SIGCONT)

    def next_response() -> tuple[AdapterRef, LoadResponse] | None:
        loads.poll(0.0, paused=False)
        return loads.next_response()

    ended, response = until(next_response, "a load")
    assert ended.name == "last" and response.image_path is not None
    (folder,) = (tmp_path / "staging").iterdir()
    assert [str(path) for path in folder.iterdir()] == [response.image_path]
    Path(response.image_path).unlink()


def test_a_worker_that_cannot_start_is_reported_with_its_output(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    loader = make()
    loader.start(adapter(tmp_path / "a"))
    error = one(loader).error
    assert error is not None and "status 3" in error.message and "no such module" in error.data["stderr"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    loader.start(adapter(tmp_path / "b"))
    error = one(loader).error
    assert error is not None and "can be started" in error.message


def test_a_hub_that_fails_ends_the_load_and_not_the_worker(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not reached, and an answer that the Hub's library falls over: the first is said, the second is logged too."""
    for name, value in environment(NOTHING).items():
        monkeypatch.setenv(name, value)
    loader = make()
    loader.start(AdapterRef(name="a", kind="hub", locator="org/nope"))
    error = one(loader).error
    assert error is not None and error.code == "adapter_load_failed" and "cannot be reached" in error.message
    (pid,) = loader.pids()
    loader.start(adapter(tmp_path / "b"))
    result = one(loader)
    assert result.error is None and result.image_path is not None and loader.pids() == [pid]
    Path(result.image_path).unlink()
    assert caplog.text == ""

    with misbehaving_hub() as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        other = make()
        other.start(AdapterRef(name="c", kind="hub", locator="org/list"))
        error = one(other).error
        assert error is not None and "failed unexpectedly (" in error.message
        assert len(other.pids()) == 1 and running(*other.pids())
    assert "loading adapter 'c' failed unexpectedly" in caplog.text and "Traceback" in caplog.text


def test_closing_ends_workers_that_hang(make: Make, tmp_path: Path) -> None:
    loader = make()
    loader.start(adapter(tmp_path / "a"))
    stop(loader)
    loader.close()  # the fixture looks for processes and files
    assert loader.poll() == []


@pytest.mark.parametrize("loads", [True, False], ids=["after a load", "while the worker starts"])
def test_an_engine_killed_leaves_neither_worker_nor_files(tmp_path: Path, loads: bool) -> None:
    program = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from lora_bases import llama_sites
from truffula.lora.loading import LoadingWorker
from truffula.lora.worker import Setup
from truffula.types import AdapterRef
loader = LoadingWorker(Setup(sites=llama_sites(), model="x"), staging_roots=[Path({str(tmp_path)!r})])
loader.start(AdapterRef(name="a", locator={str(tmp_path / "a")!r}))
while {loads} and not loader.poll():
    time.sleep(0.002)
print(loader.pids()[0], flush=True)
time.sleep(600)
"""
    adapter(tmp_path / "a")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
        assert list(tmp_path.glob(f"{PREFIX}*"))
        engine.kill()
    until(lambda: not running(pid), "the end of the worker")
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def test_an_engine_without_a_load_makes_no_staging_folder(make: Make, tmp_path: Path) -> None:
    """So one that is killed leaves none."""
    loader = make()
    assert list((tmp_path / "staging").iterdir()) == []
    loader.start(adapter(tmp_path / "a"))
    assert len(list((tmp_path / "staging").iterdir())) == 1
    one(loader)


def test_staging_folders_of_ended_engines_are_removed_and_others_are_not(make: Make, tmp_path: Path) -> None:
    root = tmp_path / "staging"
    running_engine, ended = Staging([root]), root / f"{PREFIX}ended"
    ended.mkdir()
    (ended / "1-image").touch()
    begun(make())  # its worker
    assert not ended.exists() and running_engine.folders[0].exists()
    assert not remove_abandoned(running_engine.folders[0])
    running_engine.close()
    running_engine.close()


def test_inline_loading_gives_the_same_image(make: Make, tmp_path: Path) -> None:
    loader = make()
    inline = InlineLoader(Setup(sites=llama_sites(), model="tiny-base"), staging_roots=[tmp_path / "staging"])
    inline.start(adapter(tmp_path / "a"))
    inline.cancel(inline.start(adapter(tmp_path / "a")))
    loader.start(ref(tmp_path / "a"))
    (mine,), other = inline.poll(), one(loader)
    assert mine.image_path is not None and other.image_path is not None
    assert Path(mine.image_path).read_bytes() == Path(other.image_path).read_bytes()
    assert inline.poll() == []
    inline.close()


def test_parts_that_the_bases_kernels_do_not_serve_are_a_fault_of_the_adapter(tmp_path: Path) -> None:
    """As a changed weight of the keys and values of latent attention."""
    places = tuple(
        Place(site.module, site.id, site.in_features, site.out_features, kind="norm") for site in llama_sites()
    )
    setup = Setup(sites=llama_sites(), model="x", layout=AdapterLayout("float32", places))
    refused = load(LoadRequest(ticket=1, ref=adapter(tmp_path / "a")), setup, [tmp_path]).error
    assert refused is not None and refused.code == AdapterError.code and refused.param == "low_rank"
    assert "no kernel serves the adapter part 'low_rank'. Merge it into its base" in refused.message


@pytest.mark.parametrize("times", [1, CHANGED_FILES_TRIES])
def test_a_folder_that_changes_while_it_is_read_is_read_again(tmp_path: Path, times: int) -> None:
    """The bytes that are hashed, validated and copied must be the same; files that change all the time are refused."""
    request = LoadRequest(ticket=1, ref=adapter(tmp_path / "a", seed=1))
    staging = Staging([tmp_path])
    setup = Setup(sites=llama_sites(), model="x")
    reads: list[int] = []

    def replace(nbytes: int) -> None:
        reads.append(nbytes)
        if len(reads) <= times:
            adapter(tmp_path / "a", seed=1 + len(reads))

    result = load(request, setup, staging.folders, on_files=replace)
    if times == 1:
        adapter(tmp_path / "alone", seed=2)
        alone = load(LoadRequest(ticket=2, ref=ref(tmp_path / "alone")), setup, staging.folders)
        assert result.image is not None and alone.image is not None
        assert result.image.generation == alone.image.generation and len(reads) == 2
        assert len(list(staging.folders[0].iterdir())) == 2
    else:
        assert result.error is not None and result.error.code == AdapterLoadError.code
        assert "changed while they were read" in result.error.message and len(reads) == CHANGED_FILES_TRIES
        assert list(staging.folders[0].iterdir()) == []
        assert load(request, setup, staging.folders).error is None
    staging.close()


def test_a_worker_that_was_prepared_takes_the_first_load(make: Make, tmp_path: Path) -> None:
    loader = make(layout=AdapterLayout("panels"))
    loader.prepare()
    loader.prepare()
    (pid,) = loader.pids()
    loader.start(ref(tmp_path / "absent"))
    assert one(loader).error is not None and loader.pids() == [pid]


def test_adapters_of_one_recipe_are_matched_once_and_keep_their_own_values(tmp_path: Path) -> None:
    """The same metadata with other values, other metadata with the same values, and files that are wrong."""
    setup, matched, staging = Setup(sites=llama_sites(), model="tiny-base"), Matched(), Staging([tmp_path])

    def loaded(folder: Path, matched: Matched | None) -> tuple[bytes, LoadResponse]:
        response = load(LoadRequest(ticket=1, ref=ref(folder)), setup, staging.folders, matched)
        image = b"" if response.image_path is None else Path(response.image_path).read_bytes()
        for path in staging.folders[0].glob("*-*"):
            path.unlink()
        return image, msgspec.structs.replace(response, image_path=None, seconds=0.0)

    for number, options in enumerate(
        [{"seed": 1}, {"seed": 2}, {"seed": 1, "alpha": 3}, {"seed": 1, "rank": 2}, {"seed": 1, "targets": ["q_proj"]}]
    ):
        folder = write_tiny_adapter(tmp_path / str(number), llama_sites(), **options)
        assert loaded(folder, matched) == loaded(folder, None) and loaded(folder, matched)[0]
    with_nan = tmp_path / "0" / "adapter_model.safetensors"
    with_nan.write_bytes(with_nan.read_bytes()[:-4] + np.float32("nan").tobytes())
    (tmp_path / "1" / "added_tokens.json").write_text(json.dumps({"<new>": 10**6}))
    for number, why in ((0, "NaN"), (1, "added_tokens.json")):
        image, response = loaded(tmp_path / str(number), matched)
        assert image == b"" and response.error is not None and why in response.error.message
    staging.close()


def test_matched_metadata_is_kept_up_to_a_number_of_tensors(tmp_path: Path) -> None:
    setup, staging = Setup(sites=llama_sites(), model="tiny-base"), Staging([tmp_path])
    folders = [write_tiny_adapter(tmp_path / str(rank), llama_sites(), rank=rank) for rank in (1, 2, 3)]
    for most in (0, 8, 10**6):
        matched = Matched(most)
        for folder in [*folders, *folders]:
            response = load(LoadRequest(ticket=1, ref=ref(folder)), setup, staging.folders, matched)
            assert response.image_path is not None and response.image is not None
            assert response.image.rank == int(folder.name)
            Path(response.image_path).unlink()
    staging.close()


# ---- links that are put in place between the look-up and the worker's open (attack.md F6)


@pytest.mark.parametrize("swapped", ["folder", "adapter_model.safetensors", "adapter_config.json", "parent"])
def test_a_link_put_in_place_after_the_lookup_is_not_followed(
    loader: LoadingWorker, tmp_path: Path, swapped: str
) -> None:
    """The worker is frozen when the load is asked for, so the swap comes between look-up and open."""
    write_tiny_adapter(tmp_path / "outside" / "x", llama_sites(), seed=5)
    write_tiny_adapter(tmp_path / "served" / "real" / "x", llama_sites())
    (tmp_path / "served" / "x").symlink_to(Path("real") / "x")  # a link that stays inside is followed
    directory = AdapterDirectory(adapter_dir=tmp_path / "served")
    found = directory.resolve("x")
    assert found is not None
    loader.start(found)
    assert one(loader).error is None
    pid = stop(loader)
    loader.start(found)
    real = tmp_path / "served" / "real"
    name = {"folder": "x", "parent": ""}.get(swapped, f"x/{swapped}")
    (real / name).rename(tmp_path / "moved")
    target = tmp_path / "outside" / name
    (real / name).symlink_to(target if swapped != "folder" else Path("../../outside/x"))
    os.kill(pid, signal.SIGCONT)
    error = one(loader).error
    assert error is not None and error.code == AdapterError.code and "leads out" in error.message
    assert str(tmp_path) not in error.message


def test_a_link_inside_the_adapter_folder_is_followed(loader: LoadingWorker, tmp_path: Path) -> None:
    """To a folder, to a file, by a relative and by an absolute path."""
    write_tiny_adapter(tmp_path / "served" / "v1", llama_sites())
    mixed = tmp_path / "served" / "mixed"
    mixed.mkdir()
    (mixed / "adapter_config.json").symlink_to(Path("..") / "v1" / "adapter_config.json")
    (mixed / "adapter_model.safetensors").symlink_to(tmp_path / "served" / "v1" / "adapter_model.safetensors")
    (tmp_path / "served" / "latest").symlink_to("mixed")
    directory = AdapterDirectory(adapter_dir=tmp_path / "served")
    for name in ("mixed", "latest"):
        found = directory.resolve(name)
        assert found is not None
        loader.start(found)
    assert {result.image.generation for result in collect(loader, 2).values() if result.image} == {
        validate(tmp_path / "served/v1").generation
    }


# ---- the Hub's cache, offline


def test_an_adapter_in_the_hubs_cache_is_served_offline(make: Make, tmp_path: Path) -> None:
    write_tiny_adapter(tmp_path / "a", llama_sites())
    cached(tmp_path / "cache", "org/pirate", tmp_path / "a")
    loader = make(offline=True, cache_dir=str(tmp_path / "cache"))
    good = loader.start(AdapterRef(name="org/pirate", kind="hub", locator="org/pirate"))
    lacking = loader.start(AdapterRef(name="org/other", kind="hub", locator="org/other"))
    results = collect(loader, 2)
    assert results[good].image is not None and results[good].image.generation == validate(tmp_path / "a").generation
    assert results[good].commit == "0" * 40
    error = results[lacking].error
    assert error is not None and "offline" in error.message and str(tmp_path) not in error.message


def test_a_file_below_an_allowed_folder_that_is_a_link_out_of_it_is_refused(
    loader: LoadingWorker, tmp_path: Path
) -> None:
    write_tiny_adapter(tmp_path / "outside", llama_sites())
    folder = write_tiny_adapter(tmp_path / "allowed" / "x", llama_sites())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    found = AdapterDirectory(allow_local=(tmp_path / "allowed",)).resolve(str(folder), "local")
    assert found is not None
    loader.start(found)
    error = one(loader).error
    assert error is not None and (error.code, error.param) == (AdapterError.code, "adapter_model.safetensors")


@pytest.mark.slow  # five seconds of computing, as in test_loading_while_running
def test_a_hostile_pattern_ends_its_load_with_an_error_and_the_worker_lives(make: Make, tmp_path: Path) -> None:
    loader = make()
    pid = begun(loader)
    config = tiny_config(rank=4, alpha=8, targets=["q_proj"])
    tensors = tiny_tensors(llama_sites(), config)
    loader.start(ref(write_adapter(tmp_path / "hostile", {**config, "target_modules": r"(.|\w|.)*!"}, tensors)))
    hostile = one(loader)
    assert hostile.error is not None and "seconds to match" in hostile.error.message
    loader.start(adapter(tmp_path / "good"))
    good = one(loader)
    assert good.error is None and good.image_path is not None and loader.pids() == [pid]
    Path(good.image_path).unlink()
