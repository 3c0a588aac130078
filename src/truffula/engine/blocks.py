"""BlockPool: the only owner of KV blocks and state rows. A sequence holds a BlockTable and changes it through the pool.

``BlockStore`` keeps the ids of all groups; here are the tables of sequences and the prefix index. State rows are the
last group (``engine/states.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from truffula.engine.block_store import BlockStore
from truffula.engine.budget import MemoryBudget
from truffula.engine.kv_layout import KvLayout
from truffula.engine.prefix import NO_BLOCK, BlockKey, BlockKeys, PrefixIndex, PrefixNode
from truffula.engine.states import Span, StateRows, StateTable
from truffula.kernels.inputs import Int32

NEVER = 1 << 62


class BlockTable:
    """The blocks of one sequence. ``ids[g][i]`` holds its tokens from i * block_size on, for i < ``length``;
    ``capacity`` is the number of tokens that it has blocks for.

    In group g the entries before ``first[g]`` were freed and are -1. ``views`` has ``ids[g][:length]`` of each group;
    it is the same tuple until the table changes, and an older one keeps what it holds. The first ``num_indexed`` blocks
    are in the prefix index, ``node`` is the last of them (the root for none). ``node`` None: nothing is indexed. At
    ``due`` committed tokens the next block is to be indexed or freed. ``states`` None: the model has none.
    """

    def __init__(self, groups: int, block_size: int, node: PrefixNode | None) -> None:
        self.ids: list[Int32] = [np.zeros(4, np.int32) for _ in range(groups)]
        self.length = self.capacity = 0
        self.block_size = block_size
        self.views: tuple[Int32, ...] = tuple(ids[:0] for ids in self.ids)
        self.first = [0] * groups
        self.num_indexed = 0
        self.node = node
        self.due = 0
        self.states: StateTable | None = None

    def held(self, group: int) -> list[int]:
        """Ids of the blocks that it references in a group."""
        ids: list[int] = self.ids[group][self.first[group] : self.length].tolist()
        return ids

    def num_held(self) -> list[int]:
        """How many blocks it references, per group."""
        return [self.length - first for first in self.first]

    def node_at(self, border: int) -> PrefixNode | None:
        """The node of the block that ends at position ``border``; None when it is not in the index."""
        node, index = self.node, border // self.block_size
        if node is None or not node.attached or not 0 < index <= self.num_indexed:
            return None
        for _ in range(self.num_indexed - index):
            assert node is not None
            node = node.parent
        return node

    def append(self, columns: Sequence[Sequence[int]]) -> None:
        """Add blocks at the end: for each group equally many."""
        start, self.length = self.length, self.length + len(columns[0])
        if self.length > len(self.ids[0]):
            for group, old in enumerate(self.ids):
                self.ids[group] = np.zeros(2 * self.length, np.int32)
                self.ids[group][:start] = old[:start]
        for ids, blocks in zip(self.ids, columns, strict=True):
            ids[start : self.length] = blocks
        self.capacity = self.length * self.block_size
        self.views = tuple([ids[: self.length] for ids in self.ids])

    def free(self, group: int, stop: int) -> None:
        """Drop the blocks of a group up to entry ``stop``."""
        ids = self.ids[group] = self.ids[group].copy()  # an unfinished step's chunk has a view of it
        ids[self.first[group] : stop] = NO_BLOCK
        self.first[group] = stop
        self.views = tuple([ids[: self.length] for ids in self.ids])


class BlockPool:
    """Blocks ``1 .. num_blocks`` of each group of ``layout`` and state rows ``1 .. num_states``. Bytes of all but the
    unused ones are reserved from ``budget``. ``release_memory`` returns the memory of blocks of a KV group to the
    system; the group of the state rows is the last. ``prefix_cache`` False indexes nothing.
    """

    def __init__(
        self,
        num_blocks: int,
        layout: KvLayout,
        *,
        num_states: int = 0,
        budget: MemoryBudget | None = None,
        release_memory: Callable[[int, Int32], None] = lambda group, blocks: None,
        prefix_cache: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.layout = layout
        self._prefix_cache = prefix_cache
        sizes = [num_blocks] * layout.num_groups + [num_states] * layout.has_states
        self._index = PrefixIndex(len(sizes))
        self.store = BlockStore(sizes, layout.costs, self._index, budget, release_memory)
        self._kv = self.store.groups[: layout.num_groups]
        self._sliding = [g for g, window in enumerate(layout.windows) if window is not None]
        self._states: StateRows | None = None
        if layout.has_states:
            self._states = StateRows(self.store, layout.num_groups, layout.state_rows, layout.block_size)

    # Counts

    def num_free(self) -> int:
        """Free and unused KV blocks of all groups."""
        return sum(len(group.free) + len(group.unused) for group in self._kv)

    def num_cached(self) -> int:
        """Cached KV blocks of all groups."""
        return sum(len(group.cached) for group in self._kv)

    def num_used(self) -> int:
        """KV blocks of all groups that tables reference."""
        return sum(group.used for group in self._kv)

    def used_bytes(self) -> int:
        """Bytes of the KV blocks and state rows that tables reference."""
        return self.store.used_bytes()

    def cached_bytes(self) -> int:
        """Bytes of the cached KV blocks and snapshots."""
        return self.store.cached_bytes()

    def can_fit(self, counts: Sequence[int], bytes_elsewhere: Callable[[], int]) -> bool:
        """Whether ``counts[g]`` more blocks of each group (state rows last) would fit if everything idle were evicted.

        ``bytes_elsewhere`` returns the bytes that other owners with a reclaimer have in use.
        """
        return self.store.can_fit(counts, bytes_elsewhere)

    def longest(self, most_tokens: int) -> int:
        """Tokens, at most ``most_tokens``, of the longest sequence that fits when it runs alone."""
        budget = self.store.budget
        nbytes = None if budget is None else budget.limit - budget.fixed()
        return self.layout.longest(most_tokens, nbytes=nbytes, num_blocks=self.num_blocks - 1)

    # Tables

    def new_table(self) -> BlockTable:
        """An empty table."""
        node = self._index.root if self._prefix_cache else None
        table = BlockTable(self.layout.num_groups, self.layout.block_size, node)
        table.states = None if self._states is None else StateTable()
        self._set_due(table)
        return table

    def growth(self, table: BlockTable, num_tokens: int) -> list[int]:
        """Per group, how many more blocks than now ``table`` may hold before ``num_tokens`` tokens are computed; then
        how many more state rows."""
        if num_tokens <= table.capacity:
            more = [0] * len(self._kv)
        else:
            peaks = self.layout.peak_blocks(num_tokens)
            more = [max(0, peak - held) for peak, held in zip(peaks, table.num_held(), strict=True)]
        if self._states is not None and table.states is not None:
            more.append(self._states.missing(table.states))
        return more

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Give ``table`` blocks for ``num_tokens`` tokens in every group, evicting cached blocks if needed. False, with
        nothing taken, when too few blocks or bytes are available. The first call takes its state rows, too.
        """
        count = self.layout.blocks_for(num_tokens) - table.length
        if count <= 0:
            return True
        if any(count > group.available for group in self._kv):
            return False
        states, filled = self._states, table.states is None or table.states.filled
        if states is not None and table.states is not None and not states.fill(table.states):
            return False
        columns: list[list[int]] = []
        for g in range(len(self._kv)):
            columns.append([])
            for _ in range(count):
                block = self.store.take(g)
                if block is None:
                    for other, blocks in enumerate(columns):
                        self.store.put_back(other, blocks)
                    if states is not None and table.states is not None and not filled:
                        states.unfill(table.states)
                    return False
                columns[g].append(block)
        table.append(columns)
        return True

    def free_behind(self, table: BlockTable, num_computed: int, now: float) -> None:
        """Release the blocks that no query at ``num_computed`` or later reads. Indexed ones stay cached.

        ``num_computed`` counts committed tokens only: the queries of unfinished steps, and of steps that are run again,
        are not before it.
        """
        for g in self._sliding:
            first, stop = table.first[g], self.layout.first_block(g, num_computed)
            if stop > first:
                self.store.release(g, table.ids[g][first:stop].tolist(), now)
                table.free(g, stop)
        self._set_due(table)

    def _set_due(self, table: BlockTable) -> None:
        due = [self.layout.freed_at(g, table.first[g]) for g in self._sliding]
        if table.node is not None and table.node.attached:
            due.append((table.num_indexed + 1) * self.layout.block_size)
        table.due = min(due, default=NEVER)

    def release(self, table: BlockTable, now: float) -> None:
        """Release all blocks of ``table``, which must not be used again. Indexed ones stay cached.

        The last block first: a prefix hit needs all full-attention blocks before it, so the end of a prefix must be
        evicted before its start.
        """
        for g in range(len(self._kv)):
            self.store.release(g, reversed(table.held(g)), now)
        if self._states is not None and table.states is not None:
            self._states.release(table.states, now)

    # State rows, of a model that has them

    def begin_states(self, table: BlockTable, start: int, stop: int, borders: Sequence[int]) -> tuple[Span, ...]:
        """The spans of a chunk of tokens ``start .. stop``, with snapshots at ``borders``, which ascend; () without
        states."""
        if self._states is None or table.states is None:
            return ()
        return self._states.begin(table.states, start, stop, borders)

    def undo_states(self, table: BlockTable) -> None:
        """Undo ``begin_states``, the newest that is not committed."""
        if self._states is not None and table.states is not None:
            self._states.undo(table.states)

    def commit_states(self, table: BlockTable, stop: int, kept: Collection[int], now: float) -> None:
        """Record that the oldest chunk, which ends at ``stop``, is computed. Call it after ``register``."""
        if self._states is not None and table.states is not None:
            self._states.commit(table.states, stop, kept, table.node_at, now)

    # Prefix index

    def match(self, keys: BlockKeys, limit: int) -> list[PrefixNode]:
        """The longest indexed prefix of ``keys``, of at most ``limit`` blocks, that every group can serve.

        A full group must have all of its blocks, a group with a window only those that the next query reads, and there
        must be a snapshot of the states behind the last block. Takes no reference.
        """
        if not self._prefix_cache:
            return []
        path = self._index.find(keys, limit)
        length, known = len(path), -1
        while length != known:
            known = length
            for g in range(len(self._kv)):
                length = self._servable(g, path, length)
            if self._states is not None:
                length = self._states.servable(path, length)
        return path[:length]

    def num_known(self, keys: BlockKeys, limit: int) -> int:
        """The length of the longest indexed prefix of ``keys``, of at most ``limit`` blocks, servable or not."""
        return len(self._index.find(keys, limit)) if self._prefix_cache else 0

    def _servable(self, g: int, path: Sequence[PrefixNode], length: int) -> int:
        """The most blocks, up to ``length``, after which group ``g`` has all that the next query reads."""
        while True:
            first = self.layout.first_block(g, length * self.layout.block_size)
            index = length - 1
            while index >= first and path[index].blocks[g] != NO_BLOCK:
                index -= 1
            if index < first:
                return length
            length = index  # every shorter prefix that reaches past this block reads it too

    def continues(self, table: BlockTable, keys: BlockKeys, path: Sequence[PrefixNode], key: BlockKey) -> bool:
        """Whether ``table``, whose sequence has ``keys``, will index a block with ``key`` behind ``path``."""
        indexed, length = table.num_indexed, len(path)
        if (
            table.node is None
            or indexed > length
            or table.node is not (path[indexed - 1] if indexed else self._index.root)
        ):
            return False
        return all(keys[i] == path[i].key for i in range(indexed, length)) and keys[length] == key

    def attach(self, table: BlockTable, path: Sequence[PrefixNode]) -> None:
        """Let the empty ``table`` begin with the blocks of a prefix that ``match`` found."""
        if not path:
            return
        columns = []
        for g in range(len(self._kv)):
            first = table.first[g] = self.layout.first_block(g, len(path) * self.layout.block_size)
            blocks = [node.blocks[g] for node in path[first:]]
            for block in blocks:
                self.store.share(g, block)
            columns.append([NO_BLOCK] * first + blocks)
        if self._states is not None and table.states is not None:
            self._states.attach(table.states, path[-1])
        table.append(columns)
        table.num_indexed = len(path)
        table.node = path[-1]
        self._set_due(table)

    def register(self, table: BlockTable, keys: BlockKeys, num_computed: int) -> None:
        """Index the blocks of ``table`` that ``num_computed`` tokens fill. Call it before ``free_behind``.

        Where a block with the same content is indexed already, the table's own stays out of the index.
        """
        for index in range(table.num_indexed, num_computed // self.layout.block_size):
            if table.node is None or not table.node.attached:
                break
            table.node = node = self._index.child(table.node, keys[index])
            table.num_indexed = index + 1
            for g in range(len(self._kv)):
                self.store.add_to_index(g, int(table.ids[g][index]), node)

    def forget(self, table: BlockTable) -> None:
        """Remove the blocks of ``table`` and their descendants from the index: their contents may be wrong."""
        top = table.node
        while top is not None and top.parent is not None and top.parent.parent is not None:
            top = top.parent
        if top is not None and top.parent is not None and top.attached:
            self.store.forget_node(top)

    def reset_index(self) -> None:
        """Remove all blocks from the index. Cached ones become free; tables keep theirs."""
        for top in list(self._index.root.children.values()):
            self.store.forget_node(top)
