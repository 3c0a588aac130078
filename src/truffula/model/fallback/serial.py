"""Sequences through a transformers model with its own cache objects: one after the other, or stacked where a cache is
states of a fixed size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class _Stack:
    """A cache object, and the slots of the sequences that have a row in each of its tensors, in order."""

    cache: Any
    slots: tuple[int, ...]


@dataclass
class _Sequence:
    """The tokens of a sequence slot that are known, the cache that has its row, and how many tokens that has seen.

    ``computed`` -1: a pass failed, so the cache is not known to be right. ``acting``: from which positions on which
    segments act (activated LoRA acts from its invocation on).
    """

    tokens: list[int] = field(default_factory=list)
    stack: _Stack | None = None
    computed: int = 0
    acting: list[tuple[int, list[Segment]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Chunk:
    """Rows ``lo .. hi`` of a step: tokens of the sequence in ``slot`` from position ``start`` on."""

    slot: int
    lo: int
    hi: int
    start: int

    @property
    def form(self) -> tuple[int, bool]:
        """Chunks with the same can be computed in one pass: their tokens, and whether they continue a cache."""
        return self.hi - self.lo, self.start > 0


class SerialExecutable(TransformersExecutable):
    """``Executable`` with the model's own cache objects, one of each sequence or one that several share as its rows.

    The engine's KV blocks account for the memory of the caches and hold nothing: a cache lives as long as no other
    sequence has a block of its sequence. A chunk that does not continue the cache (a step runs again, or its cache is
    gone) computes the tokens before it again.

    ``whole_chunks``: whether the model continues a cache with several tokens; else it gets them one by one. ``stacks``:
    whether sequences whose chunks have one form are computed in one pass, their caches stacked.
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
        self.whole_chunks, self.stacks = True, False
        self._sequences = [_Sequence() for _ in range(capacity.max_seqs)]
        self._owners: dict[int, int] = {}  # block → slot

    def set_sequence(self, slot: int, prompt_ids: Int32, completion_ids: Int32, sampling: SequenceSampling) -> None:
        super().set_sequence(slot, prompt_ids, completion_ids, sampling)
        self._owners = {block: owner for block, owner in self._owners.items() if owner != slot}
        self._sequences[slot] = _Sequence([*prompt_ids.tolist(), *completion_ids.tolist()])

    @torch.inference_mode()
    def run(self) -> None:
        i = self.inputs
        self._logits = np.zeros((i.R, self.interface.vocab_size), np.float32)
        segments = self.adapters.segments(i, i.seg[:, :2])
        groups: dict[Any, list[_Chunk]] = {}
        for n in range(i.N):
            lo, hi = int(i.q_start[n]), int(i.q_start[n + 1])
            if lo == hi:
                continue
            chunk = _Chunk(int(i.seq_slot[n]), lo, hi, int(i.kv_len[n]) - (hi - lo))
            self._take_blocks(chunk.slot, i.block_tables[0, n, : -(-int(i.kv_len[n]) // self.capacity.block_size)])
            self._catch_up(chunk, segments)
            groups.setdefault(chunk.form if self.stacks else n, []).append(chunk)
        for chunks in groups.values():
            rows = np.concatenate([np.arange(chunk.lo, chunk.hi) for chunk in chunks])
            wanted = np.searchsorted(rows, i.logit_rows[: i.R])
            wanted[wanted == len(rows)] = 0
            found = np.flatnonzero(rows[wanted] == i.logit_rows[: i.R])
            self._logits[found] = self._advance(
                [chunk.slot for chunk in chunks],
                i.token_ids[rows].reshape(len(chunks), -1),
                wanted[found],
                _of_rows(segments, rows),
            )

    def release_kv(self, group: int, blocks: Int32) -> None:
        del group
        for block in blocks.tolist():
            self._drop_cache(self._owners.pop(block, -1))

    def close(self) -> None:
        super().close()
        self._sequences = [_Sequence() for _ in self._sequences]
        self._owners.clear()

    def _catch_up(self, chunk: _Chunk, segments: Sequence[Segment]) -> None:
        """Note the tokens of a chunk, and let the cache of its sequence end where the chunk begins."""
        sequence, start = self._sequences[chunk.slot], chunk.start
        active = [segment for segment in segments if segment.lo <= chunk.lo < segment.hi]
        acting = sequence.acting = [(at, some) for at, some in sequence.acting if at < start]
        if not acting or not _act_alike(acting[-1][1], active):
            acting.append((start if acting else 0, active))
        sequence.tokens[start:] = self.inputs.token_ids[chunk.lo : chunk.hi].tolist()
        if len(sequence.tokens) != start + chunk.hi - chunk.lo:
            known = f"{len(sequence.tokens)} tokens are known"
            raise KernelError(f"slot {chunk.slot} begins at position {start}, but {known}.")
        if sequence.computed == start:
            return
        sequence.stack, sequence.computed = None, 0
        for (lo, some), hi in zip(acting, [*(at for at, _ in acting[1:]), start], strict=True):
            for at in range(lo, hi, self.capacity.max_tokens):
                tokens = np.asarray([sequence.tokens[at : min(hi, at + self.capacity.max_tokens)]], np.int32)
                self._advance([chunk.slot], tokens, np.zeros(0, np.int64), some)

    def _advance(self, slots: list[int], tokens: Int32, rows: Array, active: list[Segment]) -> Array:
        """Continue the sequences in ``slots`` by ``tokens [N, T]``: float32 logits of ``rows`` of those N·T tokens.

        The segments of several sequences are in rows of the N·T tokens; those of one act on all that modules see.
        """
        sequences, count = [self._sequences[slot] for slot in slots], tokens.shape[1]
        stack, before = self._stacked(tuple(slots)), [sequence.computed for sequence in sequences]
        pieces = [(0, count)]
        if before[0] and not self.whole_chunks:
            pieces = [(at, at + 1) for at in range(count)]
        for sequence in sequences:
            sequence.computed = -1
        found: list[Tensor] = []
        wanted, cache = np.unique(rows % count), self.described.trace.cache
        for lo, hi in pieces:
            kept = wanted[(wanted >= lo) & (wanted < hi)]
            if len(slots) == 1:
                self.hooks.prepare(None, active, None, active)
            else:
                seen, scored = (
                    np.add.outer(np.arange(len(slots)) * count, of).ravel() for of in (np.arange(lo, hi), kept)
                )
                self.hooks.prepare(len(seen), _of_rows(active, seen), len(scored), _of_rows(active, scored))
            past = {} if stack is None else {cache.name: stack.cache}
            logits, out = self.forward(tokens[:, lo:hi], kept - lo, use_cache=True, **past)
            stack = _Stack(out[cache.name], tuple(slots))
            found.append(logits)
        for sequence, start in zip(sequences, before, strict=True):
            sequence.stack, sequence.computed = stack, start + count
        scores = torch.cat(found, 1).cpu().numpy()
        return np.asarray(scores[rows // count, np.searchsorted(wanted, rows % count)])

    def _stacked(self, slots: tuple[int, ...]) -> _Stack | None:
        """The stack of these sequences, or None when they are new. Those that stay behind in a former one leave it."""
        stacks = [self._sequences[slot].stack for slot in slots]
        if all(stack is stacks[0] for stack in stacks) and (stacks[0] is None or stacks[0].slots == slots):
            return stacks[0]
        for stack in {id(stack): stack for stack in stacks if stack is not None}.values():
            for slot in set(stack.slots).difference(slots):
                if self._sequences[slot].stack is stack:
                    self._sequences[slot].stack = _joined([stack], (slot,))
        return _joined([stack for stack in stacks if stack is not None], slots)

    def _take_blocks(self, slot: int, blocks: Int32) -> None:
        """Note the blocks of a slot's sequence; another slot that had one of them has ended."""
        for block in blocks.tolist():
            owner = self._owners.get(block, slot)
            if owner != slot:
                self._drop_cache(owner)
            self._owners[block] = slot

    def _drop_cache(self, slot: int) -> None:
        if slot >= 0:
            sequence = self._sequences[slot]
            sequence.stack, sequence.computed = None, -1
            sequence.acting.clear()  # it keeps no adapter in memory


def _act_alike(some: Sequence[Segment], others: Sequence[Segment]) -> bool:
    """Whether the same adapters act with the same weights."""
    return [(id(one.ops), one.weight) for one in some] == [(id(one.ops), one.weight) for one in others]


def _of_rows(segments: Sequence[Segment], rows: Array) -> list[Segment]:
    """The segments that act on some of ``rows``, which ascend, by their places among them."""
    places = [(segment, *np.searchsorted(rows, (segment.lo, segment.hi)).tolist()) for segment in segments]
    return [replace(segment, lo=lo, hi=hi) for segment, lo, hi in places if lo < hi]


def _joined(stacks: Sequence[_Stack], slots: tuple[int, ...]) -> _Stack:
    """A stack of ``slots``, each of which has its row in the stack at its place."""
    rows = [stack.slots.index(slot) for stack, slot in zip(stacks, slots, strict=True)]
    return _Stack(_join([stack.cache for stack in stacks], rows), slots)


def _join(parts: Sequence[Any], rows: Sequence[int]) -> Any:
    """The rows of all tensors in cache objects that are equal otherwise, as one such object."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part[row : row + 1] for part, row in zip(parts, rows, strict=True)])
    if isinstance(first, list | tuple):
        return type(first)(_join(inner, rows) for inner in zip(*parts, strict=True))
    if isinstance(first, dict):
        return {key: _join([part[key] for part in parts], rows) for key in first}
    if type(first).__module__.startswith("transformers") and not hasattr(first, "model_type"):
        made = copy.copy(first)
        made.__dict__.update(_join([vars(part) for part in parts], rows))
        return made
    if any(part != first for part in parts):
        raise KernelError(f"a cache holds {first!r} for one sequence, another value for the next.")
    return first
