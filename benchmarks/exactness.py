"""How far each computation of a bfloat16 checkpoint is from transformers' in float32, on real text.

    python benchmarks/exactness.py            # SmolLM2-135M-Instruct's values in bfloat16; needs torch and transformers
    python benchmarks/exactness.py FOLDER     # a model folder of your own
    python benchmarks/exactness.py --smoke    # a second, on a tiny model with random weights

*Logits off by* is the largest absolute difference of two logits, and what 99 % of the positions stay below. KL is that
of transformers' float32 distribution from the other's, in nats per position; top-1 how often both think the same token
likeliest; perplexity is of the texts in ``benchmarks/texts``. ``smollm2`` is a quantised file: its values are rounded
to bfloat16 and written as a Hugging Face folder first, so that both sides read the same numbers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
from rich.console import Console
from rich.table import Table

from truffula.kernels.backend import Array
from truffula.kernels.select import Precision, select_backend
from truffula.model.load import WeightReader, plan_model
from truffula.testing.files import write_safetensors
from truffula.testing.oracle import Oracle
from truffula.testing.predictions import Divergences
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint
from truffula.text.tokenizer import load_tokenizer
from truffula.weights.checkpoint import Checkpoint
from truffula.weights.open import open_checkpoint
from truffula.weights.sources import resolve_source
from truffula.weights.texts import read_texts
from truffula.weights.tying import Tie

TEXTS = Path(__file__).parent / "texts"
Compute = Callable[[list[int]], Array]
ROWS = (
    ("transformers", "bfloat16"),
    ("cpu", "float32"),
    ("cpu", "bfloat16"),
    ("reference", "bfloat16"),
)


def write_bfloat16(checkpoint: Checkpoint, folder: Path) -> Path:
    """The values of ``checkpoint`` rounded to bfloat16, as a folder that transformers reads."""
    tied = plan_model(checkpoint).tying.tie is not Tie.SEPARATE
    config = {**checkpoint.config, "torch_dtype": "bfloat16", "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in read_texts(checkpoint.path).tokenizer.items():
        (folder / name).write_bytes(content)
    tensors = {name: checkpoint.read(name).astype(ml_dtypes.bfloat16) for name in checkpoint.tensors}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def texts_as_ids(checkpoint: Checkpoint, *, smoke: bool) -> list[list[int]]:
    tokenizer = load_tokenizer(read_texts(checkpoint.path).tokenizer)
    if smoke or tokenizer is None:
        return [list(range(1, 40)), list(range(50, 70))]
    return [tokenizer.encode(path.read_text(encoding="utf-8")) for path in sorted(TEXTS.glob("*.txt"))]


@contextmanager
def ours(checkpoint: Checkpoint, backend: str, dtype: str, longest: int, threads: int) -> Iterator[Compute]:
    plan, capacity = plan_model(checkpoint), capacity_for(longest)
    chosen = select_backend(backend, "cpu", threads=threads, precision=Precision(exact=True))
    pull = WeightReader(checkpoint, plan, block_kinds=chosen.block_kinds)
    executable = chosen.load(plan.program, dtype, pull, capacity)
    try:
        yield lambda ids: Driver(executable, capacity).feed(ids)
    finally:
        executable.close()


def compare(checkpoint: Checkpoint, texts: list[list[int]], threads: int) -> Table:
    tied = plan_model(checkpoint).tying.tie is not Tie.SEPARATE
    exact = Oracle(checkpoint.path, tied=tied)
    base = [exact.logits(ids) for ids in texts]
    del exact
    title = f"against transformers in float32, {sum(map(len, texts))} positions"
    table = Table("computes", "logits off by", "99 %", "KL mean", "KL 99 %", "top-1 equal", "perplexity", title=title)

    def row(name: str, compute: Compute) -> None:
        found = Divergences()
        for ids, logits in zip(texts, base, strict=True):
            found.add(logits, compute(ids), ids)
        at = found.result()
        table.add_row(
            name, f"{at.logit_diff_max:.1e}", f"{at.logit_diff_p99:.1e}", f"{at.kl_mean:.2e}", f"{at.kl_p99:.2e}",
            f"{at.same_top1:.2%}", f"{at.perplexity:.3f}",
        )  # fmt: skip

    it = iter(base)
    row("transformers, float32", lambda _: next(it))
    for backend, dtype in ROWS:
        if backend == "transformers":
            row(f"{backend}, {dtype}", Oracle(checkpoint.path, tied=tied, dtype=dtype).logits)
            continue
        with ours(checkpoint, backend, dtype, max(map(len, texts)), threads) as compute:
            row(f"truffula {backend}, {dtype}", compute)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one second")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        if options.smoke:
            write_tiny_checkpoint(path, tiny_llama_config(), dtype="bfloat16")
        else:
            path = resolve_source(options.model, cache_dir=None, offline=False)
            if path.is_file():
                source = open_checkpoint(path)
                path = write_bfloat16(source, Path(scratch))
                source.close()
        checkpoint = open_checkpoint(path)
        Console(width=110).print(compare(checkpoint, texts_as_ids(checkpoint, smoke=options.smoke), options.threads))
        checkpoint.close()


if __name__ == "__main__":
    main()
