"""What the sampler is told of a sequence equals what a look at all its tokens would say, however it was kept."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import request

from truffula.engine.sampling import SequenceSampling

ids = st.lists(st.integers(0, 300), max_size=150)


@settings(max_examples=60, deadline=None)
@given(ids.filter(bool), ids, ids)
def test_seen_tokens_are_those_of_prompt_and_completion(prompt, before, after):
    sampling = SequenceSampling(request("r", prompt, presence_penalty=1.0), frozenset(), 301)
    seen_ids, counts = sampling.seen(np.asarray(before, np.int32))
    for place in range(len(after) + 1):
        completion = Counter(before + after[:place])
        expected = {token: completion[token] for token in set(prompt) | set(completion)}
        assert dict(zip(seen_ids.tolist(), counts.tolist(), strict=True)) == expected
        if place < len(after):
            sampling.add(after[place])
            seen_ids, counts = sampling.seen(np.asarray(before + after[: place + 1], np.int32))


def test_without_penalties_nothing_is_kept():
    sampling = SequenceSampling(request("r", [1, 2, 3]), frozenset(), 10)
    assert [len(part) for part in sampling.seen(np.asarray([4, 4], np.int32))] == [0, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.integers(0, 20), st.floats(-9, 9, width=32), max_size=5),
    st.frozensets(st.integers(0, 25), max_size=4), st.integers(0, 3), st.integers(0, 5),
)  # fmt: skip
def test_bias_is_the_requests_and_bans_every_end_before_min_tokens(bias, ends, min_tokens, draw):
    sampling = SequenceSampling(request("r", [1], logit_bias=bias, min_tokens=min_tokens), ends, 21)
    expected = dict(bias)
    if draw < min_tokens:
        expected |= {token: -np.inf for token in ends if token <= 20}
    biased, values = sampling.bias(draw)
    assert dict(zip(biased.tolist(), values.tolist(), strict=True)) == expected
    assert biased.tolist() == sorted(biased.tolist())
