"""The server's own share: output tokens per second over HTTP and from ``LLM.generate``, on the same load.

    python benchmarks/against_llm.py smollm2 [--repeats 3] [--clients 8] [--rank 16]
    python benchmarks/against_llm.py --smoke       # a tiny random model

Each has the machine for itself: first a server, then ``LLM`` in this process. The first run of each warms up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from truffula import LLM, SamplingParams
from truffula.bench.load import Load, run_load
from truffula.bench.server import end_children_on_sigterm, plan_of, random_adapters, truffula_server
from truffula.config import EngineConfig
from truffula.testing.tiny import write_tiny_checkpoint


def over_http(config: EngineConfig, adapters: Path, loads: list[Load]) -> list[float]:
    with truffula_server(config, adapters) as server:
        url = server.wait()
        runs = [run_load(url, load) for load in loads]
    errors = [error for run in runs for error in run.errors]
    assert not errors, errors[0]
    return [run.output_tokens / run.wall_s for run in runs[1:]]


def in_process(config: EngineConfig, adapters: Path, loads: list[Load]) -> list[float]:
    rates = []
    with LLM(config.model, adapters={path.name: str(path) for path in adapters.iterdir()}) as llm:
        for load in loads:
            prompts = [load.prompt(client, 0) for client in range(load.clients)]
            params = SamplingParams(temperature=0, max_tokens=load.max_tokens, ignore_eos=True)
            begun = time.monotonic()
            outputs = llm.generate(prompts, params, adapters=[load.adapter(c) for c in range(load.clients)])
            rates.append(sum(len(output.token_ids) for output in outputs) / (time.monotonic() - begun))
    return rates[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--repeats", type=int, default=3, help="runs after a warm-up")
    parser.add_argument("--clients", type=int, default=8, help="clients, and distinct adapters")
    parser.add_argument("--rank", type=int, default=16, help="rank of the random all-linear adapters")
    parser.add_argument("--smoke", action="store_true", help="one run on a tiny model")
    asked = parser.parse_args()
    end_children_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="truffula-bench-") as folder:
        model, tokens = asked.model, 64
        if asked.smoke:
            model, tokens = str(write_tiny_checkpoint(Path(folder, "tiny"))), 4
            asked.repeats, asked.clients, asked.rank = 1, 2, 2
        config, adapters = EngineConfig(model=model), Path(folder, "adapters")
        plan = plan_of(config)
        names = [f"bench-{i:03d}" for i in range(asked.clients)]
        random_adapters(plan, adapters, names, asked.rank)
        loads = [
            Load(asked.clients, 1, 105, tokens, tuple(names), plan.program.vocab_size, seed)
            for seed in range(asked.repeats + 1)
        ]
        http = statistics.median(over_http(config, adapters, loads))
        llm = statistics.median(in_process(config, adapters, loads))
    print(f"output tokens/s: HTTP {http:.1f}, LLM.generate {llm:.1f}; HTTP / LLM.generate {http / llm:.3f}")


if __name__ == "__main__":
    main()
