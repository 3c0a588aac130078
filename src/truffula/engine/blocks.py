"""BlockPool: the only owner of KV block ids. Others hold ids and give them back.

0          scratch, never given out
free       on the stack; their bytes are not reserved
in use     referenced by one sequence, or by several when full and shared through the prefix index
cached     referenced by nobody, still indexed: a later prompt may take them up again, or they are evicted (LRU)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

from truffula.engine.budget import MemoryBudget
from truffula.engine.prefix import Entry, PrefixChain, PrefixIndex
from truffula.errors import ConfigError

OWNER = "kv"


class BlockPool:
    """Blocks ``1 .. num_blocks`` of ``block_size`` tokens. Bytes of blocks in use and cached are reserved from
    ``budget``.

    ``block_bytes`` is what one block costs (0: the budget is not asked). ``prefix_cache`` False indexes nothing.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        budget: MemoryBudget | None = None,
        block_bytes: int = 0,
        prefix_cache: bool = True,
    ) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ConfigError(
                f"{num_blocks} blocks of {block_size} tokens: at least 2 (one is scratch) of 1 are needed."
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_bytes = block_bytes
        self._budget = budget
        self._prefix_cache = prefix_cache
        # Lowest ids on top: memory of the pool is touched lazily, so small loads stay in few pages.
        self._free = list(range(num_blocks - 1, 0, -1))
        self._refs = [0] * num_blocks
        self._cached: OrderedDict[int, float] = OrderedDict()
        self._index = PrefixIndex()
        if budget is not None and block_bytes:
            budget.register_reclaimer(OWNER, self)

    # What there is

    def num_free(self) -> int:
        return len(self._free)

    def num_cached(self) -> int:
        return len(self._cached)

    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free) - len(self._cached)

    def available(self) -> int:
        """Blocks that ``allocate`` could hand out, as far as ids go (bytes may still fall short)."""
        return len(self._free) + len(self._cached)

    def could_have(self, count: int, taken_elsewhere: Callable[[], int]) -> bool:
        """Whether ``count`` blocks could be had by giving up all that is idle. ``taken_elsewhere``: bytes of others in
        use.
        """
        if count > self.available():
            return False
        if self._budget is None or count * self.block_bytes <= self._budget.available():
            return True
        taken = self._budget.fixed() + taken_elsewhere() + self.num_used() * self.block_bytes
        return taken + count * self.block_bytes <= self._budget.limit

    def capacity(self) -> int:
        """Blocks that one sequence alone could have: ids, and bytes beside what is never given up."""
        count = self.num_blocks - 1
        if self._budget is not None and self.block_bytes:
            count = min(count, max(0, self._budget.limit - self._budget.fixed()) // self.block_bytes)
        return count

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # Taking and giving back

    def allocate(self, count: int) -> list[int] | None:
        """``count`` fresh blocks with one reference each, or None and nothing taken. May evict cached blocks."""
        if count > self.available():
            return None
        while len(self._free) < count:
            self.evict_oldest()
        if self.block_bytes and self._budget is not None and not self._budget.reserve(OWNER, count * self.block_bytes):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def take(self, blocks: Iterable[int]) -> None:
        """One more reference on each of ``blocks`` (a prefix hit)."""
        for block in blocks:
            assert self._refs[block] or block in self._cached, block
            self._cached.pop(block, None)
            self._refs[block] += 1

    def release(self, blocks: Sequence[int], now: float) -> None:
        """Give back one reference on each block of a chain, given from its start. Indexed ones stay cached.

        Tail first: a later request can use blocks 0..k only if all of them survive, so the end of a chain
        must be evicted before its start.
        """
        for block in reversed(blocks):
            assert self._refs[block] > 0, block
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if self._index.of_block(block) is not None:
                self._cached[block] = now
            else:
                self._to_free(block)

    # Prefix index

    def match(self, chain: PrefixChain, limit: int) -> list[Entry]:
        """Indexed blocks that ``chain`` begins with, at most ``limit``. Takes no reference."""
        return self._index.find(chain, limit) if self._prefix_cache else []

    def register(self, chain: PrefixChain, index: int, parent: int | bytes, block: int, now: float) -> Entry | None:
        """Index ``block``, full and computed, as block ``index`` of ``chain`` behind entry ``parent``.

        Where the same content is indexed already, the caller's reference moves to that block and its own is given back:
        the entry returned says which block to use from now on. (So whoever indexes a child holds its indexed parent,
        and a parent is never evicted before its child.) None when nothing is indexed: cache off, or a colliding key in
        use.
        """
        if not self._prefix_cache:
            return None
        key, tokens = chain.block(index)
        there = self._index.at(key)
        if there is not None and (there.parent != parent or there.tokens != tokens):
            if there.block not in self._cached:
                return None
            self._evict(there.block)
            there = None
        if there is None:
            return self._index.insert(key, parent, tokens, block)
        if there.block != block:
            self.take([there.block])
            self.release([block], now)
        return there

    def forget(self, blocks: Iterable[int]) -> None:
        """Take ``blocks`` out of the index: what they hold is not to be trusted. References stay."""
        for block in blocks:
            self._index.remove(block)
            if block in self._cached:
                del self._cached[block]
                self._to_free(block)

    # Reclaimer

    def oldest(self) -> float | None:
        return next(iter(self._cached.values()), None)

    def evict_oldest(self) -> int:
        block = next(iter(self._cached))
        self._evict(block)
        return self.block_bytes

    def _evict(self, block: int) -> None:
        del self._cached[block]
        self._index.remove(block)
        self._to_free(block)

    def _to_free(self, block: int) -> None:
        self._free.append(block)
        if self.block_bytes and self._budget is not None:
            self._budget.release(OWNER, self.block_bytes)

    def check(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Raise AssertionError when a block is lost, owned twice or miscounted. ``holders``: everybody's blocks."""
        free, cached = set(self._free), set(self._cached)
        used = {block for block, refs in enumerate(self._refs) if refs}
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & used or cached & used), (free & cached, free & used, cached & used)
        assert free | cached | used == set(range(1, self.num_blocks)), "a block is lost"
        assert all(self._index.of_block(block) is not None for block in cached), "a cached block without an entry"
        assert not any(self._index.of_block(block) for block in free), "an entry of a free block"
        stamps = list(self._cached.values())
        assert stamps == sorted(stamps), "the LRU is out of order"
        self._index.check()
        if self._budget is not None and self.block_bytes:
            assert self._budget.used(OWNER) == self.block_bytes * (len(used) + len(cached))
        if holders is not None:
            counts = Counter(block for blocks in holders for block in blocks)
            assert all(counts.get(block, 0) == refs for block, refs in enumerate(self._refs)), "references differ"
