"""Where kernels run: a GPU, or Triton's interpreter on tensors of the host, for tests."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from truffula.errors import ConfigError, DeviceLost, MissingDependency, TruffulaError
from truffula.kernels.backend import MemoryLimit
from truffula.kernels.host import free_memory
from truffula.kernels.installation import installation

LEAST_CAPABILITY = (8, 0)


class Device(Protocol):
    """``programs``: how many programs a kernel is launched with, which take items until there are none.
    ``tensor_core_rows``: the least rows of a tile in products of 16-bit numbers, so that all rows of all steps are
    multiplied by one kind of instruction. ``tried``: kernels need not be compared with torch at the start."""

    torch_device: torch.device
    programs: int
    tensor_core_rows: int
    tried: bool

    def free_memory(self) -> MemoryLimit: ...

    def launch(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """Run ``programs`` programs of a kernel after what was launched before."""

    def staging(self, nbytes: int) -> Tensor:
        """uint8 memory of the host from which ``upload`` is fast."""

    def upload(self, to: Tensor, source: Tensor) -> None:
        """Copy staged memory to the device, before what is launched later. It may be read until ``synchronize``, or
        until the result of a later launch is known."""

    def synchronize(self) -> None:
        """Wait until all that was begun has ended."""


class HostDevice:
    """Tensors of the host and Triton's interpreter: slow, for tests. Few programs, so that each takes several items."""

    torch_device = torch.device("cpu")
    programs = 3
    tensor_core_rows = 16
    tried = True

    def free_memory(self) -> MemoryLimit:
        return free_memory()

    def launch(self, kernel: Any, *args: Any, **constants: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of values that are not finite
            kernel[(self.programs,)](*args, **constants)

    def staging(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def upload(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def synchronize(self) -> None:
        """It has."""


class CudaDevice:
    """GPU number ``index``."""

    tried = False

    def __init__(self, index: int) -> None:
        found = torch.cuda.get_device_properties(index)
        self.torch_device = torch.device("cuda", index)
        self.programs = 4 * found.multi_processor_count
        # From capability 9.0 on, products of 64 rows and more have instructions of their own.
        self.tensor_core_rows = 64 if found.major >= 9 else 16

    def free_memory(self) -> MemoryLimit:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return MemoryLimit(int(free), f"free on {self.torch_device}")

    def launch(self, kernel: Any, *args: Any, **constants: Any) -> None:
        with torch.cuda.device(self.torch_device):
            kernel[(self.programs,)](*args, **constants)

    def staging(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)


def lost(device: torch.device, error: BaseException) -> DeviceLost:
    """The error of a device that has stopped computing."""
    return DeviceLost(f"{device} has failed: {_sentence(error)}.")


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class CudaFacts:
    """The facts that the CUDA backend needs: versions (empty: not installed), the driver's error, and the GPUs."""

    torch: str
    cuda: str
    triton: str
    error: str = ""
    gpus: tuple[Gpu, ...] = ()


def cuda_facts() -> CudaFacts:
    """The facts of this machine. Makes a context of CUDA where there is a GPU."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else ""
    facts = CudaFacts(torch.__version__, torch.version.cuda or "", triton)
    if not facts.cuda:
        return facts
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        each = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        return CudaFacts(facts.torch, facts.cuda, triton, _sentence(error))
    gpus = tuple(Gpu(found.name, (found.major, found.minor), found.total_memory) for found in each)
    return CudaFacts(facts.torch, facts.cuda, triton, gpus=gpus)


def driver_version() -> str:
    """Of NVIDIA's driver; empty when the system does not tell."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def why_unusable(facts: CudaFacts, device: str) -> TruffulaError | None:
    """The error for ``device`` (``cuda``, ``cuda:1``), None if kernels can run there."""
    install = installation().pip_install("cuda")
    if not facts.cuda:
        return MissingDependency(
            f"device is {device!r}, but torch {facts.torch} was built without CUDA: install its CUDA build ({install}, "
            "without an index of CPU builds), or use --device cpu.",
            param="device",
        )
    if facts.error or not facts.gpus:
        why = facts.error or "the system has none, or CUDA_VISIBLE_DEVICES hides them"
        return ConfigError(f"device is {device!r}, but torch finds no GPU: {why}. Or use --device cpu.", param="device")
    if not facts.triton:
        return MissingDependency(
            f"device is {device!r}, whose kernels need triton, which is not installed: {install}.", param="device"
        )
    name, _, number = device.partition(":")
    index = int(number) if number.isdecimal() else 0
    if name != "cuda" or (number and not number.isdecimal()) or index >= len(facts.gpus):
        have = ", ".join(f"cuda:{at} ({gpu.name})" for at, gpu in enumerate(facts.gpus))
        return ConfigError(f"device is {device!r}; this machine has {have}.", param="device")
    gpu = facts.gpus[index]
    if gpu.capability < LEAST_CAPABILITY:
        have, least = (".".join(map(str, version)) for version in (gpu.capability, LEAST_CAPABILITY))
        return ConfigError(
            f"device is {device!r}, a {gpu.name} of compute capability {have}; the kernels need {least} (Ampere) or "
            "newer. Use --backend reference, which computes with torch, or --device cpu.",
            param="device",
        )
    return None


def cuda_device(name: str) -> CudaDevice:
    """The device called ``name``.

    Raises:
        ConfigError, MissingDependency: See ``why_unusable``.
    """
    if (error := why_unusable(cuda_facts(), name)) is not None:
        raise error
    number = name.partition(":")[2]
    return CudaDevice(int(number) if number else 0)


def _sentence(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
