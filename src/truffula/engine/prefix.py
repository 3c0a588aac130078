"""Which KV block holds which tokens: chained hash keys, verified on every hit.

Key of a block = H(key of the block before it, its token ids); the first block's parent is the namespace: the adapter
generation and the tenant's salt. So equal tokens under another adapter, or of another tenant, never meet. A hit is
believed only when the tokens and the parent entry are the same as well: a collision costs a miss, not a wrong answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from truffula.kernels.inputs import Int32

Digest = Callable[[bytes], bytes]


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def namespace(generation: str | None, salt: str) -> bytes:
    """The root of a chain. Length first, so that no salt can imitate a generation."""
    name = (generation or "").encode()
    return len(name).to_bytes(4, "little") + name + salt.encode("utf-8", "surrogatepass")


class PrefixChain:
    """The keys of one sequence's full blocks, each hashed once. Tokens only ever append, so keys stay true."""

    def __init__(self, root: bytes, block_size: int, digest: Digest = blake) -> None:
        self.root = root
        self._block_size = block_size
        self._digest = digest
        self._keys: list[bytes] = []
        self._tokens: list[bytes] = []

    def extend(self, token_ids: Int32) -> None:
        """Hash the full blocks of ``token_ids`` (all of the sequence's tokens so far) that are new."""
        size = self._block_size
        for index in range(len(self._keys), len(token_ids) // size):
            tokens = token_ids[index * size : (index + 1) * size].tobytes()
            parent = self._keys[index - 1] if index else self._digest(self.root)
            self._tokens.append(tokens)
            self._keys.append(self._digest(parent + tokens))

    def __len__(self) -> int:
        return len(self._keys)

    def block(self, index: int) -> tuple[bytes, bytes]:
        """Key and token bytes of full block ``index``."""
        return self._keys[index], self._tokens[index]


@dataclass(frozen=True, slots=True)
class Entry:
    """One indexed block. ``parent`` is the serial of the entry before it, or the namespace of a first block."""

    key: bytes
    parent: int | bytes
    tokens: bytes
    block: int
    serial: int


class PrefixIndex:
    """Entries by key and by block. Knows nothing of who uses a block: that is the BlockPool's affair."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, Entry] = {}
        self._by_block: dict[int, Entry] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._by_block)

    def find(self, chain: PrefixChain, limit: int) -> list[Entry]:
        """The longest run of indexed blocks that ``chain`` begins with, at most ``limit`` of them."""
        found: list[Entry] = []
        parent: int | bytes = chain.root
        for index in range(min(limit, len(chain))):
            key, tokens = chain.block(index)
            entry = self._by_key.get(key)
            if entry is None or entry.parent != parent or entry.tokens != tokens:
                break
            found.append(entry)
            parent = entry.serial
        return found

    def at(self, key: bytes) -> Entry | None:
        return self._by_key.get(key)

    def of_block(self, block: int) -> Entry | None:
        return self._by_block.get(block)

    def insert(self, key: bytes, parent: int | bytes, tokens: bytes, block: int) -> Entry:
        assert key not in self._by_key and block not in self._by_block, block
        self._serial += 1
        entry = Entry(key, parent, tokens, block, self._serial)
        self._by_key[key] = entry
        self._by_block[block] = entry
        return entry

    def remove(self, block: int) -> None:
        """Forget what ``block`` holds; nothing happens when it isn't indexed."""
        entry = self._by_block.pop(block, None)
        if entry is not None:
            del self._by_key[entry.key]

    def check(self) -> None:
        assert len(self._by_key) == len(self._by_block)
        assert all(self._by_block[entry.block] is entry for entry in self._by_key.values())
