"""What whole-number arithmetic and rounding change in a model's predictions, on the texts in ``benchmarks/texts``.

    python benchmarks/quantised_error.py                    # all tables, on smollm2; some ten minutes
    python benchmarks/quantised_error.py --tables file      # file, adapter, rounding
    python benchmarks/quantised_error.py --smoke            # a second, on a tiny model with random weights

KL is that of the base's distribution from the other's, in nats per position; top-1 how often both think the same token
likeliest; perplexity is of the texts. *file*: the base computes in float32 on the values of the file. *adapter*: the
same, both with an adapter on top. *rounding*: the base computes in float32 on those values rounded to bfloat16, which
stand for a float checkpoint; it is rounded by ``--quantize q8_0`` and as Q8_0 and Q4_0 files hold it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs
from rich.console import Console
from rich.table import Table

from exactness import texts_as_ids, write_bfloat16
from truffula.kernels.adapters import make_image
from truffula.kernels.backend import Array, QuantisedArray
from truffula.kernels.cpu import CpuBackend
from truffula.lora.peft import BaseFacts, validate_adapter
from truffula.model.load import WeightReader, plan_model
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.predictions import Divergences
from truffula.testing.programs import Driver, capacity_for
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint
from truffula.weights.checkpoint import Checkpoint, TensorInfo
from truffula.weights.open import open_checkpoint
from truffula.weights.sources import resolve_source

ADAPTER = Path(__file__).parents[1] / "examples" / "adapters" / "pirate"


class InBlocks:
    """A float checkpoint with its matrices as a file of ``kind`` holds them: tables Q8_0, vectors as they were."""

    format = "gguf"

    def __init__(self, inner: Checkpoint, kind: str) -> None:
        self._inner, self._kind = inner, kind
        self.tensors: Mapping[str, TensorInfo] = {
            name: structs.replace(info, dtype=self._kind_of(name)) if len(info.shape) > 1 else info
            for name, info in inner.tensors.items()
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _kind_of(self, name: str) -> str:
        return "Q8_0" if "embed_tokens" in name or "lm_head" in name else self._kind

    def blocks(self, name: str) -> QuantisedArray | None:
        from gguf import GGMLQuantizationType, quants

        if len(self.tensors[name].shape) == 1:
            return None
        values = self._inner.read(name).astype("float32")
        kind = GGMLQuantizationType[self._kind_of(name)]
        rows, width = values.shape
        made = quants.quantize(values, kind).reshape(rows, width // 32, -1)
        return QuantisedArray(kind.name, made, (rows, width), lambda some: quants.dequantize(some, kind))

    def read(self, name: str) -> Array:
        blocks = self.blocks(name)
        return self._inner.read(name) if blocks is None else blocks.dequantise()


@dataclass(frozen=True)
class Row:
    name: str
    checkpoint: Any
    dtype: str
    exact: bool = True
    quantize: str = "none"


def logits_of(row: Row, texts: Sequence[list[int]], adapter: Path | None, threads: int) -> list[Array]:
    """Of each text, a sequence of its own."""
    plan, capacity = plan_model(row.checkpoint), capacity_for(max(map(len, texts)))
    backend = CpuBackend(threads, exact=row.exact and row.quantize == "none", quantize=row.quantize)
    pull = WeightReader(row.checkpoint, plan, block_kinds=backend.block_kinds)
    executable = backend.load(plan.program, row.dtype, pull, capacity)
    try:
        slot = None
        if adapter is not None:
            validated = validate_adapter(adapter, plan.program.sites, base=BaseFacts(plan.program.name))
            slot = executable.adapter(make_image(executable.layout, validated.sites, generation=validated.generation))
        return [Driver(executable, capacity, slot).feed(ids) for ids in texts]
    finally:
        executable.close()


def compare(title: str, rows: Sequence[Row], texts: list[list[int]], adapter: Path | None, threads: int) -> Table:
    """The first row is the base."""
    table = Table("computes", "KL mean", "KL 99 %", "top-1 equal", "perplexity", title=title)
    base: list[Array] | None = None
    for row in rows:
        made = logits_of(row, texts, adapter, threads)
        base = made if base is None else base
        found = Divergences()
        for theirs, ours, ids in zip(base, made, texts, strict=True):
            found.add(theirs, ours, ids)
        at = found.result()
        table.add_row(row.name, f"{at.kl_mean:.2e}", f"{at.kl_p99:.2e}", f"{at.same_top1:.1%}", f"{at.perplexity:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="file,adapter,rounding")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one second")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        adapter = ADAPTER
        if options.smoke:
            sizes = tiny_llama_config(hidden_size=64, intermediate_size=96)
            made = write_tiny_checkpoint(Path(scratch) / "tiny", sizes, dtype="bfloat16")
            adapter = write_tiny_adapter(Path(scratch) / "adapter", made)
            floats = open_checkpoint(made)
            file: Any = InBlocks(floats, "Q4_1")
        else:
            file = open_checkpoint(resolve_source("smollm2", cache_dir=None, offline=False))
            (Path(scratch) / "bfloat16").mkdir()
            floats = open_checkpoint(write_bfloat16(file, Path(scratch) / "bfloat16"))
        texts = texts_as_ids(file, smoke=options.smoke)
        show(options.tables.split(","), file, floats, texts, adapter, options.threads)
        floats.close()


def show(tables: list[str], file: Any, floats: Checkpoint, texts: list[list[int]], adapter: Path, threads: int) -> None:
    modes = [
        Row("values, float32", file, "float32"),
        Row("values, bfloat16", file, "bfloat16"),
        Row("blocks, float32", file, "float32", exact=False),
        Row("blocks, bfloat16", file, "bfloat16", exact=False),
    ]
    q8_0, q4_0 = InBlocks(floats, "Q8_0"), InBlocks(floats, "Q4_0")
    rounding = [
        Row("bfloat16's values, float32", floats, "float32"),
        Row("bfloat16's values, bfloat16", floats, "bfloat16"),
        Row("--quantize q8_0, float32", floats, "float32", quantize="q8_0"),
        Row("--quantize q8_0, bfloat16", floats, "bfloat16", quantize="q8_0"),
        Row("Q8_0 file, bfloat16", q8_0, "bfloat16", exact=False),
        Row("Q8_0 file, values, bfloat16", q8_0, "bfloat16"),
        Row("Q4_0 file, bfloat16", q4_0, "bfloat16", exact=False),
        Row("Q4_0 file, values, bfloat16", q4_0, "bfloat16"),
    ]
    known = {"file": (modes, None), "adapter": (modes, adapter), "rounding": (rounding, None)}
    count = sum(map(len, texts))
    for name in tables:
        rows, on_top = known[name]
        Console(width=110).print(compare(f"{name}: {count} positions", rows, texts, on_top, threads))


if __name__ == "__main__":
    main()
