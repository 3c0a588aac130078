"""One sequence after the other through a transformers model, each with the model's own cache object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truffula.errors import KernelError
from truffula.kernels.inputs import Array, Capacity, Int32, SequenceSampling
from truffula.kernels.program import ModelInterface
from truffula.kernels.reference.linear import Segment
from truffula.model.fallback.executable import TransformersExecutable
from truffula.model.fallback.plan import TransformersModel


@dataclass
class _Sequence:
    """The tokens of a sequence slot that are known, its cache, and how many tokens that has seen.

    ``computed`` -1: a pass failed, so the cache is not known to be right.
    """

    tokens: list[int] = field(default_factory=list)
    cache: Any = None
    computed: int = 0


class SerialExecutable(TransformersExecutable):
    """``Executable`` with a cache object per sequence slot.

    The engine's KV blocks account for the memory of the caches and hold nothing: a cache lives as long as no other
    sequence has a block of its sequence. A chunk that does not continue the cache (a step runs again, or its cache is
    gone) computes the tokens before it again.

    ``whole_chunks``: whether the model continues a cache with several tokens; else it gets them one by one.
    """

    def __init__(
        self,
        described: TransformersModel,
        model: Any,
        interface: ModelInterface,
        capacity: Capacity,
        device: torch.device,
    ) -> None:
        super().__init__(described, model, interface, capacity, device)
        self.whole_chunks = True
        self._sequences = [_Sequence() for _ in range(capacity.max_seqs)]
        self._owners: dict[int, int] = {}  # block → slot

    def set_sequence(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        super().set_sequence(slot, prompt_ids, completion_ids, sampling)
        self._owners = {block: owner for block, owner in self._owners.items() if owner != slot}
        self._sequences[slot] = _Sequence([*prompt_ids.tolist(), *completion_ids.tolist()])

    @torch.inference_mode()
    def run(self) -> None:
        i = self.inputs
        logits = np.zeros((i.R, self.interface.vocab_size), np.float32)
        segments = self.adapters.segments(i, i.seg[:, :2])
        for n in range(i.N):
            lo, hi = int(i.q_start[n]), int(i.q_start[n + 1])
            if lo == hi:
                continue
            slot = int(i.seq_slot[n])
            self._take_blocks(slot, i.block_tables[0, n, : -(-int(i.kv_len[n]) // self.capacity.block_size)])
            active = [segment for segment in segments if segment.lo <= lo < segment.hi]
            wanted = np.flatnonzero((i.logit_rows[: i.R] >= lo) & (i.logit_rows[: i.R] < hi))
            rows = i.logit_rows[wanted] - lo
            logits[wanted] = self._chunk(slot, i.token_ids[lo:hi], int(i.kv_len[n]) - (hi - lo), rows, active)
        self._logits = logits

    def release_kv(self, group: int, blocks: Int32) -> None:
        del group
        for block in blocks.tolist():
            self._drop_cache(self._owners.pop(block, -1))

    def close(self) -> None:
        super().close()
        self._sequences = [_Sequence() for _ in self._sequences]
        self._owners.clear()

    def _chunk(self, slot: int, tokens: Int32, start: int, rows: Array, active: list[Segment]) -> Array:
        """float32 logits at ``rows`` of ``tokens``, which are at positions from ``start`` on."""
        sequence = self._sequences[slot]
        sequence.tokens[start:] = tokens.tolist()
        if len(sequence.tokens) != start + len(tokens):
            raise KernelError(f"slot {slot} begins at position {start}, but {len(sequence.tokens)} tokens are known.")
        if sequence.computed != start:
            sequence.cache, sequence.computed = None, 0
            for at in range(0, start, self.capacity.max_tokens):
                some = np.asarray(sequence.tokens[at : min(start, at + self.capacity.max_tokens)], np.int32)
                self._advance(sequence, some, np.zeros(0, np.int64), active)
        return self._advance(sequence, tokens, rows, active)

    def _advance(self, sequence: _Sequence, tokens: Int32, rows: Array, active: list[Segment]) -> Array:
        """Continue a sequence by ``tokens``."""
        pieces = [(0, len(tokens))]
        if sequence.computed and not self.whole_chunks:
            pieces = [(at, at + 1) for at in range(len(tokens))]
        found: list[Tensor] = []
        before, sequence.computed = sequence.computed, -1
        for lo, hi in pieces:
            kept = rows[(rows >= lo) & (rows < hi)] - lo
            self.hooks.prepare(None, active, None, active)
            cache = self.described.trace.cache
            past = {} if sequence.cache is None else {cache.name: sequence.cache}
            logits, out = self.forward(tokens[lo:hi], kept, use_cache=True, **past)
            sequence.cache = out[cache.name]
            found.append(logits)
        sequence.computed = before + len(tokens)
        return np.asarray(torch.cat(found).cpu().numpy())

    def _take_blocks(self, slot: int, blocks: Int32) -> None:
        """Note the blocks of a slot's sequence; another slot that had one of them has ended."""
        for block in blocks.tolist():
            owner = self._owners.get(block, slot)
            if owner != slot:
                self._drop_cache(owner)
            self._owners[block] = slot

    def _drop_cache(self, slot: int) -> None:
        if slot >= 0:
            self._sequences[slot].cache, self._sequences[slot].computed = None, -1
