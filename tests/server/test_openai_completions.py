"""``/v1/completions``, field by field."""

import pytest
from live_server import MODEL, assert_canonical_error, events, ok, tokenizer


def test_the_answers_shape(live):
    answer = live.completion(prompt="Hello world", max_tokens=5)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["created"] > 1_600_000_000
    assert answer["model"] == MODEL
    assert isinstance(answer["system_fingerprint"], str)
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"
    prompt_tokens = len(tokenizer().encode("Hello world").ids)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == prompt_tokens
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == prompt_tokens + 5


def test_max_tokens_defaults_to_sixteen(live):
    answer = live.completion(prompt="Hello", ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16


def test_prompts_times_choices_come_prompt_by_prompt(live):
    prompts = ["Hello", "The Lorax", "trees"]
    both = live.completion(prompt=prompts, n=2, max_tokens=4)
    assert [c["index"] for c in both["choices"]] == [0, 1, 2, 3, 4, 5]
    for i, prompt in enumerate(prompts):
        alone = live.completion(prompt=prompt, max_tokens=4)["choices"][0]["text"]
        assert both["choices"][2 * i]["text"] == both["choices"][2 * i + 1]["text"] == alone
    assert both["usage"]["completion_tokens"] == sum(
        len(c["token_ids"])
        for c in live.completion(prompt=prompts, n=2, max_tokens=4, return_token_ids=True)["choices"]
    )


def test_token_ids_are_taken_as_they_are(live):
    ids = tokenizer().encode("The Lorax spoke").ids
    text = live.completion(prompt="The Lorax spoke", max_tokens=6)["choices"][0]["text"]
    assert live.completion(prompt=ids, max_tokens=6)["choices"][0]["text"] == text
    assert live.completion(prompt=[ids, ids], max_tokens=6)["choices"][1]["text"] == text


def test_sampling_is_the_default_and_a_seed_repeats(live):
    def sample(**more):
        body = {"prompt": "Hello", "max_tokens": 12, "temperature": None, **more}
        return live.completion(**body)["choices"][0]["text"]

    assert len({sample() for _ in range(4)}) > 1
    assert sample(seed=7) == sample(seed=7)
    assert sample(seed=-1) == sample(seed=-1) == sample(seed=2**64 - 1)
    assert len({sample(seed=i) for i in range(6)}) > 1


def test_choices_of_a_seed_differ_and_repeat(live):
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 1, "n": 3, "seed": 11}
    first = [c["text"] for c in live.completion(**body)["choices"]]
    assert len(set(first)) == 3
    assert [c["text"] for c in live.completion(**body)["choices"]] == first


def test_logprobs_are_four_lists_that_spell_the_text(live):
    choice = live.completion(prompt="Hello", max_tokens=8, logprobs=3, ignore_eos=True)["choices"][0]
    found = choice["logprobs"]
    assert len({len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
    assert "".join(found["tokens"]) == choice["text"]
    offset = 0
    for token, logprob, top, at in zip(
        *(found[k] for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")), strict=True
    ):
        assert at == offset
        offset += len(token)
        assert logprob <= 0
        assert top[token] == logprob
        assert max(top.values()) == logprob, "greedy takes the most likely"
    only = live.completion(prompt="Hello", max_tokens=4, logprobs=0)["choices"][0]["logprobs"]
    assert all(list(top) == [token] for token, top in zip(only["tokens"], only["top_logprobs"], strict=True))


def test_echo_with_logprobs_scores_the_prompt(live):
    prompt = "The Lorax spoke"
    choice = live.completion(prompt=prompt, max_tokens=0, echo=True, logprobs=1)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == prompt == "".join(found["tokens"])
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(p < 0 for p in found["token_logprobs"][1:])
    assert choice["finish_reason"] == "length"
    longer = live.completion(prompt=prompt, max_tokens=3, echo=True, logprobs=1)["choices"][0]
    assert longer["text"].startswith(prompt)
    assert "".join(longer["logprobs"]["tokens"]) == longer["text"]
    assert longer["logprobs"]["token_logprobs"][1 : len(found["tokens"])] == pytest.approx(
        found["token_logprobs"][1:], abs=1e-4
    )


def test_after_an_echoed_prompt_the_end_token_has_a_logprob(live):
    """A client that scores a text drops the last entry for the generated token."""
    prompt = "The Lorax spoke"
    alone = live.completion(prompt=prompt, max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    ended = live.completion(prompt=prompt, max_tokens=1, echo=True, logprobs=1, logit_bias={"1": 100})["choices"][0]
    assert (ended["finish_reason"], ended["text"]) == ("stop", prompt)
    assert len(ended["logprobs"]["tokens"]) == len(alone["tokens"]) + 1
    assert ended["logprobs"]["token_logprobs"][1:-1] == pytest.approx(alone["token_logprobs"][1:], abs=1e-4)


def test_echo_without_logprobs(live):
    plain = live.completion(prompt="Hello", max_tokens=4)["choices"][0]["text"]
    assert live.completion(prompt="Hello", max_tokens=4, echo=True)["choices"][0]["text"] == "Hello" + plain


def test_stop_as_text_or_list_is_left_out(live):
    text = live.completion(prompt="Hello", max_tokens=16, ignore_eos=True)["choices"][0]["text"]
    stop = text[5:7]
    for given in (stop, [stop], ["never in it", stop]):
        choice = live.completion(prompt="Hello", max_tokens=16, ignore_eos=True, stop=given)["choices"][0]
        assert choice["text"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == stop
    kept = live.completion(prompt="Hello", max_tokens=16, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == text[: text.index(stop)] + stop


def test_stop_token_ids_and_min_tokens(live):
    ids = live.completion(prompt="Hello", max_tokens=8, ignore_eos=True, return_token_ids=True)["choices"][0][
        "token_ids"
    ]
    choice = live.completion(prompt="Hello", max_tokens=8, ignore_eos=True, stop_token_ids=[ids[3]])["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == ids[3]


def test_logit_bias_bans_and_forces_also_when_greedy(live):
    first = live.completion(prompt="Hello", max_tokens=1, return_token_ids=True)["choices"][0]["token_ids"][0]
    banned = live.completion(prompt="Hello", max_tokens=4, logit_bias={str(first): -100}, return_token_ids=True)
    assert first not in banned["choices"][0]["token_ids"]
    forced = live.completion(prompt="Hello", max_tokens=4, logit_bias={"77": 100}, return_token_ids=True)
    assert forced["choices"][0]["token_ids"] == [77] * 4


def test_repetition_and_frequency_penalties_are_in_effect(live):
    plain = live.completion(prompt="Hello", max_tokens=24, ignore_eos=True)["choices"][0]["text"]
    assert (
        live.completion(prompt="Hello", max_tokens=24, ignore_eos=True, frequency_penalty=2)["choices"][0]["text"]
        != plain
    )


def test_best_of_returns_the_most_likely(live):
    body = {"prompt": "Hello", "max_tokens": 6, "temperature": 1, "seed": 5, "logprobs": 0, "ignore_eos": True}
    best = live.completion(**body, best_of=2)["choices"]
    assert len(best) == 1
    all_of_them = live.completion(**body, n=2)["choices"]
    mean = lambda c: sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"])
    assert mean(best[0]) == pytest.approx(max(mean(c) for c in all_of_them), abs=1e-4)


def test_return_token_ids_and_tokens_as_ids(live):
    choice = live.completion(
        prompt="Hello", max_tokens=4, return_token_ids=True, logprobs=1, return_tokens_as_token_ids=True
    )
    (found,) = choice["choices"]
    assert found["prompt_token_ids"] == tokenizer().encode("Hello").ids
    assert found["logprobs"]["tokens"] == [f"token_id:{i}" for i in found["token_ids"]]


def test_prompt_logprobs(live):
    (choice,) = live.completion(prompt="The Lorax", max_tokens=1, prompt_logprobs=2)["choices"]
    ids = tokenizer().encode("The Lorax").ids
    rows = choice["prompt_logprobs"]
    assert rows[0] is None
    assert len(rows) == len(ids)
    for token, row in zip(ids[1:], rows[1:], strict=True):
        assert row[str(token)]["logprob"] <= 0
        assert len(row) in (2, 3)


def test_truncation_keeps_the_last_tokens(live):
    ids = tokenizer().encode("The Truffula trees were bright").ids
    short = live.completion(prompt=ids, max_tokens=4, truncate_prompt_tokens=3)
    assert short["usage"]["prompt_tokens"] == 3
    assert short["choices"][0]["text"] == live.completion(prompt=ids[-3:], max_tokens=4)["choices"][0]["text"]


def test_special_tokens_are_added_unless_told_otherwise(live):
    n = len(tokenizer().encode("Hello", add_special_tokens=False).ids)
    assert live.completion(prompt="Hello", max_tokens=1)["usage"]["prompt_tokens"] == n + 1
    assert live.completion(prompt="Hello", max_tokens=1, add_special_tokens=False)["usage"]["prompt_tokens"] == n


def test_an_empty_string_is_the_start_of_a_document(live):
    assert live.completion(prompt="", max_tokens=2)["usage"]["prompt_tokens"] == 1


def test_a_stream_says_the_same(live):
    body = {
        "model": MODEL,
        "prompt": ["Hello", "The Lorax"],
        "temperature": 0,
        "max_tokens": 9,
        "logprobs": 1,
        "echo": True,
    }
    whole = ok(live.post("/v1/completions", body))
    *chunks, done = events(live.post("/v1/completions", {**body, "stream": True}))
    assert done == "[DONE]"
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert all("usage" not in c for c in chunks)
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for name in ("tokens", "text_offset"):
            assert [x for c in mine for x in c["logprobs"][name]] == choice["logprobs"][name]


def test_usage_in_a_stream_only_when_asked_for(live):
    body = {"model": MODEL, "prompt": "Hello", "temperature": 0, "max_tokens": 5, "stream": True, "n": 2}
    *chunks, last, done = events(live.post("/v1/completions", {**body, "stream_options": {"include_usage": True}}))
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == ok(live.post("/v1/completions", {**body, "stream": False}))["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }
    assert all(c["usage"] is None for c in chunks)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 500}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": True}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "min_p": 2}, "min_p"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": -1}, "n"),
        ({"prompt": "a", "n": 10**6}, "n"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["b", ""]}, "stop"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 50}, "stop"),
        ({"prompt": "a", "logprobs": 10_000}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "seed": -(2**63) - 1}, "seed"),
        ({"prompt": "a", "seed": "7"}, "seed"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "a", "frequency_penalty": 2.5}, "frequency_penalty"),
        ({"prompt": "a", "presence_penalty": -3}, "presence_penalty"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "a", "adapter_source": "nfs"}, "adapter_source"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "response_format": {"type": "yaml"}}, "response_format"),
        ({"prompt": "a", "guided_json": {"not": {}}}, "guided_json"),
        ({"prompt": "a", "structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"prompt": "a", "structured_outputs": {"whitespace_pattern": " *"}}, "structured_outputs.whitespace_pattern"),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "a", "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"prompt": "a", "bad_words": ["x"]}, "bad_words"),
        ({"prompt": "a", "logits_processors": ["os.system"]}, "logits_processors"),
        ({"prompt": "a", "priority": 3}, "priority"),
        ({"prompt": "a", "truncation_side": "right"}, "truncation_side"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else value,
)
def test_bad_values_are_refused_by_name(live, body, param):
    error = assert_canonical_error(live.post("/v1/completions", {"model": MODEL, **body}), 400)
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").split("[")[0] == param


@pytest.mark.parametrize(
    "extra",
    [
        {"suffix": None},
        {"suffix": ""},
        {"response_format": {"type": "text"}},
        {"tools": []},
        {"use_beam_search": False},
        {"length_penalty": 1.0},
        {"guided_json": None},
        {"logit_bias": {}},
        {"stop": []},
        {"stop": None},
        {"top_k": -1},
        {"top_k": 0},
        {"user": None, "metadata": {}, "store": False, "service_tier": "auto"},
        {"n": None, "max_tokens": None, "temperature": None, "seed": None, "stream": None, "stream_options": None},
    ],
    ids=lambda value: str(value)[:60],
)
def test_neutral_values_change_nothing(live, extra):
    response = live.post("/v1/completions", {"model": MODEL, "prompt": "Hello", "max_tokens": 1, **extra})
    ok(response)
    assert "x-truffula-ignored" not in response.headers


def test_the_headers_lorax_gives_here_too(live):
    response = live.post("/v1/completions", {"model": "pirate", "prompt": ["Hello", "you"], "max_tokens": 2})
    usage = ok(response)["usage"]
    assert response.headers["x-generated-tokens"] == str(usage["completion_tokens"])
    assert response.headers["x-prompt-tokens"] == str(usage["prompt_tokens"])
    assert response.headers["x-compute-characters"] == "8"
    assert response.headers["x-adapter-id"] == "pirate"


def test_unknown_keys_are_listed(live):
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1, "temprature": 0, "näme\r\nx": 1}
    response = live.post("/v1/completions", body)
    ok(response)
    assert "temprature" in response.headers["x-truffula-ignored"]


def test_a_prompt_too_long(live):
    error = assert_canonical_error(live.post("/v1/completions", {"model": MODEL, "prompt": [5] * 300}), 400)
    assert error["code"] == "context_length_exceeded"


def test_best_of_is_bounded_like_n_and_not_by_loraxs_limit(live):
    """OpenAI's best_of goes to 20; --max-best-of is of the native routes."""
    found = live.completion(prompt="Hello", best_of=5, n=2, max_tokens=2, temperature=1, seed=1)
    assert len(found["choices"]) == 2
    body = {"prompt": "Hello", "best_of": 17, "max_tokens": 1}
    assert_canonical_error(live.post("/v1/completions", body), 400, "best_of is 17; this server allows at most 16")


def test_truncate_prompt_tokens_is_bounded_by_the_model(live):
    found = live.completion(prompt="Hello " * 300, truncate_prompt_tokens=159, max_tokens=1)
    assert found["usage"]["prompt_tokens"] == 159
    body = {"prompt": "Hello", "truncate_prompt_tokens": 160, "max_tokens": 1}
    assert_canonical_error(live.post("/v1/completions", body), 400, "at most 159 tokens")


def test_the_most_prompts_and_choices_that_a_request_may_have(live):
    """2,048 sequences: more than may wait in the engine."""
    prompts = [[3 + n % 5, 4] for n in range(128)]
    found = live.completion(prompt=prompts, n=16, max_tokens=1, temperature=0, ignore_eos=True)
    assert [choice["index"] for choice in found["choices"]] == list(range(2048))
    assert found["usage"]["completion_tokens"] == 2048
    for start in range(5):
        assert len({choice["text"] for choice in found["choices"] if choice["index"] // 16 % 5 == start}) == 1


def test_one_prompt_that_is_refused_refuses_the_request_before_any_runs(live):
    steps = live.service.known_stats().steps
    refused = live.post("/v1/completions", {"prompt": [[3, 4], [5] * 10_000], "max_tokens": 2})
    assert refused.status_code == 400
    assert live.service.known_stats().steps == steps
