"""The ``SequenceSampling`` of a request has all its parameters."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from rig import request

from truffula.engine.sequence import sampling_of


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.integers(0, 20), st.floats(-9, 9, width=32), max_size=5),
    st.frozensets(st.integers(0, 25), max_size=4), st.integers(0, 3),
)  # fmt: skip
def test_bias_is_the_requests_and_ends_are_banned_only_with_min_tokens(bias, ends, min_tokens):
    sampling = sampling_of(request("r", [1], logit_bias=bias, min_tokens=min_tokens), ends, 21)
    assert dict(zip(sampling.bias_ids.tolist(), sampling.bias_values.tolist(), strict=True)) == bias
    assert sampling.min_tokens == min_tokens
    assert set(sampling.banned_ids.tolist()) == ({end for end in ends if end <= 20} if min_tokens else set())


def test_every_parameter_has_its_place():
    asked = {
        "temperature": 0.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.5,
        "frequency_penalty": 0.25, "presence_penalty": -0.5, "seed": 2**64 - 1, "logprobs": 100, "prompt_logprobs": 3,
        "logprobs_of": "warped",
    }  # fmt: skip
    s = sampling_of(request("r", [1], choice=2, **asked), frozenset(), 21)
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.typical_p) == (0.5, 7, 0.8, 0.1, 0.9)
    assert (s.repetition, s.frequency, s.presence, s.penalised) == (1.5, 0.25, -0.5, True)
    assert (s.seed, s.choice, s.n_logprobs, s.n_prompt_logprobs, s.warped) == (2**64 - 1, 2, 21, 3, True)
    s = sampling_of(request("r", [1]), frozenset({3}), 21)
    assert (s.n_logprobs, s.n_prompt_logprobs, s.warped, s.penalised) == (-1, -1, False, False)


def test_a_request_without_a_seed_has_one_of_its_own_that_a_resumed_one_keeps():
    seeds = [sampling_of(request(name, [1], choice=choice), frozenset(), 21).seed for name in "ab" for choice in (0, 1)]
    assert len(set(seeds)) == 4
    resumed = request("a", [1], resume_ids=[5, 6])
    assert sampling_of(resumed, frozenset(), 21).seed == seeds[0]
