"""Checks on a tiny model that an instruction set computes the same values as the portable one."""

from __future__ import annotations

import numpy as np

from truffula.kernels.backend import QuantisedArray
from truffula.kernels.cpu.backend import CpuBackend
from truffula.kernels.cpu.formats import BLOCK_KINDS
from truffula.kernels.program import WeightDecl
from truffula.testing.programs import (
    Array,
    Driver,
    attach,
    capacity_for,
    decoder_program,
    random_adapter,
    random_blocks,
    random_weights,
)
from truffula.testing.tiny import tiny_config

LIMITS = {"float32": 1e-4, "bfloat16": 0.03}
"""Limits relative to the largest logit. Sums in another order differ by far less, a wrong instruction by more."""
PROMPT = 37
"""Length of the prompt in tokens: more than one tile of rows in every instruction set."""


def difference(isa: str) -> str:
    """The format and dtype (``Q4_0 in bfloat16``) in which ``isa`` and ``portable`` differ; "" when they agree.

    Compares forward passes of a tiny llama with adapters, with many rows and with few. Takes about 0.1 s.
    """
    for dtype, limit in LIMITS.items():
        for kind in (dtype, *BLOCK_KINDS):
            wanted, found = _logits("portable", dtype, kind), _logits(isa, dtype, kind)
            if not np.isfinite(found).all() or np.abs(found - wanted).max() > limit * np.abs(wanted).max():
                return f"{kind} in {dtype}"
    return ""


def _logits(isa: str, dtype: str, kind: str) -> Array:
    program = decoder_program(tiny_config(hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=2))
    weights = random_weights(program)

    def pull(decl: WeightDecl) -> list[Array | QuantisedArray]:
        parts = weights[decl.name]
        if kind in BLOCK_KINDS and parts[0].ndim == 2:
            return [random_blocks(kind, *part.shape, seed=decl.id) for part in parts]
        return [*parts]

    capacity = capacity_for(PROMPT + 3)
    executable = CpuBackend(1, isa).load(program, dtype, pull, capacity)
    slot = attach(executable, random_adapter(program, dtype="bfloat16"))
    ids = range(3, PROMPT + 3)
    base, adapted = Driver(executable, capacity), Driver(executable, capacity, slot)
    logits = np.concatenate([base.feed(ids), adapted.feed(ids), adapted.feed((5, 6, 7))])
    executable.close()
    return logits
