"""Fields that contradict each other, and fields of the other side: honoured or refused by name, never dropped."""

import pytest
from live_server import MODEL, assert_canonical_error, ok


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"request_id": "a", "rid": "b"}, "request_id"),
        ({"ignore_eos": False, "ignore_eos_token": True}, "ignore_eos"),
        ({"include_stop_str_in_output": True, "no_stop_trim": False}, "include_stop_str_in_output"),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 5}, "prompt_logprobs"),
    ],
    ids=str,
)
def test_a_contradiction_is_refused(live, extra, param):
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1, **extra}
    assert assert_canonical_error(live.post("/v1/completions", body), 400, param)["param"] == param


@pytest.mark.parametrize(
    "extra",
    [
        {"request_id": "a", "rid": "a"},
        {"ignore_eos": True, "ignore_eos_token": True},
        {"echo": True, "logprobs": 2, "prompt_logprobs": 2},
        {"logprobs": 1, "prompt_logprobs": 2},
    ],
    ids=str,
)
def test_agreement_is_no_contradiction(live, extra):
    ok(live.post("/v1/completions", {"model": MODEL, "prompt": "Hello", "max_tokens": 1, **extra}))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"max_tokens": 4}, "max_new_tokens"),
        ({"n": 2}, "best_of"),
        ({"ignore_eos": True}, "ignore_eos_token"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"min_tokens": 4, "max_new_tokens": 2}, "max_new_tokens"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"min_p": 2}, "min_p"),
    ],
    ids=str,
)
def test_native_parameters_of_the_other_side_are_refused_by_name(live, extra, words):
    assert_canonical_error(live.post("/generate", {"inputs": "Hello", "parameters": extra}), 422, words)


def test_tools_beside_the_inputs_are_refused_too(live):
    assert_canonical_error(live.post("/generate", {"inputs": "Hello", "tools": [{"type": "function"}]}), 422, "tools")


def test_what_the_native_side_honours_of_the_other(live):
    def ids(**parameters):
        return [t["id"] for t in live.native(details=True, **parameters)["details"]["tokens"]]

    plain = ids(ignore_eos_token=True)
    assert ids(ignore_eos_token=True, logit_bias={str(plain[0]): -100})[0] != plain[0]
    assert set(ids(ignore_eos_token=True, logit_bias={"7": 100})) == {7}
    assert ids(ignore_eos_token=True, stop_token_ids=[plain[0]]) == plain[:1]
    assert len(ids(stop_token_ids=[plain[0]], min_tokens=3)) >= 3
    assert live.native(details=True, min_p=0.1)["details"]["seed"] is not None, "min_p switches sampling on"
