"""What adapters cost: joining, mixed ranks, DoRA, prompts, more adapters than memory, quantised bases.

    python benchmarks/adapters.py                     # all scenarios on smollm2: five minutes, 3 GB of disk
    python benchmarks/adapters.py join zipf           # some of them
    python benchmarks/adapters.py --model MODEL --repeats 5 --markdown adapters.md
    python benchmarks/adapters.py --smoke             # a tiny random model

Engines are processes of their own. The two sides of a row take turns (A B A B), each with prompts of random ids that no
other has; a figure is the median, x the median of the rounds' ratios. *join* is the time to the first token of an
adapter's first request minus that of its second. *zipf*: 32 requests at a time draw their adapters from 1,000, the one
of rank k with a probability in proportion to 1 / k; the memory holds 100, or all. Adapters are random, all-linear,
bfloat16. *quantised* rounds the model to Q8_0; give it a file (``quantised --model X.gguf``) for other formats.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from truffula import LLM, SamplingParams
from truffula.bench.load import zipf_weights
from truffula.bench.server import plan_of, random_adapters
from truffula.config import EngineConfig
from truffula.testing.adapters import (
    PREFIX,
    linear_modules,
    tiny_config,
    tiny_tensors,
    write_adapter,
    write_tiny_adapter,
)
from truffula.testing.files import as_dtype
from truffula.testing.tiny import write_tiny_checkpoint

ROWS = 32
MIXED = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Row:
    """``x``: this side's figure relative to the other's; ``wanted``: what it should be at least (``join``: at most)."""

    what: str
    figure: str
    other: str = ""
    x: str = ""
    wanted: str = ""


class Bench:
    """The model, a folder for adapters, and how much to measure."""

    def __init__(self, model: str, folder: Path, *, repeats: int, tokens: int, count: int) -> None:
        self.model, self.repeats, self.tokens, self.count = model, repeats, tokens, count
        self.plan = plan_of(EngineConfig(model=model))
        self.folder = folder
        self._vocab = next(site.in_features for site in self.plan.interface.sites if site.kind == "embed")
        self._random = random.Random(0)

    def engine(self, **options: Any) -> LLM:
        return LLM(self.model, transport="process", max_running=ROWS, **options)

    def ranks(self, name: str, ranks: Sequence[int]) -> list[str]:
        """Folders of adapters with these ranks."""
        for number, rank in enumerate(ranks):
            random_adapters(self.plan, self.folder, [f"{name}{number}"], rank, first_seed=number)
        return [str(self.folder / f"{name}{number}") for number in range(len(ranks))]

    def dora(self, rank: int) -> list[str]:
        sites = self.plan.interface.sites
        config = tiny_config(
            rank=rank, alpha=2 * rank, targets="all-linear", use_dora=True, base_model_name_or_path=None
        )
        for seed in range(ROWS):
            tensors = tiny_tensors(sites, config, seed=seed, dtype="bfloat16")
            for module, (_, outputs) in linear_modules(sites).items():
                key = f"{PREFIX}{module}.lora_magnitude_vector"
                tensors[key] = as_dtype(np.full(outputs, 0.5, np.float32), "bfloat16")
            write_adapter(self.folder / f"dora{seed}", config, tensors)
        return [str(self.folder / f"dora{seed}") for seed in range(ROWS)]

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(5, self._vocab) for _ in range(length)]

    def rate(self, llm: LLM, adapters: Sequence[str | None], *, prompt: int = 16, tokens: int | None = None) -> float:
        """Tokens a second of one batch: the new ones, or with ``tokens`` 0 those of the prompts."""
        new = self.tokens if tokens is None else max(tokens, 1)
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        prompts = [self.prompt(prompt) for _ in adapters]
        began = time.perf_counter()
        llm.generate(prompts, params, adapters=list(adapters), progress=False)
        return len(adapters) * (prompt if tokens == 0 else new) / (time.perf_counter() - began)

    def turns(self, one: Callable[[], float], other: Callable[[], float]) -> tuple[float, float, float]:
        """Both sides' medians and the median ratio of one to the other, after a round that is not counted."""
        rounds = [(one(), other()) for _ in range(self.repeats + 1)][1:]
        ones, others = zip(*rounds, strict=True)
        return statistics.median(ones), statistics.median(others), statistics.median(a / b for a, b in rounds)

    def row(self, what: str, wanted: float, one: Callable[[], float], other: Callable[[], float]) -> Row:
        mine, base, x = self.turns(one, other)
        return Row(what, f"{mine:.0f} tok/s", f"{base:.0f} tok/s", f"{x:.2f}", f"{wanted:g}")


def join(bench: Bench) -> Iterator[Row]:
    folders = bench.ranks("join", [16] * bench.count)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    with bench.engine(adapters={"first": folders[0]}) as llm:
        bench.rate(llm, [None] * 4)
        time.sleep(1)  # the loading worker starts beside the engine

        def first_token(folder: str) -> float:
            began = time.perf_counter()
            for _ in llm.stream(bench.prompt(8), params, adapter=folder):
                pass
            return 1e3 * (time.perf_counter() - began)

        times = [first_token(folder) - first_token(folder) for folder in folders]
    longest = f"longest {max(times):.1f} ms, the first {times[0]:.1f} ms"
    yield Row(f"join, rank 16, {bench.count} adapters", f"{statistics.median(times):.1f} ms", longest, "", "20 ms")


def ranks(bench: Bench) -> Iterator[Row]:
    mixed = list(islice(cycle(MIXED), ROWS))
    mine, same = bench.ranks("mixed", mixed), bench.ranks("same", [round(statistics.fmean(mixed))] * ROWS)
    with bench.engine() as llm:
        yield bench.row("32 mixed ranks 4-128, of one rank and equal bytes", 0.9,
                        lambda: bench.rate(llm, mine), lambda: bench.rate(llm, same))  # fmt: skip


def dora(bench: Bench) -> Iterator[Row]:
    mine, plain = bench.dora(16), bench.ranks("plain", [16] * ROWS)
    with bench.engine() as llm:
        yield bench.row("32 DoRA of rank 16, of plain", 0.9,
                        lambda: bench.rate(llm, mine), lambda: bench.rate(llm, plain))  # fmt: skip


def prompts(bench: Bench) -> Iterator[Row]:
    folders = bench.ranks("prompt", [16] * ROWS)
    with bench.engine() as llm:
        for count, wanted in ((1, 0.95), (8, 0.9), (ROWS, 0.8)):
            adapters = list(islice(cycle(folders[:count]), ROWS))
            yield bench.row(f"prompts of 128 with {count} adapters, of the base", wanted,
                            lambda adapters=adapters: bench.rate(llm, adapters, prompt=128, tokens=0),
                            lambda: bench.rate(llm, [None] * ROWS, prompt=128, tokens=0))  # fmt: skip


def zipf(bench: Bench) -> Iterator[Row]:
    """Distinct files of rank 8 on two modules, which differ in their last value."""
    many = 1000 if bench.count > 3 else 20
    sites = bench.plan.interface.sites
    source = write_tiny_adapter(bench.folder / "zipf", sites, rank=8, dtype="bfloat16", base_model_name_or_path=None)
    config = (source / "adapter_config.json").read_bytes()
    tensors = bytearray((source / "adapter_model.safetensors").read_bytes())
    folders = [bench.folder / f"zipf{number}" for number in range(many)]
    for number, folder in enumerate(folders):
        tensors[-2:] = np.uint16(0x3C00 + number).tobytes()
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter_model.safetensors").write_bytes(tensors)
    names, weights = [str(folder) for folder in folders], zipf_weights(many, 1.0)
    draw = random.Random(1)
    rounds = [draw.choices(names, cum_weights=weights, k=4 * ROWS) for _ in range(bench.repeats + 1)]
    mine, same = iter(rounds), iter(rounds)
    with bench.engine() as every:
        every.generate([[5]] * many, SamplingParams(max_tokens=1), adapters=names, progress=False)
        with bench.engine(adapter_memory_bytes=many // 10 * every.adapters.list()[0].nbytes) as few:
            what = f"{many} adapters by zipf, memory for {many // 10}, of all resident"
            yield bench.row(what, 0.7, lambda: bench.rate(few, next(mine)), lambda: bench.rate(every, next(same)))


def quantised(bench: Bench) -> Iterator[Row]:
    folders = bench.ranks("quantised", [16] * ROWS)
    gguf = bench.model.endswith(".gguf")
    with bench.engine() if gguf else bench.engine(quantize="q8_0") as llm:
        what, rate = (
            f"32 distinct of rank 16 on {'the file' if gguf else 'q8_0'}, of the base",
            partial(bench.rate, llm),
        )
        yield bench.row(what, 0.7, partial(rate, folders), partial(rate, [None] * ROWS))


SCENARIOS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    "join": join, "ranks": ranks, "dora": dora, "prompts": prompts, "zipf": zipf, "quantised": quantised,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help=f"some of {', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds of each row")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model")
    given = parser.parse_args()
    if unknown := set(given.scenarios) - SCENARIOS.keys():
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        model, options = given.model, {"repeats": given.repeats, "tokens": 64, "count": 12}
        if given.smoke:
            model = str(write_tiny_checkpoint(Path(scratch) / "model"))
            options = {"repeats": 1, "tokens": 4, "count": 3}
        for name in given.scenarios or SCENARIOS:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                rows += SCENARIOS[name](Bench(model, Path(folder), **options))
    table = Table("what", "figure", "compared with", "x", "wanted")
    for row in rows:
        table.add_row(row.what, row.figure, row.other, row.x, row.wanted)
    Console().print(table)
    if given.markdown is not None:
        lines = ["| what | figure | compared with | x | wanted |", "|---|---|---|---|---|"]
        lines += [f"| {row.what} | {row.figure} | {row.other} | {row.x} | {row.wanted} |" for row in rows]
        given.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
