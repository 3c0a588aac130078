"""The backends that op tests, parity tests and engine tests run on: the one list of them.

The reference, and the native one on every instruction set that this machine has. Without the native module (no compiler
when truffula was installed) the reference alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from truffula.kernels.backend import Backend
from truffula.kernels.cpu.backend import CpuBackend, available, instruction_sets
from truffula.kernels.inputs import Float32, SampledRows, SampleInputs
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.sampling import sample

Sampler = Callable[[Float32, SampleInputs], SampledRows]

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


def native_sampler(isa: str) -> Sampler:
    """The native sampler on its own, with the loops of one instruction set."""

    def sample_rows(logits: Float32, samples: SampleInputs) -> SampledRows:
        native: Any = import_module("truffula.kernels.cpu._native")
        shape = len(logits), max(0, int(samples.n_logprobs[: len(logits)].max(initial=0)))
        ids, logprob, finite, top_ids, top_logprobs = native.sample_rows(logits, samples, shape[1], isa)
        return SampledRows(ids, logprob, finite.view(np.bool_), top_ids.reshape(shape), top_logprobs.reshape(shape))

    return sample_rows


# From logits float32 [R, V] to an id for each row.
SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {"numpy": sample, **{f"cpu-{isa}": native_sampler(isa) for isa in ISAS}}
)

on_every_sampler = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS.keys())
on_every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
on_every_table = pytest.mark.parametrize("isa", ISAS)
on_the_best = pytest.mark.parametrize("backend", BEST.values(), ids=BEST.keys())
needs_native = pytest.mark.skipif(not ISAS, reason="truffula was installed without its native kernels")
