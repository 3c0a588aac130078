"""Requests on a model whose KV groups have windows: what they need of memory, and what the prefix cache gives them."""

from __future__ import annotations

import pytest
from rig import DEPTHS, Rig, alone, limits, request

LONG = [n % 83 for n in range(100)]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_prompt_much_longer_than_the_cache_runs_when_every_layer_has_a_window(depth, prefix_cache):
    req = request("r", LONG, max_tokens=20, ignore_eos=True)
    # Window and chunks: 5 - 1 + depth * 8 keys in blocks of 4, at any offset.
    rig = Rig(
        limits(num_blocks=7 + 2 * (depth - 1), step_tokens=8, kv_windows=(5,), prefix_cache=prefix_cache), depth=depth
    )
    answer = rig.run([req])["r"]
    assert answer.token_ids == alone(req, kv_windows=(5,)).token_ids and len(answer.token_ids) == 20
    assert rig.engine.stats().preemptions == 0


def test_bytes_decide_how_long_a_sequence_can_be():
    """A block of the full group costs 1 and one of the window 20: in 60 bytes, 2 of the window leave 20 of the full."""
    lim = limits(step_tokens=1, kv_windows=(None, 4), kv_block_bytes=(1, 20))
    rig = Rig(lim, budget_bytes=60)
    rig.run([request("long", LONG[:60], max_tokens=20, ignore_eos=True)])
    refused = rig.run([request("longer", LONG[:60], max_tokens=22, ignore_eos=True)])["longer"]
    assert refused.code == "insufficient_memory" and refused.final.error.data["longest"] == 80
    together = Rig(limits(step_tokens=1, kv_windows=(None,), kv_block_bytes=(21,)), budget_bytes=60)
    assert together.run([request("r", LONG[:10])])["r"].code == "insufficient_memory"
    expected = alone(request("long", LONG[:60], max_tokens=20, ignore_eos=True), kv_windows=(None, 4))
    assert rig.answers["long"].token_ids == expected.token_ids


@pytest.mark.parametrize("windows", [(None, 6), (None, 3), (7,), (None, 5, 30)])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_next_turn_and_another_continuation_find_the_prefix(windows, depth):
    rig = Rig(limits(kv_windows=windows), depth=depth)
    first = rig.run([request("first", LONG[:30], max_tokens=30, ignore_eos=True)])["first"]
    turn = request("turn", [*LONG[:30], *first.token_ids, 7], max_tokens=8)
    other = request("other", [*LONG[:21], 50, 51], max_tokens=8)
    answers = rig.run([turn, other])
    assert answers["turn"].final.cached_tokens == 56
    assert answers["other"].final.cached_tokens == 20
    for req in (turn, other):
        assert answers[req.request_id].token_ids == alone(req, kv_windows=windows).token_ids


def test_blocks_behind_a_window_are_given_to_others():
    """Eight sequences together need 8 x 30 blocks without a window; with one of 5 tokens, 40 are enough for all."""
    crowd = [request(f"r{i}", [i], max_tokens=100, ignore_eos=True) for i in range(8)]
    rig = Rig(limits(num_blocks=41, step_tokens=8, kv_windows=(5,)))
    answers = rig.run(crowd)
    assert rig.engine.stats().preemptions == 0
    for req in crowd:
        assert answers[req.request_id].token_ids == alone(req, kv_windows=(5,)).token_ids
