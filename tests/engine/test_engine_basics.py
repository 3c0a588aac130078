"""What the engine promises about one request: ends, limits, logprobs, times."""

from __future__ import annotations

from rig import Rig, request


def test_a_greedy_request_runs_to_its_length():
    rig = Rig()
    answer = rig.run([request("a", [1, 2, 3], max_tokens=5, ignore_eos=True)])["a"]
    assert len(answer.token_ids) == 5
    assert answer.finish_reason == "length"
