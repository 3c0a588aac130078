"""A decode step of the cpu backend with experts, against the bytes that it must read and against a dense model.

    python benchmarks/experts.py            # the table (about a minute)
    python benchmarks/experts.py --smoke    # a second, a tiny shape

The shape has the widths of Qwen3.6-35B-A3B (hidden 2048, 8 of the experts of 512, a shared one of 512), with full
attention, fewer layers, 64 experts instead of 256 and a small vocabulary: what a token costs depends on what it uses.
The dense model has the same attention and an MLP as wide as the experts that a token uses. Weights are random, each row
is a sequence of its own with 105 tokens of context, and the two models take turns, step by step. "Of the rate" is the
bytes of the weights that one row uses, over the median, over what all threads read from memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from truffula.bench.step import read_rate
from truffula.kernels.backend import Array, Executable
from truffula.kernels.cpu import CpuBackend
from truffula.kernels.host import usable_cpus
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Embed, Program, WeightDecl
from truffula.testing.programs import Part, as_dtype, decoder_program, fill_step

BLOCK = 16
EXPERTS, USED, WIDTH = 64, 8, 512
BASE: Mapping[str, Any] = {
    "vocab_size": 16384, "hidden_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
TINY: Mapping[str, Any] = {**BASE, "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1}


def configs(base: Mapping[str, Any], experts: int, used: int, width: int) -> dict[str, dict[str, Any]]:
    """The model with experts, and the dense one."""
    sparse = {
        "model_type": "qwen2_moe", "num_experts": experts, "num_experts_per_tok": used, "norm_topk_prob": True,
        "moe_intermediate_size": width, "shared_expert_intermediate_size": width, "intermediate_size": width,
    }  # fmt: skip
    return {
        "experts": {**base, **sparse},
        "dense": {**base, "model_type": "qwen2", "intermediate_size": (used + 1) * width},
    }


def pull(decl: WeightDecl) -> list[Array]:
    """Random weights; all experts have the same."""
    rng = np.random.default_rng(decl.id)
    if len(decl.shape) == 1:
        return [np.ones(decl.shape, np.float32)]
    if len(decl.shape) == 2:
        return [as_dtype(rng.standard_normal(decl.shape, np.float32) * 0.03, "bfloat16")]
    one: dict[tuple[int, ...], Array] = {}
    for part in decl.parts:
        if part.stored not in one:
            one[part.stored] = as_dtype(rng.standard_normal(part.stored, np.float32) * 0.03, "bfloat16")
    return [one[part.stored] for part in decl.parts]


@dataclass
class Run:
    """One model in one format. ``used_bytes`` are those of the weights that a step of one row reads."""

    model: str
    fmt: str
    executable: Executable
    weight_bytes: int
    used_bytes: float
    times: list[float] = field(default_factory=list)


def used_bytes(program: Program, used: int, fmt: str) -> float:
    """Bytes of the weights that one row reads: of the experts it has chosen, and of tables one row."""
    gathered = {op.table for op in program.ops if isinstance(op, Embed)}
    total = 0.0
    for decl in program.weights:
        if decl.id in gathered and "matmul" not in decl.uses:
            continue
        count = math.prod(decl.shape) * (used / decl.shape[0] if len(decl.shape) == 3 else 1)
        total += count * (4 if len(decl.shape) == 1 else 34 / 32 if fmt == "Q8_0" else 2)
    return total


def load(model: str, config: Mapping[str, Any], fmt: str, threads: int, capacity: Capacity, used: int) -> Run:
    program = decoder_program(config)
    backend = CpuBackend(threads, quantize="q8_0" if fmt == "Q8_0" else "none")
    size = backend.plan(program, "bfloat16", capacity).weight_bytes
    executable = backend.load(program, "bfloat16", pull, capacity)
    return Run(model, fmt, executable, size, used_bytes(program, used, fmt))


def one_step(run: Run, rows: int, position: int, blocks: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(3, 60, rows).tolist()
    parts = [Part((ids[i],), position, tuple(range(1 + i * blocks, 1 + (i + 1) * blocks)), None) for i in range(rows)]
    fill_step(run.executable.inputs, parts, BLOCK)
    start = time.perf_counter()
    run.executable.run()
    run.times.append((time.perf_counter() - start) * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, one second")
    parser.add_argument("--threads", type=int, default=None, help="compute threads")
    parser.add_argument("--steps", type=int, default=30, help="measured steps")
    options = parser.parse_args()
    threads = options.threads or usable_cpus()
    models = configs(TINY, 6, 2, 32) if options.smoke else configs(BASE, EXPERTS, USED, WIDTH)
    used, grid, context = (2, [1], 8) if options.smoke else (USED, [1, 8], 105)
    steps = 2 if options.smoke else options.steps
    blocks = -(-(context + steps + 1) // BLOCK)
    capacity = Capacity(
        max_tokens=max(grid), max_seqs=max(grid), max_logit_rows=max(grid), max_segments=1,
        num_blocks=1 + max(grid) * blocks, block_size=BLOCK, max_blocks_per_seq=blocks,
    )  # fmt: skip
    rate = read_rate(threads, 1 << (22 if options.smoke else 29))
    table = Table(
        "rows", "weights", "model", "GB", "GB used by a token", "ms a step", "tok/s", "of the rate",
        title=f"{CpuBackend(threads).isa}, {threads} threads, {rate / 1e9:.1f} GB/s: median (best)",
    )  # fmt: skip
    for fmt in ("bfloat16", "Q8_0"):
        runs = [load(name, config, fmt, threads, capacity, used) for name, config in models.items()]
        for rows in grid:
            for run in runs:
                run.times.clear()
            for step in range(steps + 1):
                for run in runs:
                    one_step(run, rows, context + step, blocks, step)
            for run in runs:
                times = run.times[1:]  # the first is a warm-up
                median = statistics.median(times)
                share = f"{run.used_bytes / median * 1e3 / rate:.2f}" if rows == 1 else ""
                table.add_row(
                    str(rows), fmt, run.model, f"{run.weight_bytes / 1e9:.2f}", f"{run.used_bytes / 1e9:.3f}",
                    f"{median:.2f} ({min(times):.2f})", f"{rows * 1e3 / median:.1f}", share,
                )  # fmt: skip
        for run in runs:
            run.executable.close()
    Console().print(table)


if __name__ == "__main__":
    main()
