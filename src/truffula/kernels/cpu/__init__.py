"""The native CPU backend: the program's ops in C++ on packed weights, one call a step. Needs numpy and no torch."""

from truffula.kernels.cpu.backend import CpuBackend, available, instruction_sets, why_unavailable

__all__ = ["CpuBackend", "available", "instruction_sets", "why_unavailable"]
