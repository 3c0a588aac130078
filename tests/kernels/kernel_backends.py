"""The backends that op tests, parity tests and engine tests run on: the one list of them.

The reference, and the native one on every instruction set that this machine has. Without the native module (no compiler
when truffula was installed) the reference alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import pytest

from truffula.kernels.backend import Backend
from truffula.kernels.cpu.backend import CpuBackend, available, instruction_sets
from truffula.kernels.reference import ReferenceBackend

ISAS: tuple[str, ...] = instruction_sets() if available() else ()
# Two threads: each op is cut in two and has its barrier.
NATIVE: Mapping[str, Backend] = MappingProxyType({f"cpu-{isa}": CpuBackend(threads=2, isa=isa) for isa in ISAS})
BACKENDS: Mapping[str, Backend] = MappingProxyType({"reference": ReferenceBackend(), **NATIVE})
# For tests that compare whole models, where one table says what all do: op tests compare the tables.
BEST: Mapping[str, Backend] = MappingProxyType(dict(list(BACKENDS.items())[:2]))
# The same on one thread: for tests of very many very small steps.
SINGLE: Mapping[str, Backend] = MappingProxyType(
    {"reference": ReferenceBackend(threads=1), **{f"cpu-{isa}": CpuBackend(threads=1, isa=isa) for isa in ISAS[:1]}}
)

on_every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
on_every_table = pytest.mark.parametrize("isa", ISAS)
on_the_best = pytest.mark.parametrize("backend", BEST.values(), ids=BEST.keys())
needs_native = pytest.mark.skipif(not ISAS, reason="truffula was installed without its native kernels")
