"""The backends that op tests, parity tests and engine tests run on: the one list of them.

The reference, the native one on every instruction set that this machine has, and Triton's kernels under its
interpreter. Without the native module (no compiler when truffula was installed) or triton, those that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pytest

from truffula.kernels.backend import Backend
from truffula.kernels.cpu import CpuBackend, available, instruction_sets
from truffula.kernels.inputs import Capacity, Float32, Int32, SampleInputs, SequenceSampling, StepInputs, StepOutput
from truffula.kernels.reference import ReferenceBackend
from truffula.kernels.sampling import Sampler

ISAS: tuple[str, ...] = instruction_sets() if available() else ()
# Two threads: each op is cut in two and has its barrier.
NATIVE: Mapping[str, Backend] = MappingProxyType({f"cpu-{isa}": CpuBackend(threads=2, isa=isa) for isa in ISAS})
HAS_TRITON = find_spec("triton") is not None


@cache
def interpreted() -> Backend:
    """The triton backend on the host."""
    from truffula.kernels.triton.backend import TritonBackend
    from truffula.kernels.triton.device import HostDevice
    from truffula.testing.interpreter import install

    install()
    return TritonBackend(HostDevice())


class Interpreted:
    """``interpreted``, made when it is used: most tests need no triton."""

    def __getattr__(self, name: str) -> Any:
        return getattr(interpreted(), name)


BACKENDS: Mapping[str, Backend] = MappingProxyType({"reference": ReferenceBackend(), **NATIVE})
INTERPRETED: Mapping[str, Any] = MappingProxyType({"triton": Interpreted()} if HAS_TRITON else {})
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


ROWS = 4096
"""The most rows of logits that a ``NativeSampler`` takes."""


class NativeSampler:
    """The native sampler, with the loops of one instruction set: of an executable whose logits are rows of a table."""

    def __init__(self, isa: str, slots: int, vocab: int) -> None:
        native: Any = import_module("truffula.kernels.cpu._native")
        capacity = Capacity(ROWS, slots, ROWS, 0, 1, 1, 0)
        self._inputs = StepInputs.allocate(capacity, 0)
        self._native = native.Executable(isa, 1, capacity, "float32", 0, False)
        for number in range(2):
            self._native.add_buffer(offset=number * ROWS * vocab, stride=vocab, logit_rows=number == 1, rounded=False)
        self._table = self._native.add_matrix(ROWS, vocab, format="float32", panels=False, half=0)
        rows = (0, 0, vocab)
        self._native.add("Embed", table=self._table, out=rows, add=None, source="token", offset=0, scale=None)
        self._native.add("TakeRows", x=rows, out=(1, 0, vocab))
        self._native.seal(self._inputs, arena_floats=2 * ROWS * vocab, logits_buffer=1, vocab=vocab, planned_width=0)
        self.set_sequence = self._native.set_sequence

    def sample(self, logits: Float32, samples: SampleInputs) -> StepOutput:
        count, i = len(logits), self._inputs
        i.T, i.N, i.R = max(1, count), 1, count
        i.token_ids[:count] = i.logit_rows[:count] = np.arange(count)
        i.q_start[1] = i.kv_len[0] = i.T
        if count:
            self._native.fill(self._table, np.ascontiguousarray(logits), 0)
        self._native.run()
        ids, logprob, finite, top_ids, top_logprobs = self._native.sample(samples)
        shape = (len(ids), len(top_ids) // max(1, len(ids)))
        return StepOutput(ids, logprob, finite.view(np.bool_), top_ids.reshape(shape), top_logprobs.reshape(shape))


# Samplers by name, made for so many slots and ids.
SAMPLERS: Mapping[str, Callable[[int, int], AnySampler]] = MappingProxyType(
    {"numpy": Sampler, **{f"cpu-{isa}": partial(NativeSampler, isa) for isa in ISAS}}
)

# The tables between the best and the portable one run in the slow suite, interpreted kernels in one of their own.
BETWEEN = frozenset(ISAS[1:-1])


def _each(made: Mapping[str, Any]) -> list[Any]:
    marks = {name: [pytest.mark.slow] * (name.removeprefix("cpu-") in BETWEEN) for name in made}
    marks |= {name: [pytest.mark.slow, pytest.mark.triton] for name in INTERPRETED}
    return [pytest.param(value, id=name, marks=marks[name]) for name, value in made.items()]


on_every_sampler = pytest.mark.parametrize("sampler", _each(SAMPLERS))
on_every_backend = pytest.mark.parametrize("backend", _each({**BACKENDS, **INTERPRETED}))
on_every_fast_backend = pytest.mark.parametrize("backend", _each(BACKENDS))
on_every_table = pytest.mark.parametrize("isa", _each(dict(zip(ISAS, ISAS, strict=True))))
on_the_best = pytest.mark.parametrize("backend", BEST.values(), ids=BEST.keys())
needs_triton = [
    pytest.mark.triton, pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: make test-triton does it")
]  # fmt: skip
needs_native = pytest.mark.skipif(not ISAS, reason="truffula was installed without its native kernels")
