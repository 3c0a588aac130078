"""``SamplingParams``: a wrong type or value of any field is refused by name."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from truffula import SamplingParams
from truffula.errors import InvalidRequest

BIASES = {1: 2.0, 3: 101.0, 4: -5.0}
WRONG: list[tuple[str, Any, str]] = [
    *((name, "1", "'1'") for name in SamplingParams.__struct_fields__ if name != "stop"),
    *((name, None, "None") for name in ("temperature", "top_k", "logit_bias", "stop", "stop_token_ids", "n")),
    ("temperature", float("nan"), "nan"),
    ("temperature", -0.5, "-0.5"),
    ("temperature", 10**400, "out of range"),
    ("top_p", 0, "> 0"),
    ("top_p", 1.5, "<= 1"),
    ("frequency_penalty", 3, "<= 2"),
    ("top_k", 2**70, "<= 2147483647"),
    ("top_k", True, "`bool`"),
    ("max_tokens", 2**70, "<= 9223372036854775807"),
    ("seed", 2**64, "at most 18446744073709551615"),
    ("logit_bias", BIASES, "{3: 101.0}"),
    ("logit_bias", {1: 1.0, -2: 1.0}, "{-2: 1.0}"),
    ("logit_bias", {1: 10**400}, "out of range"),
    ("logit_bias", [1], "`array`"),
    ("stop", ["a", ""], "['']"),
    ("stop", 5, "`int`"),
    ("stop_token_ids", [7, -1], "[-1]"),
    ("logprobs", 1025, "<= 1024"),
    ("logprobs_of", "raw ", "expected one of raw, warped"),
    ("n", 0, ">= 1"),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_value_is_refused_by_field(name: str, value: Any, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})
    assert (
        caught.value.param == name and caught.value.message.startswith(f"{name} is ") and said in caught.value.message
    )
    assert msgspec.json.encode(caught.value.info()), "it crosses between processes"


def test_bounds_are_values() -> None:
    params = SamplingParams(
        temperature=0, top_p=1, frequency_penalty=-2, seed=2**64 - 1, logit_bias={0: -100, 5: 100}, logprobs=1024
    )
    assert (params.temperature, params.top_p, params.seed) == (0.0, 1.0, 2**64 - 1)
    assert isinstance(params.temperature, float)


def test_a_list_or_one_text_or_a_number_of_numpy_is_taken() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], temperature=np.float64(0.5))
    assert (params.stop, params.stop_token_ids, params.temperature) == (("end",), (1, 2), 0.5)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    given = {"seed": np.int64(3), "stop_token_ids": list(np.array([1, 2])), "logit_bias": {np.int32(1): np.float32(2)}}
    params = SamplingParams(**given)
    assert (params.seed, params.stop_token_ids, params.logit_bias) == (3, (1, 2), {1: 2.0})
    assert msgspec.json.encode(params)


def test_contradictions_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens is 5, above max_tokens = 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(InvalidRequest, match="best_of is 1, below n = 2"):
        SamplingParams(n=2, best_of=1)
    with pytest.raises(TypeError):
        SamplingParams(tempreature=1)
