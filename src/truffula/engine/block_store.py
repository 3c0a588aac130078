"""BlockStore: which KV blocks and state rows are in use, cached or free, and their bytes in the memory budget.

A KV group, and the state rows, each have ids of their own; bytes of all come from one budget. A block (or row) is

unused     its memory is not committed, its bytes are not reserved
free       not referenced; its memory is committed and its bytes are reserved, until the budget needs them
in use     referenced by one table, or by several when it is full and shared through the prefix index
cached     referenced by none, still indexed: a prefix hit uses it again, or it is evicted (LRU over all groups)

Id 0 of each group is never allocated.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from truffula.engine.budget import MemoryBudget
from truffula.engine.prefix import NO_BLOCK, PrefixIndex, PrefixNode
from truffula.kernels.inputs import Int32

OWNER = "kv"
RELEASED_TOGETHER = 16
"""Free blocks whose memory is released in one call: a run of adjacent ones costs one system call per plane."""


class BlockGroup:
    """The ids of one KV group, or of the state rows. One costs ``nbytes``."""

    def __init__(self, num_blocks: int, nbytes: int) -> None:
        self.nbytes = nbytes
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


class BlockStore:
    """Ids ``1 .. sizes[g] - 1`` of each group. Bytes of all but the unused ones are reserved from ``budget``. ``index``
    has the nodes of indexed blocks. ``release_memory`` returns the memory of ids of a group to the system.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        nbytes: Sequence[int],
        index: PrefixIndex,
        budget: MemoryBudget | None,
        release_memory: Callable[[int, Int32], None],
    ) -> None:
        self.groups = [BlockGroup(size, cost) for size, cost in zip(sizes, nbytes, strict=True)]
        self.budget = budget if any(nbytes) else None
        self._index = index
        self._release_memory = release_memory
        if self.budget is not None:
            self.budget.register_reclaimer(OWNER, self)

    def used_bytes(self) -> int:
        """Bytes of what tables reference."""
        return sum(group.used * group.nbytes for group in self.groups)

    def cached_bytes(self) -> int:
        return sum(len(group.cached) * group.nbytes for group in self.groups)

    def can_fit(self, counts: Sequence[int], bytes_elsewhere: Callable[[], int]) -> bool:
        """See ``BlockPool.can_fit``."""
        if any(count > group.available for count, group in zip(counts, self.groups, strict=True)):
            return False
        nbytes = sum(count * group.nbytes for count, group in zip(counts, self.groups, strict=True))
        if self.budget is None or nbytes <= self.budget.available():
            return True
        return self.budget.fixed() + bytes_elsewhere() + self.used_bytes() + nbytes <= self.budget.limit

    # References

    def take(self, g: int) -> int | None:
        """A block of a group, referenced once; None when too few blocks or bytes are available."""
        group = self.groups[g]
        block = group.free.pop() if group.free else self._take_more(g)
        if block is not None:
            group.refs[block] = 1
        return block

    def _take_more(self, g: int) -> int | None:
        """A block of a group that has no free one.

        An unused one while the budget has room. Else what was idle for longest is evicted: the group's cached block,
        which is used again, or an entry of another owner.
        """
        group, budget = self.groups[g], self.budget
        if group.cached:
            full = budget is not None and budget.available() < group.nbytes and group.oldest() == budget.oldest()
            if full or not group.unused:
                self._evict(g)
                return group.free.pop()
        if not group.unused or not (budget is None or budget.reserve(OWNER, group.nbytes)):
            return None
        return group.unused.pop()

    def put_back(self, g: int, blocks: Iterable[int]) -> None:
        """Undo ``take`` of these blocks, in the order in which they were taken."""
        group = self.groups[g]
        for block in reversed(list(blocks)):
            group.refs[block] = 0
            group.free.append(block)

    def share(self, g: int, block: int) -> None:
        """Reference an indexed block once more."""
        group = self.groups[g]
        assert group.refs[block] or block in group.cached, block
        group.cached.pop(block, None)
        group.refs[block] += 1

    def release(self, g: int, blocks: Iterable[int], now: float) -> None:
        """Drop one reference to each. Those that are indexed stay cached."""
        group = self.groups[g]
        for block in blocks:
            assert group.refs[block] > 0, (g, block)
            group.refs[block] -= 1
            if group.refs[block]:
                continue
            if block in group.nodes:
                group.cached[block] = now
            else:
                group.free.append(block)

    # The prefix index

    def add_to_index(self, g: int, block: int, node: PrefixNode) -> bool:
        """Index a block in use, unless ``node`` has one of this group already; returns whether it was."""
        if node.blocks[g] != NO_BLOCK:
            return False
        node.blocks[g] = block
        self.groups[g].nodes[block] = node
        return True

    def forget_node(self, top: PrefixNode) -> None:
        """Remove ``top`` and its descendants from the index. Cached blocks become free; tables keep theirs."""
        self._index.detach(top)
        for node in top.below():
            for g, block in enumerate(node.blocks):
                if block == NO_BLOCK:
                    continue
                del self.groups[g].nodes[block]
                if self.groups[g].cached.pop(block, None) is not None:
                    self.groups[g].free.append(block)

    def drop_cached(self, g: int, block: int) -> None:
        """Free one cached block."""
        group = self.groups[g]
        del group.cached[block]
        node = group.nodes.pop(block)
        node.blocks[g] = NO_BLOCK
        self._index.prune(node)
        group.free.append(block)

    def _evict(self, g: int) -> None:
        self.drop_cached(g, next(iter(self.groups[g].cached)))

    # Reclaimer

    def oldest(self) -> float | None:
        """When the least recently used cached block was released; before all times when there are free blocks."""
        if any(group.free for group in self.groups):
            return -math.inf
        return min((group.oldest() for group in self.groups if group.cached), default=None)

    def evict_oldest(self) -> int:
        """Release the memory of free blocks; if there are none, evict the least recently used cached block."""
        g = next((g for g, group in enumerate(self.groups) if group.free), None)
        if g is None:
            _, g = min((group.oldest(), g) for g, group in enumerate(self.groups) if group.cached)
            self._evict(g)
        group = self.groups[g]
        group.free, released = group.free[:-RELEASED_TOGETHER], sorted(group.free[-RELEASED_TOGETHER:])
        self._release_memory(g, np.asarray(released, np.int32))
        group.unused += reversed(released)
        nbytes = len(released) * group.nbytes
        if self.budget is not None:
            self.budget.release(OWNER, nbytes)
        return nbytes
