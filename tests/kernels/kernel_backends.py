"""The backends that op tests, parity tests and engine tests run on: the one list of them.

The reference, and the native one on every instruction set that this machine has. Without the native module (no compiler
when truffula was installed) the reference alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pytest

from truffula.kernels.backend import Backend
from truffula.kernels.cpu import CpuBackend, available, instruction_sets
from truffula.kernels.inputs import Float32, Int32, SampleInputs, SequenceSampling, StepOutput
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.sampling import Sampler

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


class AnySampler(Protocol):
    """Draws for sequences by slot, from logits float32 ``[R, V]``."""

    def set_sequence(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None: ...
    def sample(self, logits: Float32, samples: SampleInputs) -> StepOutput: ...


class NativeSampler:
    """The native sampler on its own, with the loops of one instruction set."""

    def __init__(self, isa: str, slots: int, vocab: int) -> None:
        native: Any = import_module("truffula.kernels.cpu._native")
        self._native = native.Sampler(isa, slots, vocab)
        self.set_sequence = self._native.set_sequence

    def sample(self, logits: Float32, samples: SampleInputs) -> StepOutput:
        ids, logprob, finite, top_ids, top_logprobs = self._native.sample(logits, samples)
        shape = (len(ids), len(top_ids) // max(1, len(ids)))
        return StepOutput(ids, logprob, finite.view(np.bool_), top_ids.reshape(shape), top_logprobs.reshape(shape))


# Samplers by name, made for so many slots and ids.
SAMPLERS: Mapping[str, Callable[[int, int], AnySampler]] = MappingProxyType(
    {"numpy": Sampler, **{f"cpu-{isa}": partial(NativeSampler, isa) for isa in ISAS}}
)

on_every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
on_every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
on_every_table = pytest.mark.parametrize("isa", ISAS)
on_the_best = pytest.mark.parametrize("backend", BEST.values(), ids=BEST.keys())
needs_native = pytest.mark.skipif(not ISAS, reason="truffula was installed without its native kernels")
