"""What a step's kernels read: the inputs and the lists of items, in one buffer that is uploaded at once.

All lists are made of numpy arrays on the host, whose cost does not depend on the model's depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from truffula.errors import KernelError
from truffula.kernels.inputs import Array, Capacity, Int32, StepInputs
from truffula.kernels.triton.device import Device

Int64 = npt.NDArray[np.int64]
PIECE_ROWS = 16
"""Rows of a piece at most: an item of ``finish`` and of the shrinks."""
COUNTS = 8
Shapes = dict[str, tuple[tuple[int, ...], type[np.generic]]]


class StepMemory:
    """Arrays of the host with a copy on the device each, uploaded together. They never move."""

    def __init__(self, device: Device, shapes: Shapes) -> None:
        self._device = device
        ends, end = {}, 0
        for name, (shape, dtype) in shapes.items():
            begin = -(-end // 16) * 16
            end = begin + math.prod(shape) * np.dtype(dtype).itemsize
            ends[name] = (begin, end)
        self._staged, self._there = device.staging(end), torch.empty(end, dtype=torch.uint8, device=device.torch_device)
        host = self._staged.numpy()
        self.host: dict[str, Array] = {
            name: host[begin:end].view(shapes[name][1]).reshape(shapes[name][0]) for name, (begin, end) in ends.items()
        }
        self.there: dict[str, Tensor] = {
            name: self._there[begin:end].view(_TORCH[np.dtype(shapes[name][1])]).view(shapes[name][0])
            for name, (begin, end) in ends.items()
        }

    def upload(self) -> None:
        self._device.upload(self._there, self._staged)


_TORCH = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}  # fmt: skip


@dataclass(frozen=True)
class Lists:
    """``pieces`` [n, 4]: rows lo .. hi, first entry and number of entries of the adapters that act on all of them;
    ``shrinks`` [m, 4]: rows lo .. hi of an entry, and its plane of h. An entry is a segment: its index."""

    pieces: Int32
    shrinks: Int32
    entries: Int64


def row_lists(rows: int, spans: Sequence[tuple[int, int]]) -> Lists:
    """Cut ``rows`` rows into pieces, in each of which the same of the segments ``spans`` act, in their order."""
    edges = sorted({0, rows, *(edge for span in spans for edge in span)})
    pieces: list[tuple[int, int, int, int]] = []
    shrinks: list[tuple[int, int, int, int]] = []
    entries: list[int] = []
    begins, ends = np.array(spans, np.int64).reshape(-1, 2).T
    cuts = np.array(edges, np.int64)
    inside = (begins <= cuts[:-1, None]) & (cuts[1:, None] <= ends)
    for (lo, hi), row in zip(pairwise(edges), inside, strict=True):
        acting, first = np.flatnonzero(row).tolist(), len(entries)
        entries += acting
        for at in range(lo, hi, PIECE_ROWS):
            end = min(at + PIECE_ROWS, hi)
            pieces.append((at, end, first, len(acting)))
            shrinks += [(at, end, first + plane, plane) for plane in range(len(acting))]
    return Lists(_table(pieces, 4), _table(shrinks, 4), np.array(entries, np.int64))


@dataclass(frozen=True)
class AttentionLists:
    """``items`` [n, 5] of ``attention`` and ``merges`` [m, 3]; ``partial_rows``: of its workspace."""

    items: Int32
    merges: Int32
    partial_rows: int


@dataclass(frozen=True)
class AttentionCut:
    """``split`` keys; ``queries`` of an item. An item has all splits of a tile if a step has ``enough`` tiles, or more
    rows of sums than ``partial_rows``."""

    split: int
    queries: int
    enough: int
    partial_rows: int


def attention_lists(inputs: StepInputs, window: int | None, chunked: bool, cut: AttentionCut) -> AttentionLists:
    """The items of a step for one window."""
    starts = inputs.q_start[: inputs.N].astype(np.int64)
    counts = np.diff(inputs.q_start[: inputs.N + 1]).astype(np.int64)
    tiles = -(-counts // cut.queries)
    sequence = np.repeat(np.arange(inputs.N), tiles)
    q0 = (np.arange(len(sequence)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * cut.queries
    nq, end = counts[sequence], inputs.kv_len[: inputs.N].astype(np.int64)[sequence]
    begin = end - nq + q0  # the position of the first query
    last = np.minimum(begin + cut.queries, end)
    low = np.zeros_like(begin)
    if window is not None:
        low = begin // window * window if chunked else np.maximum(begin - window + 1, 0)
    s0 = low // cut.split
    splits = -(-last // cut.split) - s0
    apart = bool(len(sequence) < cut.enough and int(splits.sum()) * cut.queries <= cut.partial_rows)
    if not apart or splits.max(initial=0) <= 1:
        whole = np.stack([sequence, q0, s0, splits, np.full_like(q0, -1)], 1)
        return AttentionLists(whole.astype(np.int32), _table([], 3), 0)
    tile = np.repeat(np.arange(len(sequence)), splits)
    number = np.arange(len(tile)) - np.repeat(np.cumsum(splits) - splits, splits)
    part = (np.cumsum(splits) - splits) * cut.queries
    items = [sequence[tile], q0[tile], s0[tile] + number, np.ones_like(tile), part[tile] + number * cut.queries]
    rows = last - begin
    of = np.repeat(np.arange(len(sequence)), rows)
    row = np.arange(len(of)) - np.repeat(np.cumsum(rows) - rows, rows)
    merges = [(starts[sequence] + q0)[of] + row, part[of] + row, splits[of]]
    return AttentionLists(
        np.stack(items, 1).astype(np.int32), np.stack(merges, 1).astype(np.int32), len(tile) * cut.queries
    )


def check_places(inputs: StepInputs, capacity: Capacity, reads: Iterable[tuple[int, int | None, bool]]) -> None:
    """Raise ``KernelError`` for a row or a block outside memory: on a GPU it would be read, or end the process.

    ``reads``: the KV groups, with the window of each op (None, and whether it is chunked).
    """
    i, size = inputs, capacity.block_size
    slots, rows = i.slot_mapping[:, : i.T], i.logit_rows[: i.R]
    if slots.size and not 0 <= slots.min() <= slots.max() < capacity.num_blocks * size:
        raise KernelError("slot_mapping: a row's slot is outside the KV memory.", param="slot_mapping")
    if len(rows) and not 0 <= rows.min() <= rows.max() < i.T:
        raise KernelError("logit_rows: a row is not of the step.", param="logit_rows")
    ends = i.kv_len[: i.N]
    begins = ends - np.diff(i.q_start[: i.N + 1])
    most = int(-(-ends.max(initial=0) // size))
    if most > i.block_tables.shape[2]:
        raise KernelError("kv_len: a sequence has more keys than its table has blocks.", param="kv_len")
    for group, window, chunked in reads:
        first = np.zeros_like(begins)
        if window is not None:
            first = begins // window * window if chunked else np.maximum(begins - window + 1, 0)
        block = np.arange(most)
        read = (block >= first[:, None] // size) & (block < -(-ends[:, None] // size))
        tables = np.where(read, i.block_tables[group, : i.N, :most], 0)
        if tables.size and not 0 <= tables.min() <= tables.max() < capacity.num_blocks:
            raise KernelError("block_tables: a block that is read is freed or does not exist.", param="block_tables")


def attention_capacity(capacity: Capacity, cut: AttentionCut) -> tuple[int, int]:
    """The most items and merges of a step."""
    tiles = capacity.max_seqs + capacity.max_tokens // cut.queries
    return max(tiles, cut.partial_rows // cut.queries), cut.enough * cut.queries


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Int32:
    return np.array(rows, np.int32).reshape(len(rows), columns)
