"""What memory and CPUs we may use, and what fits into them: computed before anything is loaded.

The limit divides into a fixed part (weights, arena, logits, the scratch block) and a pool, which KV blocks and adapters
share by need (``engine/budget.py``). KV memory is touched when it is used, so a large pool costs nothing while idle.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from truffula.config import format_size
from truffula.engine.budget import MemoryBudget, Reclaimer
from truffula.errors import InsufficientMemory
from truffula.kernels.backend import MemoryPlan

DEFAULT_SHARE = 0.85
"""Of the memory that is free at the start: the rest is for the loading worker, the API process and the page cache."""
SHORTEST_USEFUL_TOKENS = 1024
"""A model length is lowered to what fits when none was asked for, but not below this (or the model's own)."""
_KIB = 1024


@dataclass(frozen=True)
class Offer:
    """Bytes we may use and who says so."""

    nbytes: int
    reason: str


@dataclass(frozen=True)
class MemoryFit:
    """How the limit is divided: ``pool_bytes`` is for adapters and KV; ``num_blocks`` counts the scratch block too."""

    limit_bytes: int
    reason: str
    fixed_bytes: int
    pool_bytes: int
    num_blocks: int
    max_model_len: int
    warnings: tuple[str, ...] = ()


def fit(
    plan: MemoryPlan,
    offer: Offer,
    *,
    model_len: int,
    asked_len: int | None,
    block_size: int,
    max_running: int,
) -> MemoryFit:
    """Divide ``offer``; at least one sequence of the model's length must fit.

    ``model_len`` is the model's longest, ``asked_len`` the operator's choice below it, if any. Without one, a length
    that does not fit is lowered to what does, with a warning.

    Raises:
        InsufficientMemory: The weights or the shortest useful sequence don't fit; with the numbers and the ways out.
    """
    block = plan.kv_block_bytes
    fixed = plan.total(1)
    pool = offer.nbytes - fixed
    wanted = asked_len or model_len
    least = wanted if asked_len is not None else min(wanted, SHORTEST_USEFUL_TOKENS)
    room = max(0, pool // block) if block else math.ceil(wanted / block_size) * max_running
    if room * block_size < least or pool < 0:
        raise _too_little(plan, offer, fixed, least, room * block_size, block_size)
    longest = min(wanted, room * block_size)
    warnings: tuple[str, ...] = ()
    if longest < wanted:
        warnings = (
            f"max_model_len is {longest} instead of {wanted}: {format_size(offer.nbytes)} ({offer.reason}) "
            f"have no room for more KV cache beside {format_size(fixed)} of weights and working memory.",
        )
    blocks = min(room, max_running * math.ceil(longest / block_size))
    return MemoryFit(offer.nbytes, offer.reason, fixed, pool, blocks + 1, longest, warnings)


def _too_little(
    plan: MemoryPlan, offer: Offer, fixed: int, least: int, holds: int, block_size: int
) -> InsufficientMemory:
    kv = math.ceil(least / block_size) * plan.kv_block_bytes
    ways = ["raise --memory" if offer.reason.startswith("--memory") else "free memory or raise the limit"]
    if holds >= 1:
        ways.append(f"--max-model-len {holds} (the longest that fits)")
    else:
        ways.append("a smaller model, or lower --step-tokens and --max-running")
    message = (
        f"Not enough memory: {format_size(fixed + kv)} are needed, but only {format_size(offer.nbytes)} may be used "
        f"({offer.reason}). Weights {format_size(plan.weight_bytes)}, working memory {format_size(plan.arena_bytes)}, "
        f"logits {format_size(plan.logits_bytes)}, KV cache of one sequence of {least} tokens {format_size(kv)}. "
        f"Ways out: {'; '.join(ways)}."
    )
    return InsufficientMemory(
        message, param="memory", needed_bytes=fixed + kv, limit_bytes=offer.nbytes, weight_bytes=plan.weight_bytes,
        arena_bytes=plan.arena_bytes, logits_bytes=plan.logits_bytes, kv_bytes=kv, max_model_len=least,
        longest_that_fits=holds,
    )  # fmt: skip


def offered(memory_bytes: int | None, root: Path = Path("/")) -> Offer:
    """What the operator gave, else ``DEFAULT_SHARE`` of what is free now."""
    if memory_bytes is not None:
        return Offer(memory_bytes, "--memory")
    free = available(root)
    return Offer(int(free.nbytes * DEFAULT_SHARE), f"{DEFAULT_SHARE:.0%} of {format_size(free.nbytes)} {free.reason}")


def available(root: Path = Path("/")) -> Offer:
    """Memory that can be had now without swapping: of the machine, or of a control group of ours when that has less."""
    offers = [_machine(root), *_groups(root)]
    return min(offers, key=lambda offer: offer.nbytes)


@dataclass(frozen=True)
class CpuLimits:
    """CPUs of the ``machine``, those of them in our ``affinity`` mask, and the smallest ``quota`` of a control group
    that holds us, in CPUs' worth of time; None where there is none."""

    machine: int
    affinity: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at once; at least 1."""
        return max(1, self.affinity if self.quota is None else min(self.affinity, math.ceil(self.quota)))


def cpu_limits(root: Path = Path("/")) -> CpuLimits:
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quotas = [quota for folder in _folders(root, "cpu") if (quota := _quota(folder)) is not None]
    return CpuLimits(machine, affinity, min(quotas, default=None))


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that the affinity mask and the control groups' quotas let us use; at least 1."""
    return cpu_limits(root).usable


def _machine(root: Path) -> Offer:
    fields = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    for key in ("MemAvailable", "MemTotal"):
        words = fields.get(key, "").split()
        if words:
            return Offer(int(words[0]) * _KIB, "free on this machine")
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Offer(pages * size, "of this machine")


def _groups(root: Path) -> list[Offer]:
    """What each control group that holds us has left. File pages count as free: they are dropped when it is short."""
    offers = []
    for folder in _folders(root, "memory"):
        v2 = (folder / "memory.max").exists()
        limit = _number(folder / ("memory.max" if v2 else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if v2 else "memory.usage_in_bytes"))
        # Without a limit v2 says "max" and v1 a number near 2**63.
        if limit is None or used is None or limit >= 2**60:
            continue
        stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
        names = ("inactive_file", "active_file") if v2 else ("total_inactive_file", "total_active_file")
        cached = sum(int(stat.get(name, 0)) for name in names)
        offers.append(Offer(max(0, limit - max(0, used - cached)), "left by the control group's limit"))
    return offers


def _folders(root: Path, controller: str) -> list[Path]:
    """Folders of the groups that hold us, for v2 or for v1's ``controller``, from our own up to the mount."""
    folders: list[Path] = []
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            base = mount
        elif controller in names.split(","):
            base = next((mount / name for name in (names, controller) if (mount / name).is_dir()), mount / controller)
        else:
            continue
        inner = base / path.strip("/")
        # In a container the path is often the host's and not visible; the mount itself is then our group.
        folders += [inner, *(p for p in inner.parents if p == base or base in p.parents)] if path.strip("/") else [base]
    return [folder for folder in folders if folder.is_dir()]


def _quota(folder: Path) -> float | None:
    """CPUs' worth of time per period; None without a limit."""
    words = _read(folder / "cpu.max").split()
    if len(words) == 2:
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and period and quota > 0 else None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    """A file of the kernel's; empty where it is absent or not ours to read."""
    try:
        return path.read_text()
    except OSError:
        return ""


class AdapterShare:
    """The common budget as adapters see it when the operator bounds them: above it, their own oldest go first."""

    def __init__(self, budget: MemoryBudget, share_bytes: int) -> None:
        self._budget = budget
        self._reclaimers: dict[str, Reclaimer] = {}
        self.limit = min(share_bytes, budget.limit)

    def reserve(self, owner: str, nbytes: int) -> bool:
        while self._budget.used(owner) + nbytes > self.limit:
            if not self._reclaimers[owner].evict_oldest():
                return False
        return self._budget.reserve(owner, nbytes)

    def release(self, owner: str, nbytes: int) -> None:
        self._budget.release(owner, nbytes)

    def used(self, owner: str) -> int:
        return self._budget.used(owner)

    def register_reclaimer(self, owner: str, reclaimer: Reclaimer) -> None:
        self._reclaimers[owner] = reclaimer
        self._budget.register_reclaimer(owner, reclaimer)
