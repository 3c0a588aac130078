"""How long a running stream waits while adapters are loaded: the longest gap between two of its tokens.

    python benchmarks/adapter_stall.py                     # ranks 16, 64 and 256 on smollm2, 8 adapters of each
    python benchmarks/adapter_stall.py MODEL --ranks 8 128 --count 20
    python benchmarks/adapter_stall.py --smoke             # a tiny random model

One stream of the base runs in an engine of its own process while another thread loads random all-linear adapters, one
after the other. Two columns compare gaps with and without loads; the loading worker shares the cores with the engine,
so a gap of twice the idle one is no stall on a machine of two. To compare two versions, run this file with each one's
interpreter in turn.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from truffula import LLM, SamplingParams
from truffula.bench.server import random_adapters
from truffula.model.load import plan_model
from truffula.testing.tiny import write_tiny_checkpoint
from truffula.weights.open import open_checkpoint

IDLE_TOKENS = 40


@dataclass
class Loads:
    """Adapters loaded one after the other in a thread, once ``begin`` is set; (start, end) of each."""

    llm: LLM
    folders: list[tuple[str, Path]]
    begin: threading.Event = field(default_factory=threading.Event)
    spans: list[tuple[float, float]] = field(default_factory=list)

    def run(self) -> None:
        self.begin.wait()
        for name, folder in self.folders:
            started = time.perf_counter()
            self.llm.adapters.load(name, folder)
            self.spans.append((started, time.perf_counter()))
        for name, _ in self.folders:
            self.llm.adapters.unload(name)


def gaps_while_loading(llm: LLM, folders: list[tuple[str, Path]]) -> tuple[list[float], list[float], list[float]]:
    """Seconds between tokens of a stream before the loads and during them; and what each load took."""
    loads = Loads(llm, folders)
    thread = threading.Thread(target=loads.run)
    thread.start()
    times: list[float] = []
    began = 0.0
    params = SamplingParams(max_tokens=llm.info.max_model_len - 16, temperature=0.0, ignore_eos=True)
    for _ in llm.stream([5, 6, 7], params):
        times.append(time.perf_counter())
        if len(times) == IDLE_TOKENS:
            began = time.perf_counter()
            loads.begin.set()
        if len(times) > IDLE_TOKENS and not thread.is_alive():
            break
    loads.begin.set()
    thread.join()
    gaps = list(pairwise(times))
    idle = [late - early for early, late in gaps if late < began][4:]
    during = [late - early for early, late in gaps if late >= began]
    return idle, during, [end - start for start, end in loads.spans]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--count", type=int, default=8, help="adapters of each rank")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model")
    given = parser.parse_args()
    logging.getLogger("truffula").setLevel(logging.ERROR)  # of each adapter: that it is for another base
    with tempfile.TemporaryDirectory() as scratch:
        if given.smoke:
            given.model, given.ranks, given.count = str(write_tiny_checkpoint(Path(scratch) / "model")), [4], 3
        with LLM(given.model, transport="process") as llm:
            checkpoint = open_checkpoint(Path(llm.info.path))
            plan = plan_model(checkpoint)
            checkpoint.close()
            print("rank  adapters  load ms (median)  idle gap ms (median, longest)  while loading (median, longest)")
            for rank in given.ranks:
                names = [f"r{rank}-{number}" for number in range(given.count)]
                folder = Path(scratch) / str(rank)
                random_adapters(plan, folder, names, rank)
                idle, during, loads = gaps_while_loading(llm, [(name, folder / name) for name in names])
                gaps = (statistics.median(idle), max(idle), statistics.median(during), max(during))
                row = [1e3 * seconds for seconds in gaps]
                print(
                    f"{rank:4}  {len(loads):8}  {1e3 * statistics.median(loads):16.0f}  {row[0]:13.1f}  {row[1]:14.1f}"
                    f"  {row[2]:15.1f}  {row[3]:14.1f}"
                )


if __name__ == "__main__":
    main()
