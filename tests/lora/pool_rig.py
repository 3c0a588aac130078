"""A pool on real adapters, a real budget and a real loader; the executable is a table that keeps what it was given."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inline_loader import InlineLoader
from invariants import check_budget
from lora_bases import llama_sites

from truffula.engine.budget import MemoryBudget
from truffula.errors import KernelError, TruffulaError
from truffula.kernels.backend import AdapterImage
from truffula.lora.pool import AdapterPool, AdapterStatus
from truffula.lora.worker import Setup
from truffula.testing.adapters import write_tiny_adapter
from truffula.types import AdapterCommand, AdapterRef, AdapterState


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """Slots of an executable. ``refuse`` holds generations it will not take; ``slow``: uploads wait for ``finish``."""

    def __init__(self) -> None:
        self.images: dict[int, AdapterImage] = {}
        self.refuse: set[str] = set()
        self.slow = False
        self.uploading: set[int] = set()
        self.num_uploads = 0

    def adapter_bytes(self, image: AdapterImage) -> int:
        return 0

    def adapter(self, image: AdapterImage) -> int:
        if image.generation in self.refuse:
            raise KernelError("it does not fit")
        slot = next(n for n in range(len(self.images) + 1) if n not in self.images)
        self.images[slot] = image
        self.num_uploads += 1
        if self.slow:
            self.uploading.add(slot)
        return slot

    def adapter_ready(self, slot: int) -> bool:
        return slot not in self.uploading

    def finish(self) -> None:
        self.uploading.clear()

    def drop_adapter(self, slot: int) -> None:
        assert slot not in self.uploading, "dropped during its upload"
        del self.images[slot]


@dataclass(frozen=True)
class Answer:
    states: list[AdapterState]
    error: TruffulaError | None


class Rig:
    def __init__(self, folder: Path, limit: int = 1 << 20, mapped: int | None = None, **options: Any) -> None:
        self.folder = folder
        self.clock = Clock()
        self.table = Table()
        self.budget = MemoryBudget(limit)
        made: dict[str, Any] = {"offline": True, "cache_dir": str(folder / "hub")} | options
        setup = Setup(sites=llama_sites(), model="tiny-base", **made)
        self.loader = InlineLoader(setup, staging_roots=[folder])
        self.pool = AdapterPool(self.table, self.loader, self.budget, self.clock, mapped_limit=mapped)

    def write(self, name: str, seed: int = 0, rank: int = 4) -> AdapterRef:
        write_tiny_adapter(self.folder / name, llama_sites(), seed=seed, rank=rank)
        return self.ref(name, f"{seed}/{rank}")

    def ref(self, name: str, fingerprint: str = "") -> AdapterRef:
        return AdapterRef(name=name, locator=str(self.folder / name), fingerprint=fingerprint)

    def lookup(self, ref: AdapterRef) -> AdapterStatus:
        return self.pool.lookup(ref, self.clock.now)

    def poll(self, times: int = 1) -> None:
        """Polls as an engine makes them, a moment apart."""
        for _ in range(times):
            self.clock.now += 0.001
            self.pool.poll(self.clock.now)
            self.check()

    def loaded(self, ref: AdapterRef) -> str:
        """The generation of ``ref``, loaded if need be."""
        while (status := self.lookup(ref)).status == "loading":
            self.poll()
        assert status.generation is not None, status.error
        return status.generation

    def becomes_ready(self, ref: AdapterRef, polls: int = 6) -> bool:
        """Whether a request that waits for ``ref`` gets it within some steps."""
        for _ in range(polls):
            if self.lookup(ref).status == "ready":
                return True
            self.poll()
        return False

    def resident(self, ref: AdapterRef) -> str:
        """The generation of ``ref``, made resident without a lease that stays."""
        generation = self.loaded(ref)
        self.poll()
        lease = self.pool.acquire(generation)
        assert lease is not None
        self.pool.release(lease)
        return generation

    def command(self, action: str, ref: AdapterRef, **fields: bool) -> Future[list[AdapterState]]:
        return self.pool.command(AdapterCommand(action=action, ref=ref, **fields), self.clock.now)  # type: ignore[arg-type]

    def load(self, ref: AdapterRef, **fields: bool) -> Answer:
        """The answer to a load command, as an engine gives it that has no requests."""
        command = self.command("load", ref, **fields)
        for _ in range(20):
            if command.done():
                break
            self.clock.now += 0.001
            self.pool.poll(self.clock.now, idle=True)
            self.check()
        error = command.exception()
        assert error is None or isinstance(error, TruffulaError)
        return Answer([] if error else command.result(), error)

    def unload(self, ref: AdapterRef) -> bool:
        return self.command("unload", ref).exception() is None

    def staged(self) -> list[Path]:
        return [path for folder in self.loader.staging.folders for path in folder.iterdir()]

    def check(self) -> None:
        self.pool.check()
        check_budget(self.budget)
        assert self.pool.resident == len(self.table.images)
        assert self.staged() == []


def cached(cache: Path, repo: str, folder: Path, commit: str = "0" * 40) -> None:
    """The files of ``folder`` as huggingface_hub keeps them: a snapshot of links into blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = root / "blobs" / str(number)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)


@contextmanager
def rig(folder: Path, limit: int = 1 << 20, mapped: int | None = None, **options: Any) -> Iterator[Rig]:
    made = Rig(folder, limit, mapped, **options)
    try:
        yield made
    finally:
        made.pool.close()
        assert made.budget.used("adapters") == 0 and made.table.images == {}
        assert not any(path.exists() for path in made.loader.staging.folders)
