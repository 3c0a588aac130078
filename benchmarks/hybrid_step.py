"""A model with linear attention, of Qwen3.5-0.8B's shape: decode and prefill against the machine and transformers.

    python benchmarks/hybrid_step.py            # three minutes, 5 GB
    python benchmarks/hybrid_step.py --smoke    # seconds, a tiny shape

Both have random bfloat16 weights and one sequence; the two take turns. ``decode`` is one token behind a short context,
``prefill`` a prompt whose last row's logits are computed. Of the limit: the bytes of weights and sequence states that a
token reads and writes, by the rate at which all threads read memory in the same run, over the best time; of prefill the
products with weights alone, by the rate of the instructions that make them, from registers.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from comparison.limits import compile_rates
from truffula.kernels.backend import Executable
from truffula.kernels.cpu import CpuBackend
from truffula.kernels.host import usable_cpus
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Linear, Logits
from truffula.testing.programs import Part, decoder_program, fill_step, pull_from, random_weights
from truffula.testing.tiny import tiny_config

SHAPE: dict[str, Any] = {
    "model_type": "qwen3_5_text", "vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584,
    "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
    "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
BLOCK, CONTEXT = 16, 32
Run = Callable[[], None]


class Ours:
    """One sequence on the cpu backend. State row 1 is that of the context, row 2 takes what a step leaves."""

    def __init__(self, config: dict[str, Any], backend: CpuBackend, tokens: int) -> None:
        self.program = decoder_program(config)
        self.blocks = tuple(range(1, 1 + -(-tokens // BLOCK)))
        capacity = Capacity(tokens, 1, 1, 1, 1 + len(self.blocks), BLOCK, len(self.blocks), num_states=3)
        self.weight_bytes = backend.plan(self.program, "bfloat16", capacity).weight_bytes
        weights = random_weights(self.program, dtype="bfloat16")
        self.executable: Executable = backend.load(self.program, "bfloat16", pull_from(weights), capacity)

    @property
    def state_bytes(self) -> int:
        return self.program.state_bytes(4)

    def operations(self, tokens: int) -> float:
        """Of the products with weights for a prompt; the head's are of one row."""
        head = {op.weight for op in self.program.ops if isinstance(op, Logits)}
        used = [op.weight for op in self.program.ops if isinstance(op, Linear | Logits)]
        sizes = {weight: math.prod(self.program.weights[weight].shape) for weight in used}
        return 2.0 * sum(sizes[weight] * (1 if weight in head else tokens) for weight in used)

    def step(self, count: int, start: int) -> None:
        inputs = self.executable.inputs
        fill_step(inputs, [Part(tuple(range(3, 3 + count)), start, self.blocks)], BLOCK)
        inputs.state_in[0], inputs.state_out[0] = int(start > 0), 2 if start else 1
        self.executable.run()


class Theirs:
    """The same on transformers."""

    def __init__(self, config: dict[str, Any]) -> None:
        made = AutoConfig.for_model(**config)
        self.model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
        self.cache: Any = None

    def step(self, count: int, start: int) -> None:
        if start == 0:
            self.cache = DynamicCache(config=self.model.config)
        ids = torch.arange(3, 3 + count)[None]
        with torch.inference_mode():
            self.model(input_ids=ids, cache=self.cache, use_cache=True, logits_to_keep=1)


def timed(run: Run) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(sides: dict[str, Ours | Theirs], prompt: int, rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each decode step and of each prefill, by side, after a short prompt that warms up."""
    times: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in sides}
    for side in sides.values():
        side.step(CONTEXT, 0)
        side.step(1, CONTEXT)
    for _ in range(rounds):
        for name, side in sides.items():
            prefill = timed(lambda side=side: side.step(prompt, 0))  # type: ignore[misc]
            side.step(CONTEXT, 0)
            decode = [timed(lambda at=at, side=side: side.step(1, CONTEXT + at)) for at in range(steps)]  # type: ignore[misc]
            times[name]["prefill"].append(prefill)
            times[name]["decode"] += decode
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, seconds")
    parser.add_argument("--threads", type=int, default=None, help="compute threads")
    parser.add_argument("--rounds", type=int, default=3, help="of a prefill and ten decode steps of each")
    options = parser.parse_args()
    threads = options.threads or usable_cpus()
    torch.set_num_threads(threads)
    config = tiny_config("qwen3_5_text", tie_word_embeddings=True) if options.smoke else SHAPE
    prompt, rounds, steps = (40, 1, 2) if options.smoke else (2048, options.rounds, 10)
    backend = CpuBackend(threads)
    ours = Ours(config, backend, prompt)
    times = measure({"truffula": ours, "transformers": Theirs(config)}, prompt, rounds, steps)
    rates = compile_rates(backend.isa)
    rate = rates.truffula_read_rate(threads, 1 << (20 if options.smoke else 28))
    peak = rates.truffula_peak_rate(1, threads) or rates.truffula_peak_rate(0, threads)  # of bfloat16 pairs, of floats
    moved, operations = ours.weight_bytes + 2 * ours.state_bytes, ours.operations(prompt)
    title = (
        f"{backend.isa}, {threads} threads, memory reads {rate / 1e9:.1f} GB/s, {moved / 1e9:.2f} GB a token; "
        f"{peak / 1e9:.0f} GFLOP/s, {operations / 1e9:.0f} GFLOP a prompt"
    )
    table = Table("what", "who", "ms: median (best)", "tok/s", "x", "of the limit", title=title)
    for what, tokens in (("decode", 1), ("prefill", prompt)):
        base = statistics.median(times["transformers"][what])
        for name in times:
            found = times[name][what]
            median, best = statistics.median(found), min(found)
            least = moved / rate if what == "decode" else operations / peak
            limit = f"{least / best:.2f}" if name == "truffula" or what == "prefill" else ""
            table.add_row(what, name, f"{median * 1e3:.1f} ({best * 1e3:.1f})", f"{tokens / median:.1f}",
                          f"{base / median:.2f}", limit)  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
