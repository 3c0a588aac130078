"""The limits of a machine for kernels: measured rates of memory and arithmetic, and a timing compared with them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truffula.kernels.cpu.formats import INT8_KINDS

ROOT = Path(__file__).resolve().parents[2]
# The compiler flags of each instruction set, as in CMakeLists.txt.
FLAGS = {"portable": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
FLAGS["avx512vnni"] = [*FLAGS["avx512"], "-mavx512vnni"]
FLAGS["avx512bf16"] = [*FLAGS["avx512vnni"], "-mavx512bf16"]
FLAGS["amx"] = [*FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16", "-mamx-int8"]


@dataclass(frozen=True)
class Raw:
    """The time of an op. ``ops``: operations in the format's arithmetic and in float32. ``rate``: bytes per second of
    the cache that holds the data, None when it is read from memory."""

    kernel: str
    shape: str
    format: str
    rows: int
    us: float
    nbytes: int
    ops: tuple[float, float]
    rate: float | None


@dataclass(frozen=True)
class Timed:
    """One line. ``us``: the least time of an op; ``limit_us``: at the measured rates; ``share``: limit by time."""

    kernel: str
    shape: str
    format: str
    rows: int
    us: float
    gb_per_s: float
    gop_per_s: float
    limit_us: float
    bound: str
    share: float


@dataclass(frozen=True)
class Limits:
    """Operations per second by kind, and bytes per second read with one thread and with all."""

    float_peak: float
    pair_peak: float
    byte_peak: float
    word_peak: float
    read_one: float
    read_all: float

    def peak_of(self, stored: str) -> float:
        """Operations per second that products with matrices in this format can reach."""
        if stored in INT8_KINDS:
            return self.word_peak if stored == "Q8_0" and self.word_peak else self.byte_peak
        return self.pair_peak if stored in ("bfloat16", "FP8_128") and self.pair_peak else self.float_peak

    def compare(self, raw: Raw) -> Timed:
        """A timing with its limit."""
        read = raw.nbytes / (raw.rate or self.read_all) * 1e6
        compute = (raw.ops[0] / self.peak_of(raw.format) + raw.ops[1] / self.float_peak) * 1e6
        bound = "arithmetic" if compute > read else "memory" if raw.rate is None else "cache"
        limit = max(read, compute)
        return Timed(
            raw.kernel, raw.shape, raw.format, raw.rows, raw.us, raw.nbytes / raw.us / 1e3, sum(raw.ops) / raw.us / 1e3,
            limit, bound, limit / raw.us,
        )  # fmt: skip


def compile_rates(isa: str) -> Any:
    """Compile native/rates.cpp for ``isa`` and load it."""
    sources = [str(ROOT / "benchmarks/native/rates.cpp"), "-I", str(ROOT / "src/truffula/kernels/cpu/native")]
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "rates.so"))
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O3", "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, *FLAGS[isa], *sources, "-o", library], check=True)
        loaded = ctypes.CDLL(library)
    loaded.truffula_peak_rate.restype = loaded.truffula_read_rate.restype = ctypes.c_double
    loaded.truffula_peak_rate.argtypes = [ctypes.c_int32, ctypes.c_int32]
    loaded.truffula_read_rate.argtypes = [ctypes.c_int32, ctypes.c_int64]
    return loaded
