"""A small program on the native backend and one step of it; light enough for processes that tests start."""

from __future__ import annotations

import numpy as np
from llama_program import llama_program

from truffula.kernels.backend import Executable
from truffula.kernels.cpu.backend import CpuBackend
from truffula.kernels.inputs import Capacity
from truffula.testing.programs import fill_step, pull_from, random_weights

S = 4
CAPACITY = Capacity(
    max_tokens=64, max_seqs=8, max_logit_rows=64, max_segments=8, num_blocks=40, block_size=S, max_blocks_per_seq=16
)
IDS = tuple(np.random.default_rng(3).integers(0, 60, 23).tolist())


def load(isa="auto", threads=2, weights=None, dtype="float32") -> Executable:
    program = llama_program()
    return CpuBackend(threads=threads, isa=isa).load(
        program, dtype, pull_from(weights or random_weights(program)), CAPACITY
    )


def run(executable, parts) -> np.ndarray:
    fill_step(executable.inputs, parts, S)
    executable.run()
    return executable.logits()
