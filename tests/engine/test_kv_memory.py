"""What KV of models with sliding windows costs, by the pool's own count."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from invariants import check_blocks

from truffula.engine.blocks import BlockPool
from truffula.engine.budget import MemoryBudget
from truffula.engine.kv_layout import KvLayout
from truffula.engine.prefix import BlockKeys
from truffula.kernels.inputs import Capacity
from truffula.kernels.program import KvGroup
from truffula.kernels.reference import ReferenceBackend
from truffula.model.decoder import build_program
from truffula.model.names import WeightNames
from truffula.model.read import read_config
from truffula.testing.tiny import tiny_config
from truffula.weights.tying import Tie, TyingDecision

SIZE, CHUNK, TOKENS = 16, 512, 32768
# layers, heads, kv heads, head_dim, window
GEMMA3 = {
    "270m": (18, 4, 1, 256, 512),
    "1b": (26, 4, 1, 256, 512),
    "4b": (34, 8, 4, 256, 1024),
    "27b": (62, 32, 16, 128, 1024),
}


def programs(layers, heads, kv_heads, head_dim, window):
    """The program of a Gemma 3 of these sizes, and the same with all planes in one group that keeps everything."""
    config = tiny_config(
        "gemma3_text", num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, sliding_window=window, max_position_embeddings=131072,
    )  # fmt: skip
    spec = read_config(config).spec
    grouped = build_program(spec, WeightNames.canonical(spec), TyingDecision(Tie.TIED, "by hand"))
    planes = tuple(plane for group in grouped.kv_groups for plane in group.planes)
    return grouped, dataclasses.replace(grouped, kv_groups=(KvGroup(0, planes),))


def peak_bytes(program, prefix_cache):
    """The most bytes that one sequence of ``TOKENS`` tokens holds while it is computed in chunks."""
    capacity = Capacity(CHUNK, 1, 1, 1, num_blocks=1, block_size=SIZE, max_blocks_per_seq=TOKENS // SIZE)
    block_bytes = ReferenceBackend().plan(program, "bfloat16", capacity).kv_block_bytes
    layout = KvLayout(SIZE, CHUNK, tuple(group.window for group in program.kv_groups), block_bytes)
    pool = BlockPool(1 + TOKENS // SIZE, layout, budget=MemoryBudget(2**50), prefix_cache=prefix_cache)
    table, most = pool.new_table(), 0
    keys = BlockKeys("", (), SIZE)
    keys.extend(np.arange(TOKENS, dtype=np.int32))
    for done in range(CHUNK, TOKENS + 1, CHUNK):
        assert pool.extend(table, done)
        most = max(most, pool.used_bytes())
        pool.register(table, keys, done)
        pool.free_behind(table, done, 0.0)
    check_blocks(pool, [table])
    assert most <= layout.nbytes(layout.peak_blocks(TOKENS))
    return most


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("sizes", GEMMA3.values(), ids=GEMMA3.keys())
def test_gemma_3_holds_a_quarter_at_32k_tokens(sizes, prefix_cache, record_property):
    grouped, together = programs(*sizes)
    ratio = peak_bytes(grouped, prefix_cache) / peak_bytes(together, prefix_cache)
    record_property("ratio", ratio)
    assert ratio <= 0.25
