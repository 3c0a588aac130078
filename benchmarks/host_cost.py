"""What the host computes per step: the time of plan, submit, commit and encoding, without any model.

    python benchmarks/host_cost.py             # 1 to 256 rows, greedy, sampled and with penalties
    python benchmarks/host_cost.py --profile   # where the time of the largest batch goes
    python benchmarks/host_cost.py --smoke

The executable draws the same token for every row in no time, so what remains is what a device waits for when steps do
not overlap, and what has to fit into a step's duration when they do. All sequences are past their prompts: each step
has one row per sequence. Medians over steps, in milliseconds of the thread's CPU time, which other load moves less.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from truffula.engine.budget import MemoryBudget
from truffula.engine.engine import Engine
from truffula.engine.limits import EngineLimits
from truffula.engine.runner import split_output
from truffula.kernels.inputs import Capacity, Int32, SampleInputs, StepInputs, StepOutput
from truffula.kernels.synchronous import FinishedStep
from truffula.lora.pool import AdapterPool
from truffula.lora.worker import Setup
from truffula.params import EngineParams
from truffula.types import MAX_ADAPTERS, EngineRequest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "lora"))
from inline_loader import InlineLoader

VOCAB = 128_256
BLOCK = 16
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.9}
PENALISED = {"temperature": 0.8, "repetition_penalty": 1.1}


class NullModel:
    """An executable that computes nothing."""

    depth = 1

    def __init__(self, capacity: Capacity) -> None:
        self.inputs = StepInputs.allocate(capacity, 1)
        self.samples = SampleInputs.allocate(capacity, VOCAB)

    def submit(self, wait_for_masks: Callable[[], None] | None = None) -> FinishedStep:
        R = self.inputs.R
        none = np.zeros((R, 0))
        return FinishedStep(
            StepOutput(
                ids=np.full(R, 7, np.int32), logprob=np.zeros(R, np.float32), finite=np.ones(R, np.bool_),
                top_ids=none.astype(np.int32), top_logprobs=none.astype(np.float32),
            )
        )  # fmt: skip

    def set_sequence(self, *state: Any) -> None: ...

    def release_kv(self, group: int, blocks: Int32) -> None: ...

    def close(self) -> None: ...


def engine_of(rows: int, context: int, params: dict[str, Any]) -> Engine:
    """An engine whose ``rows`` sequences have computed their prompts."""
    blocks = rows * -(-(context + 512) // BLOCK) + 1
    tokens = max(2048, rows)
    capacity = Capacity(
        max_tokens=tokens, max_seqs=rows, max_logit_rows=rows + 16,
        max_segments=rows * MAX_ADAPTERS, num_blocks=blocks,
        block_size=BLOCK, max_blocks_per_seq=8192 // BLOCK,
    )  # fmt: skip
    limits = EngineLimits(
        max_model_len=8192, step_tokens=tokens, step_logit_rows=rows + 16, max_running=rows, max_waiting=rows,
        block_size=BLOCK, num_blocks=blocks, prefix_cache=True, vocab_size=VOCAB, eos_token_ids=(2,),
        kv_block_bytes=(1,),
    )  # fmt: skip
    model, budget = NullModel(capacity), MemoryBudget(1 << 40)
    pool = AdapterPool(model, InlineLoader(Setup(sites=[], model="none")), budget, time.monotonic)  # type: ignore[arg-type]
    engine = Engine(model, limits, pool, budget)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    for i in range(rows):
        engine.add(
            EngineRequest(
                request_id=f"r{i}", prompt_ids=random.integers(3, VOCAB, context).tolist(),
                params=EngineParams(max_tokens=500, ignore_eos=True, seed=i, **params), arrival=time.monotonic(),
            )
        )  # fmt: skip
    drawing: set[str] = set()
    while len(drawing) < rows:
        drawing.update(event.request_id for event in engine.step())
    return engine


def measure(rows: int, params: dict[str, Any], steps: int, context: int, profile: bool) -> None:
    """Print the medians of ``steps`` steps by part."""
    engine = engine_of(rows, context, params)
    scheduler, runner, clock = engine._scheduler, engine._runner, time.thread_time
    encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
    parts: list[tuple[float, ...]] = []
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    for _ in range(steps):
        times = [clock()]
        plan = scheduler.plan(time.monotonic())
        times.append(clock())
        results = split_output(plan.chunks, runner.submit(plan).result())
        times.append(clock())
        scheduler.commit(plan, results, time.monotonic())
        events = scheduler.take_events()
        times.append(clock())
        encode(events)
        times.append(clock())
        assert len(events) == rows, "a sequence did not draw"
        parts.append((*np.diff(times), times[-1] - times[0]))
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(15)
    engine.close()
    medians = [1e3 * statistics.median(part) for part in zip(*parts, strict=True)]
    names = ("plan", "submit", "commit", "encode", "total")
    shown = "  ".join(f"{name} {value:.3f}" for name, value in zip(names, medians, strict=True))
    print(f"{rows:4d} rows  {', '.join(f'{k} {v}' for k, v in params.items()):44s} {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 32, 128, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=1024, help="tokens per prompt")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.smoke:
        given.rows, given.steps, given.context = [2], 3, 40
    for rows in given.rows:
        measure(rows, GREEDY, given.steps, given.context, profile=False)
    for params in (SAMPLED, PENALISED):
        measure(given.rows[-1], params, given.steps, given.context, profile=given.profile)


if __name__ == "__main__":
    main()
