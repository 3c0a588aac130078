"""Divides the memory limit before anything is loaded.

The limit divides into a fixed part (weights, arena, logits, the scratch block) and a pool, which KV blocks, sequence
states and adapters share by need (``engine/budget.py``). KV memory is touched when it is used, so a large pool costs
nothing while idle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from truffula.engine.kv_layout import KvLayout
from truffula.errors import InsufficientMemory
from truffula.kernels.backend import Backend, MemoryLimit, MemoryPlan
from truffula.option import format_size

DEFAULT_SHARE = 0.85
"""Of the memory that is free at the start: the rest is for the loading worker, the API process and the page cache."""
KV_SHARE = 0.9
"""Of the pool, where KV takes its memory at load: the rest is for adapters."""
SHORTEST_USEFUL_TOKENS = 1024
"""A model length is lowered to what fits when none was asked for, but not below this (or the model's own)."""


@dataclass(frozen=True)
class MemoryDivision:
    """How the limit is divided.

    ``pool_bytes`` is for adapters, KV and states. ``num_blocks`` is how many block ids each KV group has, the scratch
    block among them; ``num_states`` is the number of state rows, row 0 among them. ``kv_tokens`` is what the pool holds
    of sequences of ``max_model_len`` tokens.
    """

    limit_bytes: int
    reason: str
    fixed_bytes: int
    pool_bytes: int
    num_blocks: int
    kv_tokens: int
    max_model_len: int
    num_states: int = 0
    warnings: tuple[str, ...] = ()


def plan_memory(
    plan: MemoryPlan,
    limit: MemoryLimit,
    layout: KvLayout,
    *,
    model_len: int,
    asked_len: int | None,
    max_running: int,
) -> MemoryDivision:
    """Divide ``limit``; at least one sequence of the model's length must fit.

    ``model_len`` is the model's longest, ``asked_len`` the operator's choice below it, if any. Without one, a length
    that does not fit is lowered to what does, with a warning.

    Raises:
        InsufficientMemory: The weights or the shortest useful sequence don't fit; with the numbers and the ways out.
    """
    fixed = plan.fixed_bytes
    pool = limit.nbytes - fixed
    wanted = asked_len or model_len
    least = wanted if asked_len is not None else min(wanted, SHORTEST_USEFUL_TOKENS)
    if plan.kv_at_load:
        num_states, most = _at_load(layout, max(0, pool), max_running)
        short_of_states = layout.has_states and num_states <= layout.state_rows
        longest = 0 if short_of_states else layout.longest(wanted, num_blocks=most)
    else:
        longest = layout.longest(wanted, nbytes=max(0, pool))
    if longest < least or pool < 0:
        raise _too_little(plan, limit, layout, least, longest)
    warnings: tuple[str, ...] = ()
    if longest < wanted:
        warnings = (
            f"max_model_len is {longest} instead of {wanted}: {format_size(limit.nbytes)} ({limit.reason}) "
            f"have no room for more KV cache beside {format_size(fixed)} of weights and working memory.",
        )
    blocks = max_running * layout.blocks_for(longest)
    tokens = max_running * longest
    if plan.kv_at_load:
        blocks = min(blocks, most)
        taken = blocks * sum(layout.block_bytes) + max(0, num_states - 1) * layout.state_bytes
        tokens, count = min(tokens, blocks * layout.block_size), blocks + 1
        return MemoryDivision(
            limit.nbytes, limit.reason, fixed + taken, pool - taken, count, tokens, longest, num_states, warnings
        )
    if each := layout.peak_bytes(longest):
        # The cheapest block bounds the ids of all groups: KV memory is committed block by block, when it is written.
        blocks = min(blocks, pool // min(layout.block_bytes))
        tokens = min(tokens, pool // each * longest + layout.longest(longest, nbytes=pool % each))
    states = 0
    if layout.has_states:  # as many snapshots as blocks, if they fit: the budget evicts the least recently used
        states = 1 + min(max_running * layout.state_rows + blocks, pool // layout.state_bytes)
    return MemoryDivision(limit.nbytes, limit.reason, fixed, pool, blocks + 1, tokens, longest, states, warnings)


def _at_load(layout: KvLayout, pool: int, max_running: int) -> tuple[int, int]:
    """State rows (0: no layer has states), and the most blocks of each KV group beside them, in ``KV_SHARE`` of
    ``pool``."""
    share, rows = int(pool * KV_SHARE), 0
    if layout.has_states:  # each running sequence's, and as many snapshots
        rows = 1 + min(2 * max_running * layout.state_rows, share // 2 // layout.state_bytes)
        share -= (rows - 1) * layout.state_bytes
    return rows, share // max(1, sum(layout.block_bytes))


def _too_little(plan: MemoryPlan, limit: MemoryLimit, layout: KvLayout, least: int, holds: int) -> InsufficientMemory:
    fixed, kv = plan.fixed_bytes, layout.peak_bytes(least)
    if plan.kv_at_load:
        states = 2 * layout.state_rows * layout.state_bytes
        kv = math.ceil((layout.blocks_for(least) * sum(layout.block_bytes) + states) / KV_SHARE)
    ways = ["raise --memory" if limit.reason.startswith("--memory") else "free memory or raise the limit"]
    if holds >= 1:
        ways.append(f"--max-model-len {holds} (the longest that fits)")
    else:
        ways.append("a smaller model, or lower --step-tokens and --max-running")
    cached = "KV cache and state" if layout.has_states else "KV cache"
    message = (
        f"Not enough memory: {format_size(fixed + kv)} are needed, but only {format_size(limit.nbytes)} may be used "
        f"({limit.reason}). Weights {format_size(plan.weight_bytes)}, working memory {format_size(plan.arena_bytes)}, "
        f"logits {format_size(plan.logits_bytes)}, {cached} of one sequence of {least} tokens {format_size(kv)}. "
        f"Ways out: {'; '.join(ways)}."
    )
    return InsufficientMemory(
        message, param="memory", needed_bytes=fixed + kv, limit_bytes=limit.nbytes, weight_bytes=plan.weight_bytes,
        arena_bytes=plan.arena_bytes, logits_bytes=plan.logits_bytes, kv_bytes=kv, max_model_len=least,
        longest_that_fits=holds,
    )  # fmt: skip


def memory_limit(asked_bytes: int | None, backend: Backend) -> MemoryLimit:
    """The configured limit, or else ``DEFAULT_SHARE`` of the memory that is free now on the device of ``backend``."""
    if asked_bytes is not None:
        return MemoryLimit(asked_bytes, "--memory")
    free = backend.free_memory()
    share = int(free.nbytes * DEFAULT_SHARE)
    return MemoryLimit(share, f"{DEFAULT_SHARE:.0%} of {format_size(free.nbytes)} {free.reason}")
