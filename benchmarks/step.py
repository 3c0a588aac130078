"""Milliseconds per decode step of the reference backend, by rows, adapters and dtype, on SmolLM2-135M's shape.

    python benchmarks/step.py            # the table (about a minute)
    python benchmarks/step.py --smoke    # a second, a tiny shape

Weights are random and stored in bfloat16, as the real model's are; each row is a sequence of its own with 105 tokens
of context, and each adapter is of rank 16 on all linears and used by one row. ``tax`` is the step with adapters over
the same step without. No sampling is in the figures.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from truffula.kernels.backend import Backend, Executable
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program
from truffula.kernels.select import select_backend
from truffula.testing.programs import (
    SMOLLM2,
    TINY,
    Part,
    fill_step,
    llama_program,
    pull_from,
    random_adapter,
    random_weights,
)

BLOCK = 16


def decode_ms(executable: Executable, rows: int, slots: list[int], context: int, steps: int) -> list[float]:
    """Times of ``steps`` decode steps behind ``context`` tokens; row i uses ``slots[i]``, later rows the base."""
    per_row = -(-(context + steps) // BLOCK)
    tables = [tuple(range(1 + i * per_row, 1 + (i + 1) * per_row)) for i in range(rows)]
    using = [slots[i] if i < len(slots) else None for i in range(rows)]
    prompt = tuple(range(1, context + 1))
    for table, slot in zip(tables, using, strict=True):
        fill_step(executable.inputs, [Part(prompt, 0, table, slot)], BLOCK)
        executable.run()
    times = []
    for step in range(steps):
        parts = [Part((i + 1,), context + step, tables[i], using[i]) for i in range(rows)]
        fill_step(executable.inputs, parts, BLOCK)
        start = time.perf_counter()
        executable.run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measure(
    backend: Backend, program: Program, dtype: str, grid: list[int], context: int, steps: int
) -> list[tuple[str, ...]]:
    """One line per number of rows: base and adapter step in ms (the median, the best beside it) and the tax."""
    capacity = Capacity(
        max_tokens=max(context, max(grid)), max_seqs=max(grid), max_logit_rows=max(grid), max_segments=max(grid),
        num_blocks=1 + max(grid) * -(-(context + steps) // BLOCK), block_size=BLOCK,
        max_blocks_per_seq=-(-(context + steps) // BLOCK),
    )  # fmt: skip
    executable = backend.load(program, dtype, pull_from(random_weights(program, dtype="bfloat16")), capacity)
    slots = [executable.adapter(random_adapter(program, rank=16, seed=i)) for i in range(max(grid))]
    lines = []
    for rows in grid:
        base = decode_ms(executable, rows, [], context, steps)
        mixed = decode_ms(executable, rows, slots[:rows], context, steps)
        median = statistics.median(base), statistics.median(mixed)
        cells = [f"{m:.1f} ({min(t):.1f})" for m, t in zip(median, (base, mixed), strict=True)]
        lines.append((dtype, str(rows), *cells, f"{median[1] / median[0]:.2f}"))
    executable.close()
    return lines


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, one second")
    parser.add_argument("--threads", type=int, default=None, help="compute threads")
    options = parser.parse_args()
    backend = select_backend("reference", "cpu", threads=options.threads)
    program = llama_program(TINY if options.smoke else SMOLLM2)
    grid, context, steps = ([1, 3], 8, 2) if options.smoke else ([1, 4, 8, 16], 105, 25)
    threads = f"{options.threads} threads" if options.threads else "torch's own thread count"
    title = f"ms per decode step, {cpu_name()}, {backend.probe().isa}, {threads}: median (best)"
    table = Table("dtype", "rows", "base", "one adapter a row", "tax", title=title)
    for dtype in ("float32", "bfloat16"):
        for line in measure(backend, program, dtype, grid, context, steps):
            table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    main()
