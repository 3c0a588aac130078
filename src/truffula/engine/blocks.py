"""BlockPool: the only owner of KV block ids. A sequence holds a BlockTable and changes it through the pool.

Each KV group has block ids of its own; bytes of all come from one budget. A block is

unused     its memory is not committed, its bytes are not reserved
free       not referenced; its memory is committed and its bytes are reserved, until the budget needs them
in use     referenced by one table, or by several when it is full and shared through the prefix index
cached     referenced by none, still indexed: a prefix hit uses it again, or it is evicted (LRU over all groups)

Id 0 of each group is scratch and never allocated.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from truffula.engine.budget import MemoryBudget
from truffula.engine.kv_layout import KvLayout
from truffula.engine.prefix import NO_BLOCK, BlockKey, BlockKeys, PrefixIndex, PrefixNode
from truffula.kernels.inputs import Int32

OWNER = "kv"
NEVER = 1 << 62
RELEASED_TOGETHER = 16
"""Free blocks whose memory is released in one call: a run of adjacent ones costs one system call per plane."""


class BlockTable:
    """The blocks of one sequence. ``ids[g][i]`` holds its tokens from i * block_size on, for i < ``length``;
    ``capacity`` is the number of tokens that it has blocks for.

    In group g the entries before ``first[g]`` were freed and are -1. ``views`` has ``ids[g][:length]`` of each group;
    it is the same tuple until the table changes, and an older one keeps what it holds. The first ``num_indexed`` blocks
    are in the prefix index, ``node`` is the last of them (the root for none). ``node`` None: nothing is indexed. At
    ``due`` committed tokens the next block is to be indexed or freed.
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

    def held(self, group: int) -> list[int]:
        """Ids of the blocks that it references in a group."""
        ids: list[int] = self.ids[group][self.first[group] : self.length].tolist()
        return ids

    def num_held(self) -> list[int]:
        """How many blocks it references, per group."""
        return [self.length - first for first in self.first]

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


class _Group:
    """The block ids of one KV group."""

    def __init__(self, num_blocks: int) -> None:
        # Both are stacks. Lowest ids on top: small loads stay in few pages.
        self.unused = list(range(num_blocks - 1, 0, -1))
        self.free: list[int] = []
        self.refs = [0] * num_blocks
        self.cached: OrderedDict[int, float] = OrderedDict()
        self.nodes: dict[int, PrefixNode] = {}

    @property
    def available(self) -> int:
        return len(self.unused) + len(self.free) + len(self.cached)

    @property
    def used(self) -> int:
        return len(self.refs) - 1 - self.available

    def oldest(self) -> float:
        """When its least recently used cached block was released; there must be one."""
        return next(iter(self.cached.values()))


class BlockPool:
    """Blocks ``1 .. num_blocks`` of each group of ``layout``. Bytes of all but the unused ones are reserved from
    ``budget``. ``release_kv`` is the executable's. ``prefix_cache`` False indexes nothing.
    """

    def __init__(
        self,
        num_blocks: int,
        layout: KvLayout,
        *,
        budget: MemoryBudget | None = None,
        release_kv: Callable[[int, Int32], None] = lambda group, blocks: None,
        prefix_cache: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.layout = layout
        self._budget = budget if any(layout.block_bytes) else None
        self._release_kv = release_kv
        self._prefix_cache = prefix_cache
        self._groups = [_Group(num_blocks) for _ in layout.windows]
        self._sliding = [g for g, window in enumerate(layout.windows) if window is not None]
        self._index = PrefixIndex(layout.num_groups)
        if self._budget is not None:
            self._budget.register_reclaimer(OWNER, self)

    # Counts

    def num_free(self) -> int:
        """Free and unused blocks of all groups."""
        return sum(len(group.free) + len(group.unused) for group in self._groups)

    def num_cached(self) -> int:
        """Cached blocks of all groups."""
        return sum(len(group.cached) for group in self._groups)

    def num_used(self) -> int:
        """Blocks of all groups that tables reference."""
        return sum(group.used for group in self._groups)

    def used_bytes(self) -> int:
        """Bytes of the blocks that tables reference."""
        return self.layout.nbytes([group.used for group in self._groups])

    def cached_bytes(self) -> int:
        """Bytes of the cached blocks."""
        return self.layout.nbytes([len(group.cached) for group in self._groups])

    def can_fit(self, counts: Sequence[int], bytes_elsewhere: Callable[[], int]) -> bool:
        """Whether ``counts[g]`` more blocks of each group would fit if everything idle were evicted.

        ``bytes_elsewhere`` returns the bytes that other owners with a reclaimer have in use.
        """
        if any(count > group.available for count, group in zip(counts, self._groups, strict=True)):
            return False
        nbytes = self.layout.nbytes(counts)
        if self._budget is None or nbytes <= self._budget.available():
            return True
        return self._budget.fixed() + bytes_elsewhere() + self.used_bytes() + nbytes <= self._budget.limit

    def longest(self, most_tokens: int) -> int:
        """Tokens, at most ``most_tokens``, of the longest sequence that fits when it runs alone."""
        nbytes = None if self._budget is None else self._budget.limit - self._budget.fixed()
        return self.layout.longest(most_tokens, nbytes=nbytes, num_blocks=self.num_blocks - 1)

    # Tables

    def new_table(self) -> BlockTable:
        """An empty table."""
        node = self._index.root if self._prefix_cache else None
        table = BlockTable(self.layout.num_groups, self.layout.block_size, node)
        self._set_due(table)
        return table

    def growth(self, table: BlockTable, num_tokens: int) -> list[int]:
        """Per group, how many more blocks than now ``table`` may hold before ``num_tokens`` tokens are computed."""
        if num_tokens <= table.capacity:
            return [0] * len(self._groups)
        peaks = self.layout.peak_blocks(num_tokens)
        return [max(0, peak - held) for peak, held in zip(peaks, table.num_held(), strict=True)]

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Give ``table`` blocks for ``num_tokens`` tokens in every group, evicting cached blocks if needed. False, with
        nothing taken, when too few blocks or bytes are available.
        """
        count = self.layout.blocks_for(num_tokens) - table.length
        if count <= 0:
            return True
        if any(count > group.available for group in self._groups):
            return False
        columns: list[list[int]] = []
        for g, group in enumerate(self._groups):
            columns.append([])
            for _ in range(count):
                block = group.free.pop() if group.free else self._take_block(g)
                if block is None:
                    for other, blocks in zip(self._groups, columns, strict=False):
                        other.free += reversed(blocks)
                    return False
                columns[g].append(block)
        for group, blocks in zip(self._groups, columns, strict=True):
            for block in blocks:
                group.refs[block] = 1
        table.append(columns)
        return True

    def _take_block(self, g: int) -> int | None:
        """A block of a group that has no free one; None when too few blocks or bytes are available.

        An unused one while the budget has room. Else what was idle for longest is evicted: the group's cached block,
        which is used again, or an entry of another owner.
        """
        group, nbytes, budget = self._groups[g], self.layout.block_bytes[g], self._budget
        if group.cached:
            full = budget is not None and budget.available() < nbytes and group.oldest() == budget.oldest()
            if full or not group.unused:
                self._evict(g)
                return group.free.pop()
        if not group.unused or not (budget is None or budget.reserve(OWNER, nbytes)):
            return None
        return group.unused.pop()

    def free_behind(self, table: BlockTable, num_computed: int, now: float) -> None:
        """Release the blocks that no query at ``num_computed`` or later reads. Indexed ones stay cached.

        ``num_computed`` counts committed tokens only: the queries of unfinished steps, and of steps that are run again,
        are not before it.
        """
        for g in self._sliding:
            first, stop = table.first[g], self.layout.first_block(g, num_computed)
            if stop > first:
                self._release_blocks(g, table.ids[g][first:stop].tolist(), now)
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
        for g in range(len(self._groups)):
            self._release_blocks(g, reversed(table.held(g)), now)

    def _release_blocks(self, g: int, blocks: Iterable[int], now: float) -> None:
        group = self._groups[g]
        for block in blocks:
            assert group.refs[block] > 0, (g, block)
            group.refs[block] -= 1
            if group.refs[block]:
                continue
            if block in group.nodes:
                group.cached[block] = now
            else:
                group.free.append(block)

    # Prefix index

    def match(self, keys: BlockKeys, limit: int) -> list[PrefixNode]:
        """The longest indexed prefix of ``keys``, of at most ``limit`` blocks, that every group can serve.

        A full group must have all of its blocks, a group with a window only those that the next query reads. Takes no
        reference.
        """
        if not self._prefix_cache:
            return []
        path = self._index.find(keys, limit)
        length, known = len(path), -1
        while length != known:
            known = length
            for g in range(len(self._groups)):
                length = self._servable(g, path, length)
        return path[:length]

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
        for g, group in enumerate(self._groups):
            first = table.first[g] = self.layout.first_block(g, len(path) * self.layout.block_size)
            blocks = [node.blocks[g] for node in path[first:]]
            for block in blocks:
                self._take(group, block)
            columns.append([NO_BLOCK] * first + blocks)
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
            for g, group in enumerate(self._groups):
                if node.blocks[g] == NO_BLOCK:
                    node.blocks[g] = own = int(table.ids[g][index])
                    group.nodes[own] = node

    def forget(self, table: BlockTable) -> None:
        """Remove the blocks of ``table`` and their descendants from the index: their contents may be wrong."""
        top = table.node
        while top is not None and top.parent is not None and top.parent.parent is not None:
            top = top.parent
        if top is not None and top.parent is not None and top.attached:
            self._forget_node(top)

    def reset_index(self) -> None:
        """Remove all blocks from the index. Cached ones become free; tables keep theirs."""
        for top in list(self._index.root.children.values()):
            self._forget_node(top)

    def _forget_node(self, top: PrefixNode) -> None:
        """Remove ``top`` and its descendants from the index."""
        self._index.detach(top)
        for node in top.below():
            for g, block in enumerate(node.blocks):
                if block == NO_BLOCK:
                    continue
                del self._groups[g].nodes[block]
                if self._groups[g].cached.pop(block, None) is not None:
                    self._groups[g].free.append(block)

    def _take(self, group: _Group, block: int) -> None:
        assert group.refs[block] or block in group.cached, block
        group.cached.pop(block, None)
        group.refs[block] += 1

    # Reclaimer

    def oldest(self) -> float | None:
        """When the least recently used cached block was released; before all times when there are free blocks."""
        if any(group.free for group in self._groups):
            return -math.inf
        return min((group.oldest() for group in self._groups if group.cached), default=None)

    def evict_oldest(self) -> int:
        """Release the memory of free blocks; if there are none, evict the least recently used cached block."""
        g = next((g for g, group in enumerate(self._groups) if group.free), None)
        if g is None:
            _, g = min((group.oldest(), g) for g, group in enumerate(self._groups) if group.cached)
            self._evict(g)
        group = self._groups[g]
        group.free, released = group.free[:-RELEASED_TOGETHER], sorted(group.free[-RELEASED_TOGETHER:])
        self._release_kv(g, np.asarray(released, np.int32))
        group.unused += reversed(released)
        nbytes = len(released) * self.layout.block_bytes[g]
        if self._budget is not None:
            self._budget.release(OWNER, nbytes)
        return nbytes

    def _evict(self, g: int) -> None:
        block, _ = self._groups[g].cached.popitem(last=False)
        node = self._groups[g].nodes.pop(block)
        node.blocks[g] = NO_BLOCK
        self._index.prune(node)
        self._groups[g].free.append(block)
