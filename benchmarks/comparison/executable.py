"""The child that measures our executable alone on a real checkpoint: what ``llama-bench`` measures of llama.cpp.

Reads a job ``{"config", "measure", "tokens", "repeats"}`` on standard input, prints one JSON line. ``decode`` is
``tokens`` steps of one row behind nothing but each other; ``prefill`` is one prompt of ``tokens`` tokens whose last
row's logits are wanted. Ids are random; filling the step's inputs counts, sampling does not, on either side.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

from truffula.config import EngineConfig
from truffula.environment import prepare_compute


def main() -> None:
    job = json.load(sys.stdin)
    prepare_compute()
    answer = measure(EngineConfig(**job["config"]), job["measure"], job["tokens"], job["repeats"])
    sys.stdout.write(json.dumps(answer) + "\n")


def measure(config: EngineConfig, what: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of each of ``repeats`` runs behind one that warms up, and how many bytes the weights take."""
    from contextlib import closing

    from truffula.kernels.host import usable_cpus
    from truffula.kernels.inputs import Capacity
    from truffula.kernels.select import Precision, choose_dtype, select_backend
    from truffula.model.load import WeightReader, plan_model
    from truffula.weights.open import open_checkpoint
    from truffula.weights.sources import resolve_source

    threads = config.threads or usable_cpus()
    path = resolve_source(config.model, cache_dir=config.cache_dir, offline=config.offline, revision=config.revision)
    blocks = -(-tokens // config.block_size)
    with closing(open_checkpoint(path)) as checkpoint:
        plan = plan_model(checkpoint)
        precision = Precision(config.quantize, config.exact)
        backend = select_backend(
            config.backend, config.device, threads=threads, cpu_isa=config.cpu_isa, precision=precision
        )
        dtype = choose_dtype(backend, config.dtype, plan.stored_dtype).dtype
        capacity = Capacity(
            max_tokens=tokens, max_seqs=1, max_logit_rows=1, max_segments=1,
            num_blocks=1 + blocks, block_size=config.block_size, max_blocks_per_seq=blocks,
        )  # fmt: skip
        memory = backend.plan(plan.program, dtype, capacity, plan.stored_types)
        pull = WeightReader(checkpoint, plan, block_kinds=backend.block_kinds)
        executable = backend.load(plan.program, dtype, pull, capacity)
        pull.finish()
        run = {"decode": _decode, "prefill": _prefill}[what]
        rates = [run(executable, plan.program.vocab_size, tokens, config.block_size, i) for i in range(repeats + 1)]
        executable.close()
    return {
        "tok_s": rates[1:], "weight_bytes": memory.weight_bytes, "isa": backend.isa, "dtype": dtype,
        "threads": threads,
    }  # fmt: skip


def _ids(vocab_size: int, count: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(vocab_size) for _ in range(count))


def _decode(executable: Any, vocab_size: int, tokens: int, block_size: int, seed: int) -> float:
    from truffula.testing.programs import Part, fill_step

    where = tuple(range(1, 1 + -(-tokens // block_size)))
    ids = _ids(vocab_size, tokens, seed)
    begun = time.perf_counter()
    for position, token in enumerate(ids):
        fill_step(executable.inputs, [Part((token,), position, where)], block_size)
        executable.run()
    return tokens / (time.perf_counter() - begun)


def _prefill(executable: Any, vocab_size: int, tokens: int, block_size: int, seed: int) -> float:
    from truffula.testing.programs import Part, fill_step

    where = tuple(range(1, 1 + -(-tokens // block_size)))
    ids = _ids(vocab_size, tokens, seed)
    begun = time.perf_counter()
    fill_step(executable.inputs, [Part(ids, 0, where)], block_size)
    executable.run()
    return tokens / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
