"""A pool on real adapters, a real budget and a real loader; the executable is a table that keeps what it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_bases import llama_sites

from truffula.engine.budget import MemoryBudget
from truffula.errors import KernelError
from truffula.kernels.backend import AdapterImage
from truffula.lora.leases import Want
from truffula.lora.pool import AdapterPool
from truffula.lora.spool import Spool
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.loading import InlineLoader
from truffula.types import AdapterRef


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """Slots of an executable. ``refuse`` holds generations it will not take."""

    def __init__(self) -> None:
        self.images: dict[int, AdapterImage] = {}
        self.refuse: set[str] = set()

    def adapter_bytes(self, image: AdapterImage) -> int:
        return 0

    def adapter(self, image: AdapterImage) -> int:
        if image.generation in self.refuse:
            raise KernelError("it does not fit")
        slot = next(n for n in range(len(self.images) + 1) if n not in self.images)
        self.images[slot] = image
        return slot

    def drop_adapter(self, slot: int) -> None:
        del self.images[slot]


class Rig:
    def __init__(self, folder: Path, limit: int = 1 << 20, spare: int | None = None) -> None:
        self.folder = folder
        self.clock = Clock()
        self.table = Table()
        self.budget = MemoryBudget(limit)
        self.spool = Spool([folder])
        self.loader = InlineLoader(
            llama_sites(), model="tiny-base", spool=self.spool, offline=True, cache_dir=folder / "hub"
        )
        self.pool = AdapterPool(self.table, self.loader, self.budget, self.clock, spare_bytes=spare)

    def write(self, name: str, seed: int = 0, rank: int = 4) -> AdapterRef:
        write_tiny_adapter(self.folder / name, llama_sites(), seed=seed, rank=rank)
        return self.ref(name, f"{seed}/{rank}")

    def ref(self, name: str, fingerprint: str = "") -> AdapterRef:
        return AdapterRef(name=name, locator=str(self.folder / name), fingerprint=fingerprint)

    def want(self, ref: AdapterRef) -> Want:
        return self.pool.want(ref, self.clock.now)

    def poll(self, times: int = 1) -> None:
        for _ in range(times):
            self.pool.poll(self.clock.now)
            self.check()

    def loaded(self, ref: AdapterRef) -> str:
        """The generation of ``ref``, loaded if need be."""
        self.want(ref)
        while self.want(ref).status == "loading":
            self.poll()
        want = self.want(ref)
        assert want.generation is not None, want.error
        return want.generation

    def spooled(self) -> list[Path]:
        return [path for folder in self.spool.folders for path in folder.iterdir() if path.name != "lock"]

    def check(self) -> None:
        self.pool.check()
        self.budget.check()
        assert self.pool.resident == len(self.table.images)
        assert self.spooled() == []


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
def rig(folder: Path, limit: int = 1 << 20, spare: int | None = None) -> Iterator[Rig]:
    made = Rig(folder, limit, spare)
    try:
        yield made
    finally:
        made.pool.close()
        assert made.budget.used("adapters") == 0 and made.table.images == {}
        assert not any(path.exists() for path in made.spool.folders)
