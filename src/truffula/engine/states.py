"""StateRows: the state rows of sequences: what a step reads and writes, and snapshots for prefix hits.

A step reads the state row of a sequence and writes another one, so a step that failed runs again from the row that it
read. A sequence has the row of its committed tokens and one for each step that may be unfinished.

A snapshot is a row at a block border that stays in the prefix index, where a hit needs the last block's only. The
state after any token is written anyway, so a snapshot costs no copy, only a row. Which borders have one:

- the last border before a prompt's end (other choices of it, and the same prompt again),
- the border where a prompt that is computed now parts from one that waits (``RunningBatch.first_startable``), or from
  what the index knows,
- the newest border that a sequence has passed, instead of its last newest one (the next turn, and preemption).

Snapshots are evicted like cached blocks: by last use, over all groups. Where no row is free, none is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

from truffula.engine.block_store import BlockStore
from truffula.engine.prefix import NO_BLOCK, PrefixNode
from truffula.kernels.inputs import SPANS_PER_SEQUENCE

ZEROS = 0
"""The state row before a sequence's first token."""

NodeAt = Callable[[int], PrefixNode | None]
Span = tuple[int, int, int]
"""Tokens of a chunk, the state row that they begin with, and the one that they leave."""


class StateTable:
    """The state rows of one sequence.

    ``live``: the row of its committed tokens, then the one that each unfinished step leaves. ``spare`` rows are for
    later steps. ``cuts``: for each unfinished step the borders inside its chunk, with their rows. ``newest``: the node
    and the row of its newest snapshot, which the next one replaces.
    """

    def __init__(self) -> None:
        self.live: deque[int] = deque([ZEROS])
        self.spare: list[int] = []
        self.cuts: deque[list[tuple[int, int]]] = deque()
        self.newest: tuple[PrefixNode, int] | None = None
        self.filled = False

    def held(self) -> list[int]:
        """The rows that it references."""
        rows = [row for row in self.live if row != ZEROS]
        return rows + self.spare + [row for cuts in self.cuts for _, row in cuts]


class StateRows:
    """Part of the block pool: group number ``group`` of ``store``. A sequence that runs has ``rows_each`` rows."""

    def __init__(self, store: BlockStore, group: int, rows_each: int, block_size: int) -> None:
        self._store = store
        self._group = group
        self._rows_each = rows_each
        self._block_size = block_size

    # A sequence

    def missing(self, table: StateTable) -> int:
        """Rows that it lacks to run."""
        return 0 if table.filled else self._rows_each

    def fill(self, table: StateTable) -> bool:
        """Take the rows that it lacks to run. False, with nothing taken, when too few are available."""
        while len(table.spare) < self.missing(table):
            row = self._store.take(self._group)
            if row is None:
                self.unfill(table)
                return False
            table.spare.append(row)
        table.filled = True
        return True

    def unfill(self, table: StateTable) -> None:
        """Undo ``fill``."""
        self._store.put_back(self._group, table.spare)
        table.spare, table.filled = [], False

    def attach(self, table: StateTable, node: PrefixNode) -> None:
        """Let it begin with the snapshot of ``node``."""
        row = node.blocks[self._group]
        self._store.share(self._group, row)
        table.live[0] = row

    def release(self, table: StateTable, now: float) -> None:
        """Release its rows. Snapshots stay cached."""
        self._store.release(self._group, table.held(), now)

    # A step

    def begin(self, table: StateTable, start: int, stop: int, borders: Sequence[int]) -> tuple[Span, ...]:
        """The spans of a chunk of tokens ``start .. stop``, which is divided at ``borders``, as far as there are rows
        for their snapshots."""
        spans: list[Span] = []
        cuts: list[tuple[int, int]] = []
        at, source = start, table.live[-1]
        for border in [border for border in borders if border < stop][1 - SPANS_PER_SEQUENCE :]:
            row = self._store.take(self._group)
            if row is None:
                break
            spans.append((border - at, source, row))
            cuts.append((border, row))
            at, source = border, row
        table.live.append(table.spare.pop())
        table.cuts.append(cuts)
        return (*spans, (stop - at, source, table.live[-1]))

    def undo(self, table: StateTable) -> None:
        """Undo ``begin``, the newest that is not committed."""
        table.spare.append(table.live.pop())
        self._store.put_back(self._group, [row for _, row in table.cuts.pop()])

    def commit(self, table: StateTable, stop: int, kept: Collection[int], node_at: NodeAt, now: float) -> None:
        """Record that the oldest chunk, which ends at ``stop``, is computed; its blocks are indexed already.

        ``kept``: the borders whose snapshots the next one does not replace. ``node_at`` gives the node of the block
        that ends at a border, None when it is not indexed.
        """
        self._recycle(table, table.live.popleft(), now)
        for border, row in table.cuts.popleft():
            node = node_at(border)
            if node is not None and self._store.add_to_index(self._group, row, node) and border not in kept:
                self._drop_newest(table)
                table.newest = node, row
            self._store.release(self._group, [row], now)
        if stop % self._block_size == 0:
            self._keep_last(table, stop in kept, node_at(stop))

    def _recycle(self, table: StateTable, row: int, now: float) -> None:
        """Use a row that was read for the last time again, unless it is a snapshot: then another one took its place."""
        if row == ZEROS:
            return
        if len(table.live) + len(table.spare) < self._rows_each:
            table.spare.append(row)
        else:
            self._store.release(self._group, [row], now)

    def _keep_last(self, table: StateTable, kept: bool, node: PrefixNode | None) -> None:
        """Make the row of the committed tokens a snapshot, if there is another row that takes its place."""
        if node is None or node.blocks[self._group] != NO_BLOCK:
            return
        if not kept:
            self._drop_newest(table)
        row = self._store.take(self._group)
        if row is None:
            return
        table.spare.append(row)
        self._store.add_to_index(self._group, table.live[0], node)
        if not kept:
            table.newest = node, table.live[0]

    def _drop_newest(self, table: StateTable) -> None:
        """Free its newest snapshot, unless it was evicted or another sequence uses it."""
        if table.newest is None:
            return
        node, row = table.newest
        group = self._store.groups[self._group]
        if group.nodes.get(row) is node and row in group.cached:
            self._store.drop_cached(self._group, row)
        table.newest = None

    # The prefix index

    def servable(self, path: Sequence[PrefixNode], length: int) -> int:
        """The most blocks of ``path``, up to ``length``, behind which there is a snapshot."""
        while length and path[length - 1].blocks[self._group] == NO_BLOCK:
            length -= 1
        return length
