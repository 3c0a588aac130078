"""A decode step of the cpu backend on SmolLM2-135M's shape with weights in bfloat16 and in quantised formats.

    python benchmarks/quantised_step.py            # the table (about two minutes)
    python benchmarks/quantised_step.py --smoke    # a second, a tiny shape

Weights are random; the 4 and 5 bit formats have their table (which is the head too) in Q8_0, as files do. Each row is a
sequence of its own with 105 tokens of context. Formats take turns, step by step, so that a busy neighbour slows all of
them; no sampling is in the figures. GB/s are bytes of weights over the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from truffula.bench.step import SMOLLM2
from truffula.kernels.backend import Array, Executable, PullWeight, QuantisedArray
from truffula.kernels.cpu import CpuBackend
from truffula.kernels.host import usable_cpus
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program, WeightDecl
from truffula.testing.programs import Part, as_dtype, decoder_program, fill_step, random_blocks
from truffula.testing.tiny import tiny_config

BLOCK = 16
VARIANTS = ("BF16", "FP8_128", "NF4", "FP4_16", "Q8_0", "Q5_0", "Q4_0", "Q4_1")


def pull(variant: str) -> PullWeight:
    rng = np.random.default_rng(0)

    def weight(decl: WeightDecl) -> list[Array | QuantisedArray]:
        if len(decl.shape) == 1:
            return [np.ones(decl.shape, np.float32)]
        if variant == "BF16":
            return [as_dtype(rng.standard_normal(decl.shape, np.float32) * 0.03, "bfloat16")]
        return [random_blocks(kind_of(decl, variant), *decl.shape, seed=decl.id)]

    return weight


def kind_of(decl: WeightDecl, variant: str) -> str:
    """How a weight is stored."""
    if variant in ("BF16", "FP8_128", "NF4", "FP4_16"):
        return variant
    return "Q8_0" if decl.shape[0] > 10000 else variant


@dataclass
class Run:
    """One format at one number of rows."""

    variant: str
    executable: Executable
    weight_bytes: int
    times: list[float] = field(default_factory=list)


def one_step(run: Run, rows: int, position: int, blocks: int) -> None:
    parts = [Part((i + 1,), position, tuple(range(1 + i * blocks, 1 + (i + 1) * blocks)), None) for i in range(rows)]
    fill_step(run.executable.inputs, parts, BLOCK)
    start = time.perf_counter()
    run.executable.run()
    run.times.append((time.perf_counter() - start) * 1e3)


def measure(program: Program, threads: int, isa: str, grid: list[int], context: int, steps: int) -> list[Run]:
    blocks = -(-(context + steps) // BLOCK)
    capacity = Capacity(
        max_tokens=max(grid), max_seqs=max(grid), max_logit_rows=max(grid), max_segments=1,
        num_blocks=1 + max(grid) * blocks, block_size=BLOCK, max_blocks_per_seq=blocks,
    )  # fmt: skip
    runs = []
    for variant in VARIANTS:
        backend = CpuBackend(threads, isa)
        kinds = {part.name: kind_of(decl, variant) for decl in program.weights for part in decl.parts}
        size = backend.plan(program, "bfloat16", capacity, kinds).weight_bytes
        runs.append(Run(variant, backend.load(program, "bfloat16", pull(variant), capacity), size))
    return runs


def report(table: Table, runs: list[Run], rows: int, context: int, steps: int) -> None:
    blocks = -(-(context + steps) // BLOCK)
    for run in runs:
        run.times.clear()
    for step in range(steps):
        for run in runs:
            one_step(run, rows, context + step, blocks)
    base = statistics.median(runs[0].times)
    for run in runs:
        median = statistics.median(run.times)
        table.add_row(
            str(rows), run.variant, f"{median:.2f} ({min(run.times):.2f})", f"{rows * 1e3 / median:.0f}",
            f"{base / median:.2f}", f"{run.weight_bytes / median / 1e6:.1f}",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, one second")
    parser.add_argument("--threads", type=int, default=None, help="compute threads")
    parser.add_argument("--isa", default="auto", help="instruction set")
    options = parser.parse_args()
    tiny = tiny_config(hidden_size=64, intermediate_size=96)
    program = decoder_program(tiny if options.smoke else SMOLLM2)
    grid, context, steps = ([1, 3], 8, 2) if options.smoke else ([1, 8, 32], 105, 40)
    threads = options.threads or usable_cpus()
    runs = measure(program, threads, options.isa, grid, context, steps)
    isa = CpuBackend(threads, options.isa).isa
    table = Table(
        "rows",
        "weights",
        "ms a step",
        "tok/s",
        "of bfloat16",
        "GB/s",
        title=f"decode step, {isa}, {threads} threads: median (best)",
    )
    for rows in grid:
        report(table, runs, rows, context, steps)
    Console().print(table)


if __name__ == "__main__":
    main()
