"""A base on an executable, with adapters read from disk: what the parity tests of lora/ run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from truffula.kernels.backend import Backend
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import Program
from truffula.lora.base import BaseWeights, base_source
from truffula.lora.image import ImageWriter, map_image
from truffula.lora.peft import BaseFacts, validate_adapter
from truffula.model.load import WeightReader, plan_model
from truffula.testing.oracle import Oracle
from truffula.testing.programs import Part, fill_step
from truffula.weights.open import open_checkpoint
from truffula.weights.tying import Tie

Float32 = npt.NDArray[np.float32]
BLOCK = 4
PROMPT_TOKENS = 11


class Served:
    """The base at ``path`` with any number of adapters in slots; runs whole prompts in one step. ``packed``: blocks
    that the backend multiplies stay as they are. ``more_ids``: rows for added tokens."""

    def __init__(self, path: Path, backend: Backend, *, packed: bool = False, more_ids: int = 0) -> None:
        self.path = path
        checkpoint = open_checkpoint(path)
        plan = plan_model(checkpoint, more_ids=more_ids)
        self.weights = BaseWeights(base_source(plan, checkpoint))
        pull = WeightReader(checkpoint, plan, block_kinds=backend.block_kinds if packed else frozenset())
        self.program: Program = plan.program
        self.tied = plan.tying.tie is not Tie.SEPARATE
        rows, blocks = 48 * PROMPT_TOKENS, -(-PROMPT_TOKENS // BLOCK)
        capacity = Capacity(
            rows,
            48,
            rows,
            48,
            num_blocks=1 + 48 * blocks,
            block_size=BLOCK,
            max_blocks_per_seq=blocks,
            num_states=1 + 48 * blocks,
        )
        self.executable = backend.load(plan.program, "float32", pull, capacity)
        pull.finish()
        self._blocks = blocks

    def add(self, adapter: Path) -> int:
        validated = validate_adapter(adapter, self.program.sites, base=BaseFacts("tiny-base", self.weights))
        image = self.path.parent / "image"
        writer = ImageWriter(validated.generation, validated.rank, validated.sites, self.executable.layout)
        writer.write(image)
        mapped = map_image(image, writer.header)
        image.unlink()
        return self.executable.adapter(mapped)

    def run(self, rows: list[tuple[int | None, list[int]]]) -> list[Float32]:
        """Logits of every token of each prompt; rows are (slot, prompt) sorted as a step wants them."""
        parts = [
            Part(tuple(ids), 0, tuple(range(1 + n * self._blocks, 1 + (n + 1) * self._blocks)), slot, "all")
            for n, (slot, ids) in enumerate(rows)
        ]
        fill_step(self.executable.inputs, parts, BLOCK)
        self.executable.run()
        return np.split(self.executable.logits(), np.cumsum([len(ids) for _, ids in rows])[:-1])

    def prompt(self, seed: int) -> list[int]:
        return np.random.default_rng(seed).integers(3, self.program.vocab_size, PROMPT_TOKENS).tolist()

    def peft(self, adapter: Path | None, ids: list[int]) -> Float32:
        return Oracle(self.path, tied=self.tied, adapter=adapter).logits(ids)
