"""LoRAX's and TGI's routes: fields, details, headers, streams."""

import math

import pytest
from live_server import MODEL, assert_canonical_error, events, ok, serving, tokenizer

# Every key that lorax-client 0.6.3 sends, null unless the caller set it.
ALL_NULL = {
    "adapter_id": None,
    "adapter_source": None,
    "merged_adapters": None,
    "api_token": None,
    "best_of": None,
    "temperature": None,
    "repetition_penalty": None,
    "frequency_penalty": None,
    "presence_penalty": None,
    "top_k": None,
    "top_p": None,
    "typical_p": None,
    "max_new_tokens": None,
    "return_full_text": None,
    "seed": None,
    "response_format": None,
    "return_k_alternatives": None,
    "truncate": None,
    "do_sample": False,
    "ignore_eos_token": False,
    "stop": [],
    "watermark": False,
    "details": False,
    "decoder_input_details": False,
}
TIMES = ("compute-time", "total-time", "validation-time", "queue-time", "inference-time", "time-per-token")
MORE_TIMES = ("time-to-first-token", "time-per-output-token")


def test_generate_is_an_object_and_the_root_a_list(live):
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 5}}
    bare = ok(live.post("/generate", body))
    assert set(bare) == {"generated_text"}
    assert ok(live.post("/", body)) == [bare]
    assert ok(live.post("/generate", {**body, "stream": True})) == bare
    assert ok(live.post("/invocations", body)) == [bare]


@pytest.mark.parametrize("parameters", [None, {}, ALL_NULL], ids=["null", "empty", "all keys"])
def test_what_clients_send_when_nothing_is_asked(live, parameters):
    short = ok(live.post("/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 4}}))["generated_text"]
    body = {"inputs": "Hello", "parameters": parameters, "stream": False}
    response = live.post("/", body)
    assert ok(response)[0]["generated_text"].startswith(short)
    assert "x-truffula-ignored" not in response.headers


def test_invocations_speaks_all_three(live):
    talk = [{"role": "user", "content": "Hi"}]
    assert ok(live.post("/invocations", {"messages": talk, "max_tokens": 2}))["object"] == "chat.completion"
    assert ok(live.post("/invocations", {"prompt": "Hi", "max_tokens": 2}))["object"] == "text_completion"
    assert_canonical_error(live.post("/invocations", {}), 422)


def test_details(live):
    found = live.native(details=True, ignore_eos_token=True)
    details = found["details"]
    assert details["finish_reason"] == "length"
    assert details["prompt_tokens"] == details["input_length"] == len(tokenizer().encode("Hello").ids)
    assert details["generated_tokens"] == len(details["tokens"]) == 8
    assert details["skipped_tokens"] == 0
    assert details["seed"] is None
    assert details["prefill"] == []
    assert "best_of_sequences" not in details
    assert "top_tokens" not in details
    assert "".join(t["text"] for t in details["tokens"] if not t["special"]) == found["generated_text"]
    for token in details["tokens"]:
        assert math.isfinite(token["logprob"])
        assert token["skipped"] is False
        assert "alternative_tokens" not in token


def test_prefill(live):
    found = live.native("The Lorax", decoder_input_details=True)
    prefill = found["details"]["prefill"]
    assert [entry["id"] for entry in prefill] == tokenizer().encode("The Lorax").ids
    assert len(prefill) == found["details"]["prompt_tokens"]
    assert prefill[0]["logprob"] is None
    assert all(entry["logprob"] <= 0 for entry in prefill[1:])


def test_alternatives_in_both_spellings(live):
    details = live.native(details=True, return_k_alternatives=3, top_n_tokens=2)["details"]
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        found = token["alternative_tokens"]
        assert len(found) == 3
        assert [a["logprob"] for a in found] == sorted((a["logprob"] for a in found), reverse=True)
        assert found[0]["id"] == token["id"], "greedy takes the best"
        assert [t["id"] for t in top] == [a["id"] for a in found[:2]]


def test_greedy_is_the_default_and_what_switches_sampling_on(live):
    greedy = live.native(max_new_tokens=12)["generated_text"]
    for same in (
        {"temperature": 1.0},
        {"temperature": 0, "do_sample": True},
        {"top_p": 1.0},
        {"do_sample": False},
        {"seed": 5},
    ):
        assert live.native(max_new_tokens=12, **same)["generated_text"] == greedy, same
    for sampled in ({"do_sample": True}, {"temperature": 1.5}, {"top_k": 50}, {"top_p": 0.99}, {"typical_p": 0.99}):
        details = live.native(max_new_tokens=12, details=True, **sampled)["details"]
        assert isinstance(details["seed"], int), sampled
        again = live.native(max_new_tokens=12, details=True, seed=details["seed"], **sampled)["details"]
        assert [t["id"] for t in again["tokens"]] == [t["id"] for t in details["tokens"]]


def test_large_seeds(live):
    details = live.native(details=True, do_sample=True, seed=2**64 - 1)["details"]
    assert details["seed"] == 2**64 - 1


def test_stop_text_stays_in_the_output(live):
    text = live.native(max_new_tokens=16, ignore_eos_token=True)["generated_text"]
    stop = text[4:6]
    found = live.native(max_new_tokens=16, ignore_eos_token=True, stop=[stop], details=True)
    assert found["generated_text"] == text[: text.index(stop)] + stop
    assert found["details"]["finish_reason"] == "stop_sequence"
    assert found["details"]["generated_tokens"] == len(found["details"]["tokens"])
    assert "".join(t["text"] for t in found["details"]["tokens"]) == found["generated_text"]


def test_eos_is_the_reason_also_on_the_last_allowed_token(live, eos_after):
    prompt, count = eos_after
    details = ok(
        live.post("/generate", {"inputs": prompt, "parameters": {"max_new_tokens": count, "details": True, "seed": 1}})
    )["details"]
    assert details["finish_reason"] in ("eos_token", "length")
    if details["tokens"][-1]["id"] == 1:
        assert details["finish_reason"] == "eos_token"
        assert details["tokens"][-1]["special"] is True


@pytest.fixture
def eos_after(live):
    """A prompt whose greedy answer ends by itself, and after how many tokens; else any."""
    for word in ("Hello", "The Lorax", "trees", "привет", "東京", "spoke for them"):
        details = live.native(word, max_new_tokens=64, details=True)["details"]
        if details["finish_reason"] == "eos_token":
            return word, details["generated_tokens"]
    return "Hello", 4


def test_full_text_and_truncation(live):
    plain = live.native("The Lorax")["generated_text"]
    assert live.native("The Lorax", return_full_text=True)["generated_text"] == "The Lorax" + plain
    short = live.native("The Truffula trees were bright", truncate=3, details=True)
    assert short["details"]["prompt_tokens"] == 3


def test_the_chat_template_by_parameter(live):
    assert (
        live.native("Hello", apply_chat_template=True)["generated_text"]
        == (live.chat("Hello", max_tokens=8)["choices"][0]["message"]["content"])
    )


def test_best_of(live):
    found = live.native(best_of=2, do_sample=True, details=True)
    (other,) = found["details"]["best_of_sequences"]
    mean = lambda d: sum(t["logprob"] for t in d["tokens"]) / len(d["tokens"])
    assert mean(found["details"]) >= mean(other)
    assert {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"} <= set(other)


def test_headers(live):
    body = {"inputs": "Hällo", "parameters": {"max_new_tokens": 3, "adapter_id": "org/poet", "details": True}}
    response = live.post("/generate", body)
    details = ok(response)["details"]
    headers = response.headers
    for name in (*TIMES, *MORE_TIMES, "skipped-tokens"):
        assert headers[f"x-{name}"].isdigit(), name
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-compute-characters"] == "5"
    assert headers["x-prompt-tokens"] == str(details["prompt_tokens"])
    assert headers["x-generated-tokens"] == str(details["generated_tokens"])
    assert headers["x-total-tokens"] == str(details["prompt_tokens"] + details["generated_tokens"])
    assert headers["x-model-id"] == MODEL
    assert headers["x-adapter-id"] == "org/poet"
    assert headers["x-adapter-source"] == "local"
    assert "x-adapter-id" not in live.post("/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 1}}).headers


@pytest.mark.parametrize("path", ["/", "/generate_stream"])
def test_a_stream_is_an_event_a_token(live, path):
    parameters = {"max_new_tokens": 9, "details": True, "adapter_id": "pirate", "top_n_tokens": 2}
    whole = ok(live.post("/generate", {"inputs": "Hello 東京", "parameters": parameters}))
    response = live.post(path, {"inputs": "Hello 東京", "parameters": parameters, "stream": True})
    found = events(response)
    details = whole["details"]
    assert len(found) == details["generated_tokens"]
    assert [e["token"]["id"] for e in found] == [t["id"] for t in details["tokens"]]
    assert [e["index"] for e in found] == list(range(1, len(found) + 1))
    assert all(math.isfinite(e["token"]["logprob"]) and len(e["top_tokens"]) == 2 for e in found)
    assert all(e["generated_text"] is None and e["details"] is None for e in found[:-1])
    last = found[-1]
    assert last["generated_text"] == whole["generated_text"]
    assert last["generated_text"] == "".join(e["token"]["text"] for e in found if not e["token"]["special"])
    for name in ("finish_reason", "prompt_tokens", "input_length", "generated_tokens", "seed"):
        assert last["details"][name] == details[name]
    for name in ("x-model-id", "x-adapter-id", "x-adapter-source", "x-compute-type", "x-compute-characters"):
        assert name in response.headers


def test_a_stream_without_details(live):
    found = events(live.post("/generate_stream", {"inputs": "Hello", "parameters": {"max_new_tokens": 3}}))
    assert found[-1]["details"] is None
    assert isinstance(found[-1]["generated_text"], str)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.2}, "top_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 4.0}, "max_new_tokens"),
        ({"max_new_tokens": 10**7}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": "text"}, "stop"),
        ({"stop": ["x"] * 11}, "stop"),
        ({"truncate": 0}, "truncate"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 99, "do_sample": True}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"return_k_alternatives": 0}, "return_k_alternatives"),
        ({"return_k_alternatives": 10**4}, "return_k_alternatives"),
        ({"watermark": True}, "watermark"),
        ({"grammar": {"type": "regex", "value": "("}}, "grammar"),
        ({"response_format": {"type": "json_object", "schema": {"not": {}}}}, "response_format"),
        ({"merged_adapters": {"ids": [], "weights": []}}, "merged_adapters.ids"),
        ({"adapter_id": "pirate", "adapter_source": "pbase"}, "adapter_source"),
        ({"adapter_id": 5}, "adapter_id"),
        ([], "parameters"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(live, parameters, words):
    error = assert_canonical_error(live.post("/generate", {"inputs": "Hello", "parameters": parameters}), 422, words)
    assert error["error_type"] == "validation"
    assert error["error"].startswith("Input validation error: ")


@pytest.mark.parametrize("parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}], ids=str)
def test_what_cannot_be_streamed(live, parameters):
    response = live.post("/", {"inputs": "Hello", "parameters": parameters, "stream": True})
    assert_canonical_error(response, 422, next(iter(parameters)))


@pytest.mark.parametrize(
    "body", [{}, {"inputs": ""}, {"inputs": None}, {"inputs": ["a"]}, {"inputs": "a", "stream": 1}], ids=str
)
def test_bad_bodies(live, body):
    assert_canonical_error(live.post("/generate", body), 422)


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
@pytest.mark.parametrize("name", ["nobody", "org/nobody", "../../etc", "tgi"])
def test_an_unknown_adapter_is_never_the_base(live, path, name):
    body = {"inputs": "Hello", "parameters": {"adapter_id": name}, "stream": path == "/"}
    error = assert_canonical_error(live.post(path, body), 424, name)
    assert error["error_type"] == "generation"


@pytest.mark.parametrize("name", [None, "", MODEL])
def test_names_of_the_base(live, name):
    assert live.native(adapter_id=name) == live.native()


def test_too_long(live):
    error = assert_canonical_error(live.post("/generate", {"inputs": "Hello " * 300, "parameters": {}}), 422)
    assert error["error_type"] == "validation"


def test_unknown_keys_are_listed_at_both_levels(live):
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 1, "temprature": 1}, "modle": "x"}
    response = live.post("/generate", body)
    ok(response)
    assert response.headers["x-truffula-ignored"] == "modle, parameters.temprature"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"truncate": 160}, "truncate is 160; this server allows at most 159"),
        ({"truncate": 10**9}, "truncate"),
        ({"typical_p": 1}, "typical_p"),
        ({"typical_p": 1.0}, "typical_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"best_of": 3, "do_sample": True}, "best_of is 3; this server allows at most 2"),
    ],
    ids=str,
)
def test_bounds_of_the_contract(live, parameters, words):
    """LoRAX's and TGI's: truncate up to max_input_length of /info, typical_p below 1, best_of up to max_best_of."""
    assert ok(live.client.get("/info"))["max_input_length"] == 159
    assert_canonical_error(live.post("/generate", {"inputs": "Hello", "parameters": parameters}), 422, words)


def test_truncate_at_its_bound(live):
    found = live.native("Hello " * 300, truncate=159, max_new_tokens=1, details=True)
    assert found["details"]["prompt_tokens"] == 159


@pytest.mark.parametrize("path", ["/tokenize", "/chat_tokenize"])
def test_a_wrong_message_is_named_with_its_place(live, path):
    body = {"messages": [{"role": "user", "content": "Hello"}, {"role": "wizard", "content": "Hello"}]}
    assert_canonical_error(live.post(path, body), 422, "messages[1].role")


@pytest.mark.parametrize("token", [12345, ["hf_secret"], {"a": "hf_secret"}], ids=str)
def test_a_wrong_token_is_not_repeated(live, token, caplog):
    for path, body in (("/generate", {"inputs": "a", "parameters": {"api_token": token}}),
                       ("/v1/completions", {"prompt": "a", "api_token": token})):  # fmt: skip
        response = live.post(path, body)
        assert response.status_code in (400, 422) and "api_token" in response.text
        assert "12345" not in response.text and "hf_secret" not in response.text
    assert "12345" not in caplog.text and "hf_secret" not in caplog.text


def test_a_token_has_no_effect_and_is_not_repeated(live, caplog):
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 2, "api_token": "hf_secret", "adapter_id": "nobody"}}
    refused = live.post("/generate", body)
    assert_canonical_error(refused, 424, "nobody")
    body["parameters"]["adapter_id"] = "pirate"
    answered = live.post("/generate", body)
    assert ok(answered)["generated_text"] == live.native(max_new_tokens=2, adapter_id="pirate")["generated_text"]
    assert answered.headers["x-truffula-ignored"] == "parameters.api_token"
    assert "hf_secret" not in refused.text + str(refused.headers) + answered.text + str(answered.headers) + caplog.text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
@pytest.mark.parametrize("name", ["a\r\nset-cookie: x", "\0", "naïve\x85", "東京", "x" * 5000], ids=ascii)
def test_names_that_no_header_can_hold(live, path, name):
    """They are not served, so they are in the error's body only, escaped and shortened."""
    body = {"inputs": "Hello", "parameters": {"adapter_id": name}}
    response = live.post(path, {"prompt": "Hello", "model": name} if path == "/v1/completions" else body)
    assert_canonical_error(response, 404 if path == "/v1/completions" else 424)
    assert "set-cookie" not in response.headers and "\n" not in response.json()["error"]


def test_an_adapter_whose_name_is_not_latin(model_folder, adapter_folders):
    with serving(model_folder, adapters={"海盗 ☠": str(adapter_folders["pirate"])}, backend="auto") as live:
        body = {"inputs": "Hello", "parameters": {"adapter_id": "海盗 ☠", "max_new_tokens": 2}}
        for path in ("/generate", "/generate_stream"):
            assert live.post(path, body).headers["x-adapter-id"] == "?? ?"
        assert ok(live.client.get("/v1/models"))["data"][1]["id"] == "海盗 ☠"


@pytest.mark.parametrize("prompt", ["\0", "a\0b", "\0" * 50, "\ufffd\0\u2028"], ids=ascii)
def test_a_nul_is_a_character_like_others(live, prompt):
    found = live.native(prompt, decoder_input_details=True, max_new_tokens=2, return_full_text=True)
    assert found["generated_text"].startswith(prompt)
    assert [one["id"] for one in found["details"]["prefill"]] == tokenizer().encode(prompt).ids
    (last,) = events(live.post("/generate_stream", {"inputs": prompt, "parameters": {"max_new_tokens": 2}}))[-1:]
    assert prompt + last["generated_text"] == found["generated_text"]
