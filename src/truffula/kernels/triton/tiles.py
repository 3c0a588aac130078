"""How products and attention are cut.

What fixes the order of a row's sums (``k``, ``cut``, ``key_split``, ``keys``) depends on the model alone. Only how many
rows a tile has depends on the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from truffula.kernels.triton.work import AttentionCut


@dataclass(frozen=True)
class Tile:
    rows: int
    warps: int


@dataclass(frozen=True)
class Tiles:
    """``k`` inputs and ``columns`` outputs of a tile, ``stages`` of its loads. A product is cut along its inputs until
    it has ``items``, if each has ``least`` inputs; with more than ``split_rows`` rows one item adds all its cuts.
    ``precision`` of float32 products of adapters. Attention has ``query_rows`` rows (queries times the heads of a KV
    head) and ``keys`` a tile.
    """

    k: int
    columns: int
    stages: int
    items: int
    least: int
    split_rows: int
    large: tuple[Tile, int]
    precision: str
    query_rows: int
    keys: int
    key_split: int
    enough: int
    partial_rows: int

    def cut(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The number of cuts of a product's inputs, and the columns of each."""
        wanted = -(-self.items // -(-outputs // self.columns))
        split = max(1, min(wanted, 8, inputs // self.least))
        chunk = -(-inputs // (split * self.k)) * self.k
        return -(-inputs // chunk), chunk

    def tile(self, rows: int, least_rows: int) -> Tile:
        """Of a product of ``rows`` rows."""
        tile, beyond = self.large
        return tile if rows > beyond else Tile(least_rows, 4)

    def attention(self, group: int) -> AttentionCut:
        """For ``group`` heads that share a KV head."""
        queries = max(1, self.query_rows // group)
        return AttentionCut(self.key_split, queries, self.enough, self.partial_rows)


def gpu_tiles(dtype: str, processors: int) -> Tiles:
    """For a GPU with so many multiprocessors; float32 is not for speed."""
    wide = dtype != "float32"
    return Tiles(
        k=64 if wide else 32, columns=64, stages=4 if wide else 2, items=2 * processors, least=512, split_rows=256,
        large=(Tile(128, 8), 64) if wide else (Tile(64, 4), 64), precision="tf32x3" if wide else "ieee", query_rows=64,
        keys=64 if wide else 32, key_split=512, enough=2 * processors, partial_rows=16384,
    )  # fmt: skip


def host_tiles(dtype: str) -> Tiles:
    """For the interpreter: small, so that small shapes have several tiles, cuts and splits."""
    return Tiles(
        k=16, columns=32, stages=1, items=4, least=16, split_rows=24, large=(Tile(32, 4), 16),
        precision="tf32x3" if dtype != "float32" else "ieee", query_rows=16, keys=16, key_split=32, enough=6,
        partial_rows=512,
    )  # fmt: skip
