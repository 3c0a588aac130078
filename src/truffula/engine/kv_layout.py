"""KvLayout: how many blocks and bytes of KV a sequence needs, by KV group, and how many state rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KvLayout:
    """Blocks of ``block_size`` tokens in one or more KV groups.

    ``windows[g]`` is group g's window in tokens (None: it keeps all keys), ``block_bytes[g]`` what one of its blocks
    costs (0: bytes are not counted). ``chunk_tokens`` is the most tokens of one sequence that are planned and not yet
    committed; blocks behind the window are freed when tokens are committed. While a sequence runs it has ``state_rows``
    state rows (0: the model has no states), which cost ``state_bytes`` each.
    """

    block_size: int
    chunk_tokens: int
    windows: tuple[int | None, ...] = (None,)
    block_bytes: tuple[int, ...] = (0,)
    state_rows: int = 0
    state_bytes: int = 0

    @property
    def num_groups(self) -> int:
        return len(self.windows)

    @property
    def has_states(self) -> bool:
        return self.state_rows > 0

    @property
    def costs(self) -> tuple[int, ...]:
        """Bytes of a block of each group, then of a state row, if there are states."""
        return (*self.block_bytes, self.state_bytes) if self.has_states else self.block_bytes

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens from a sequence's start."""
        return -(-num_tokens // self.block_size)

    def first_block(self, group: int, position: int) -> int:
        """Index of the first block that queries at ``position`` and later read; those before it can be freed."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def freed_at(self, group: int, index: int) -> int:
        """The position from which on no query reads block ``index`` of a group with a window."""
        window = self.windows[group]
        assert window is not None
        return (index + 1) * self.block_size + window - 1

    def peak_blocks(self, num_tokens: int) -> list[int]:
        """Per group, the most blocks that a sequence holds at a time while ``num_tokens`` tokens are computed."""
        total = self.blocks_for(num_tokens)
        counts = []
        for window in self.windows:
            # Keys from the first query's window to the end of the chunk, which may begin at any offset of a block.
            span = 0 if window is None else window - 1 + self.chunk_tokens
            counts.append(total if window is None else min(total, (span + self.block_size - 2) // self.block_size + 1))
        return counts

    def nbytes(self, counts: Sequence[int]) -> int:
        """Bytes of ``counts[g]`` blocks of each group."""
        return sum(count * cost for count, cost in zip(counts, self.block_bytes, strict=True))

    def peak_bytes(self, num_tokens: int) -> int:
        """The most bytes that a sequence holds at a time while ``num_tokens`` tokens are computed."""
        return self.nbytes(self.peak_blocks(num_tokens)) + self.state_rows * self.state_bytes

    def longest(self, most_tokens: int, *, nbytes: int | None = None, num_blocks: int | None = None) -> int:
        """The longest sequence, in tokens and at most ``most_tokens``, that can be computed alone.

        Its blocks must fit in ``nbytes`` bytes and in ``num_blocks`` blocks of each group; None: no such limit.
        """

        def fits(blocks: int) -> bool:
            peaks = self.peak_blocks(blocks * self.block_size)
            enough = num_blocks is None or max(peaks) <= num_blocks
            return enough and (nbytes is None or self.peak_bytes(blocks * self.block_size) <= nbytes)

        low, high = 0, self.blocks_for(most_tokens)
        if fits(high):  # each request asks, and most engines have room for any length
            return most_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return min(most_tokens, low * self.block_size)
