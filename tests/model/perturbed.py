"""A backend that makes one deliberate mistake: ``verify`` must find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from truffula.kernels.backend import Array, Backend, Executable, PullWeight, QuantisedArray
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program, WeightDecl

Parts = Sequence[Array | QuantisedArray]


@dataclass(frozen=True)
class PerturbedBackend:
    """``backend``, which loads another program or other weights than it is given."""

    backend: Backend
    program: Callable[[Program], Program] = lambda program: program
    weight: Callable[[WeightDecl, Parts], Parts] = lambda decl, parts: parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def load(self, program: Program, dtype: str, pull: PullWeight, capacity: Capacity, **more: Any) -> Executable:
        return self.backend.load(
            self.program(program), dtype, lambda decl: self.weight(decl, pull(decl)), capacity, **more
        )
