"""What KV of models with sliding windows costs, by the pool's own count."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from invariants import check_blocks

from truffula.engine.blocks import BlockPool
from truffula.engine.budget import MemoryBudget
from truffula.engine.kv_layout import KvLayout
from truffula.engine.memory import KV_SHARE, plan_memory
from truffula.engine.prefix import BlockKeys
from truffula.errors import InsufficientMemory
from truffula.kernels.backend import MemoryLimit, MemoryPlan
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


def at_load(pool, **changes):
    """The division where KV takes its memory at load, with so many bytes beside what is fixed."""
    plan = MemoryPlan(
        1000, 20, 10, kv_block_bytes=(100, 50), state_bytes=changes.pop("state_bytes", 0), kv_at_load=True
    )
    states = 2 if plan.state_bytes else 0
    layout = KvLayout(16, 64, (None, 64), plan.kv_block_bytes, state_rows=states, state_bytes=plan.state_bytes)
    given = {"model_len": 4096, "asked_len": None, "max_running": 3, **changes}
    return plan, plan_memory(plan, MemoryLimit(plan.fixed_bytes + pool, "--memory"), layout, **given)


def test_kv_that_takes_its_memory_at_load_leaves_a_share_for_adapters():
    """Every block id costs memory in each group, whether a window frees blocks or not."""
    for pool, state in ((10**6, 0), (60_000, 0), (10**6, 400), (100_000, 400)):
        plan, found = at_load(pool, state_bytes=state)
        taken = (found.num_blocks - 1) * 150 + max(0, found.num_states - 1) * state
        assert taken <= KV_SHARE * pool
        assert found.fixed_bytes == plan.fixed_bytes + taken and found.pool_bytes == pool - taken
        assert (found.num_blocks - 1) * 16 >= found.max_model_len
    _, roomy = at_load(10**6)
    assert (roomy.num_blocks, roomy.max_model_len, roomy.kv_tokens) == (1 + 3 * 256, 4096, 3 * 4096)


def test_without_room_for_one_sequence_at_load_the_error_has_the_numbers():
    with pytest.raises(InsufficientMemory, match="Ways out: raise --memory") as caught:
        at_load(1000)
    assert caught.value.data["needed_bytes"] > caught.value.data["limit_bytes"]
    with pytest.raises(InsufficientMemory):
        at_load(38_000, asked_len=4096)
    with pytest.raises(InsufficientMemory) as caught:  # room for its blocks, not for the states of one sequence
        at_load(200_000, state_bytes=60_000)
    assert caught.value.data["needed_bytes"] > caught.value.data["limit_bytes"]
    assert at_load(43_000, asked_len=4096)[1].max_model_len == 4096
