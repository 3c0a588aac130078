"""What whole-number arithmetic and rounding to Q8_0 change in a model's predictions, on a text written for it.

    python benchmarks/quantised_error.py [MODEL]      # an alias, a folder or a .gguf file; default smollm2
    python benchmarks/quantised_error.py --smoke      # a second, on a tiny model with random weights

The base of comparison computes in float32 on the values of the file. KL is that of the base's distribution from the
other's, in nats per position; top-1 how often both think the same token likeliest; perplexity is of the text.
``quantize q8_0`` rounds the values of the file once more, as it would those of a float checkpoint.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from truffula.kernels.backend import Array
from truffula.kernels.cpu import CpuBackend
from truffula.kernels.inputs import Capacity
from truffula.model.load import plan_model, puller
from truffula.testing.programs import Part, fill_step
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint
from truffula.text.tokenizer import load_tokenizer
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.sources import resolve_source

TEXT = """\
The harbour town had two bakeries, and for as long as anyone could remember they had stood on opposite sides of the
same square. Mrs. Aldous baked before dawn and sold out by nine; the Ferreira brothers opened at noon and kept their
ovens hot until the last boat came in. Nobody thought of them as rivals. People bought rolls from one and cake from
the other, and the children knew which door to knock on when it rained.

In the spring of the year the bridge was repaired, the ferry company announced that it would move its landing a mile
to the north. The reason given was depth: larger ships needed deeper water, and the old quay had been silting up for
a decade. Engineers came with poles and instruments, measured the bottom at forty points, and drew a map on which
the square appeared as a small grey rectangle with no name. The map hung in the town hall for a month. Then the work
began.

How does a square survive when the road that feeds it is turned away? The first summer was quiet. The second was
worse. Mrs. Aldous cut her hours, then her flour order, and finally the wages of the boy who swept the floor. The
brothers tried lunches, then music, then a sign on the new road with an arrow and the word BREAD in red letters two
feet high. It was the sign that worked, though not in the way they had hoped. A photographer passing through took
its picture, and the picture was printed in a magazine next to an article about stubbornness.

Water boils at a lower temperature on a mountain because the pressure of the air is lower there. At sea level it
takes 100 degrees Celsius; at 3,000 metres about 90 are enough. Cooks who live high up know this without knowing
why: beans take longer, eggs are soft when they should be hard, and tea never tastes quite as strong. A pressure
cooker solves the problem by making its own weather. The steam cannot escape, the pressure rises, and with it the
boiling point.

def mean(values):
    # The average of a list of numbers; an empty list has none.
    if not values:
        raise ValueError("mean of an empty list")
    return sum(values) / len(values)

To change a tyre, first loosen the nuts a little while the wheel is still on the ground. Then raise the car with the
jack until the wheel turns freely, take the nuts off, and pull the wheel towards you. Put the spare on, tighten the
nuts by hand, lower the car, and tighten them again in the order of a star. Check the pressure at the next petrol
station.
"""


def logits_of(checkpoint: Checkpoint, backend: CpuBackend, dtype: str, ids: list[int]) -> Array:
    plan = plan_model(checkpoint)
    blocks = -(-len(ids) // 16)
    capacity = Capacity(
        max_tokens=len(ids), max_seqs=1, max_logit_rows=len(ids), max_segments=1, num_blocks=blocks + 1, block_size=16,
        max_blocks_per_seq=blocks,
    )  # fmt: skip
    pull = puller(checkpoint, plan, block_kinds=backend.block_kinds)
    executable = backend.load(plan.program, dtype, pull, capacity)
    fill_step(executable.inputs, [Part(tuple(ids), 0, tuple(range(1, blocks + 1)), None, logits="all")], 16)
    executable.run()
    made = executable.logits()
    executable.close()
    return made


def log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare(checkpoint: Checkpoint, ids: list[int], threads: int) -> Table:
    table = Table("computes", "KL mean", "KL 99 %", "top-1 equal", "perplexity", title=f"{len(ids)} positions")
    rows = {
        "values, float32": (CpuBackend(threads, exact=True), "float32"),
        "values, bfloat16": (CpuBackend(threads, exact=True), "bfloat16"),
        "blocks, float32": (CpuBackend(threads), "float32"),
        "blocks, bfloat16": (CpuBackend(threads), "bfloat16"),
        "quantize q8_0, float32": (CpuBackend(threads, quantize="q8_0", exact=True), "float32"),
        "quantize q8_0, bfloat16": (CpuBackend(threads, quantize="q8_0", exact=True), "bfloat16"),
    }
    base: Array | None = None
    for name, (backend, dtype) in rows.items():
        found = log_softmax(logits_of(checkpoint, backend, dtype, ids))
        base = found if base is None else base
        divergence = (np.exp(base) * (base - found)).sum(-1)
        same = float((base.argmax(-1) == found.argmax(-1)).mean())
        perplexity = float(np.exp(-np.take_along_axis(found[:-1], np.array(ids[1:])[:, None], -1).mean()))
        table.add_row(
            name, f"{divergence.mean():.2e}", f"{np.quantile(divergence, 0.99):.2e}", f"{same:.1%}", f"{perplexity:.3f}"
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one second")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.smoke:
            path = write_tiny_checkpoint(Path(scratch), tiny_llama_config(hidden_size=64, intermediate_size=96))
        else:
            path = resolve_source(options.model, cache_dir=None, offline=False)
        checkpoint = open_checkpoint(path)
        tokenizer = load_tokenizer(checkpoint.tokenizer_files())
        ids = list(range(1, 40)) if tokenizer is None or options.smoke else tokenizer.encode(TEXT)
        Console().print(compare(checkpoint, ids, options.threads))
        checkpoint.close()


if __name__ == "__main__":
    main()
