"""The native CPU backend: C++ kernels on packed weights, one call per step. Needs numpy, not torch."""

from truffula.kernels.cpu.backend import CpuBackend
from truffula.kernels.cpu.library import available, instruction_sets, why_unavailable

__all__ = ["CpuBackend", "available", "instruction_sets", "why_unavailable"]
