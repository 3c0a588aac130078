"""Memory and CPUs that this process may use, by the kernel and its control groups."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from truffula.kernels.backend import MemoryLimit

_KIB = 1024


def free_memory(root: Path = Path("/")) -> MemoryLimit:
    """Memory that can be used now without swapping: the machine's, or a control group's when that has less."""
    return min([_machine(root), *_groups(root)], key=lambda limit: limit.nbytes)


@dataclass(frozen=True)
class CpuLimits:
    """CPUs of the ``machine`` and of this process's ``affinity`` mask, and the smallest CPU ``quota`` of its control
    groups; None without a quota."""

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
    """CPUs that the affinity mask and the quotas of the control groups let this process use; at least 1."""
    return cpu_limits(root).usable


def _machine(root: Path) -> MemoryLimit:
    fields = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    for key in ("MemAvailable", "MemTotal"):
        words = fields.get(key, "").split()
        if words:
            return MemoryLimit(int(words[0]) * _KIB, "free on this machine")
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return MemoryLimit(pages * size, "of this machine")


def _groups(root: Path) -> list[MemoryLimit]:
    """Memory left in each control group of this process. File pages count as free: the kernel drops them first."""
    limits = []
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
        limits.append(MemoryLimit(max(0, limit - max(0, used - cached)), "left by the control group's limit"))
    return limits


def _folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's groups, for v2 or for v1's ``controller``, from its own up to the mount."""
    folders: list[Path] = []
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if number == "0" and not names:
            base = mount
        elif controller in names.split(","):
            base = next((mount / name for name in (names, controller) if (mount / name).is_dir()), mount / controller)
        else:
            continue
        # In a container the path is often the host's and not visible; the mount itself is then this process's group.
        inner = base / path.strip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(base)]
    return [folder for folder in folders if folder.is_dir()]


def _quota(folder: Path) -> float | None:
    """The CPU quota of a group, in CPUs; None without a limit."""
    words = _read(folder / "cpu.max").split()
    if len(words) == 2:
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota / period if quota is not None and period and quota > 0 else None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    """The text of a file of the kernel; empty when it is absent or unreadable."""
    try:
        return path.read_text()
    except OSError:
        return ""
