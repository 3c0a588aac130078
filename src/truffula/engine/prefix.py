"""The prefix index: which KV blocks hold which tokens.

A tree whose edges are block keys: the tenant's salt, the adapter generations that act in the block with their weights
and from which of its tokens on, the rotary tables and the token ids. So equal tokens under another adapter, or of
another tenant, never share a block, and a block before the position from which an adapter acts is shared with the base.
A node has a block in each KV group that still holds its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from truffula.kernels.inputs import Int32

ActingAdapter = tuple[str, float, int]
"""A generation, its weight, and the token of the block from which on it acts."""
BlockKey = tuple[str, tuple[ActingAdapter, ...], int, bytes]
NO_BLOCK = -1


@dataclass(frozen=True)
class BoundAdapter:
    """One of a sequence's adapters: a generation, the factor of its change of the base (a float32), and the position
    from which on it acts."""

    generation: str
    weight: float = 1.0
    acts_from: int = 0


class BlockKeys:
    """The keys of one sequence's full blocks. Tokens are only appended, so a key never changes.

    ``adapters`` are the sequence's (none: the base). ``rope`` is the key of its rotary tables (``RopeRegime.key``).
    """

    def __init__(self, salt: str, adapters: tuple[BoundAdapter, ...], block_size: int, rope: int = 0) -> None:
        self._salt = salt
        self._acts_from = max([adapter.acts_from for adapter in adapters], default=0)
        # Behind all of their beginnings this is also the key of a block.
        self._adapters = tuple([(one.generation, one.weight, one.acts_from) for one in adapters])
        self._block_size = block_size
        self._rope = rope
        self._keys: list[BlockKey] = []

    def extend(self, token_ids: Int32) -> None:
        """Add the keys of full blocks of ``token_ids`` (all of the sequence's tokens so far) that have none yet."""
        size = self._block_size
        for index in range(len(self._keys), len(token_ids) // size):
            start, stop = index * size, (index + 1) * size
            active = self._adapters
            if start < self._acts_from:
                active = tuple(
                    [
                        (generation, weight, max(0, first - start))
                        for generation, weight, first in self._adapters
                        if first < stop
                    ]
                )
            self._keys.append((self._salt, active, self._rope, token_ids[start:stop].tobytes()))

    def __len__(self) -> int:
        return len(self._keys)

    def num_common(self, other: BlockKeys) -> int:
        """How many keys the two begin with in common."""
        pairs = enumerate(zip(self._keys, other._keys, strict=False))
        return next((index for index, (one, two) in pairs if one != two), min(len(self), len(other)))

    def __getitem__(self, index: int) -> BlockKey:
        return self._keys[index]


class PrefixNode:
    """A block of tokens that follow those of ``parent``. ``blocks[g]`` is its block in group g or NO_BLOCK.

    ``attached`` is False once it is no longer in the index.
    """

    __slots__ = ("attached", "blocks", "children", "key", "parent")

    def __init__(self, key: BlockKey | None, parent: PrefixNode | None, groups: int) -> None:
        self.key = key
        self.parent = parent
        self.children: dict[BlockKey, PrefixNode] = {}
        self.blocks = [NO_BLOCK] * groups
        self.attached = True

    def below(self) -> Iterator[PrefixNode]:
        """This node and its descendants."""
        pending = [self]
        while pending:
            node = pending.pop()
            pending += node.children.values()
            yield node


class PrefixIndex:
    """The tree. The BlockPool counts the references on its blocks."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self.root = PrefixNode(None, None, groups)

    def find(self, keys: BlockKeys, limit: int) -> list[PrefixNode]:
        """The nodes of the longest known prefix of ``keys``, at most ``limit`` of them."""
        found: list[PrefixNode] = []
        node: PrefixNode | None = self.root
        for index in range(min(limit, len(keys))):
            node = node.children.get(keys[index]) if node is not None else None
            if node is None:
                break
            found.append(node)
        return found

    def child(self, node: PrefixNode, key: BlockKey) -> PrefixNode:
        """The child of ``node`` with ``key``, made if it is new."""
        found = node.children.get(key)
        if found is None:
            found = node.children[key] = PrefixNode(key, node, self._groups)
        return found

    def prune(self, node: PrefixNode) -> None:
        """Remove ``node`` if it has neither blocks nor children, and then its parents likewise."""
        while node.parent is not None and not node.children and all(block == NO_BLOCK for block in node.blocks):
            self.detach(node)
            node = node.parent

    def detach(self, node: PrefixNode) -> None:
        """Remove ``node`` and its descendants."""
        assert node.parent is not None and node.key is not None
        del node.parent.children[node.key]
        for removed in node.below():
            removed.attached = False
