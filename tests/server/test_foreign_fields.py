"""Fields of other routes and other servers: refused with this route's word for them, never dropped in silence."""

import inspect

import pytest
from huggingface_hub import InferenceClient
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import MODEL, assert_canonical_error, ok
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OpenAIChat
from openai.types.completion_create_params import CompletionCreateParamsBase as OpenAICompletion
from transformers import GenerationConfig

from examples import examples
from truffula.errors import InvalidRequest
from truffula.server.foreign_fields import ALIASES, HOLDERS, INERT, UNSUPPORTED, is_ignored
from truffula.server.lorax_bodies import NATIVE
from truffula.server.messages_bodies import MessagesBody
from truffula.server.openai_bodies import ChatBody, CompletionBody

MESSAGES = MessagesBody.route_fields
CHAT, COMPLETION = ChatBody.route_fields, CompletionBody.route_fields
BODIES = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}, 400),
    "completion": ("/v1/completions", {"prompt": "Hello", "max_tokens": 1}, 400),
    "native": ("/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 1}}, 422),
}
# Field and value → the word on each route, None where the route has that very field, a text where it has none.
MATRIX = [
    ("max_tokens", 4, (None, None, "parameters.max_new_tokens")),
    ("max_completion_tokens", 4, (None, "max_tokens", "parameters.max_new_tokens")),
    ("max_new_tokens", 4, ("max_tokens", "max_tokens", None)),
    ("n_predict", 4, ("max_tokens", "max_tokens", "parameters.max_new_tokens")),
    ("num_predict", 4, ("max_tokens", "max_tokens", "parameters.max_new_tokens")),
    ("max_length", 4, ("max_tokens", "max_tokens", "parameters.max_new_tokens")),
    ("max_output_tokens", 4, ("max_tokens", "max_tokens", "parameters.max_new_tokens")),
    ("maxTokens", 4, ("max_tokens", "max_tokens", "parameters.max_new_tokens")),
    ("min_new_tokens", 1, ("min_tokens", "min_tokens", "parameters.min_tokens")),
    ("stop", ["x"], (None, None, None)),
    ("stop_sequences", ["x"], ("stop", "stop", "parameters.stop")),
    ("stop_strings", "x", ("stop", "stop", "parameters.stop")),
    ("eos_token_id", 7, ("stop_token_ids", "stop_token_ids", "parameters.stop_token_ids")),
    ("top_n_tokens", 2, ("top_logprobs", "logprobs", None)),
    ("top_logprobs", 2, (None, "logprobs", "parameters.top_n_tokens")),
    ("return_k_alternatives", 2, ("top_logprobs", "logprobs", None)),
    ("n_probs", 2, ("top_logprobs", "logprobs", "parameters.top_n_tokens")),
    ("logprobs", True, (None, None, "parameters.details")),
    ("return_logprob", True, ("logprobs", "logprobs", "parameters.details")),
    ("details", True, ("logprobs", "logprobs", None)),
    ("decoder_input_details", True, ("prompt_logprobs", "prompt_logprobs", None)),
    ("prompt_logprobs", 1, (None, None, "parameters.decoder_input_details")),
    ("repetition_penalty", 1.2, (None, None, None)),
    ("repeat_penalty", 1.2, ("repetition_penalty", "repetition_penalty", "parameters.repetition_penalty")),
    ("frequencyPenalty", 1.2, ("frequency_penalty", "frequency_penalty", "parameters.frequency_penalty")),
    ("temp", 0.5, ("temperature", "temperature", "parameters.temperature")),
    ("top-k", 4, ("top_k", "top_k", "parameters.top_k")),
    ("random_seed", 4, ("seed", "seed", "parameters.seed")),
    ("do_sample", False, ("temperature: 0", "temperature: 0", None)),
    ("return_full_text", True, ("leave it out", "echo", None)),
    ("echo", True, ("leave it out", None, "parameters.return_full_text")),
    ("truncate", 4, ("truncate_prompt_tokens", "truncate_prompt_tokens", None)),
    ("truncate_prompt_tokens", 4, (None, None, "parameters.truncate")),
    ("num_ctx", 4096, ("--max-model-len", "--max-model-len", "--max-model-len")),
    ("watermark", True, ("leave it out", "leave it out", "leave it out")),
    ("typical", 0.5, ("typical_p", "typical_p", "parameters.typical_p")),
    ("n", 2, (None, None, "parameters.best_of")),
    ("num_return_sequences", 2, ("n", "n", "parameters.best_of")),
    ("prompt", "Hi", ("messages", None, "inputs")),
    ("inputs", "Hi", ("messages", "prompt", None)),
    ("input", "Hi", ("messages", "prompt", "inputs")),
    ("text", "Hi", ("messages", "prompt", "inputs")),
    ("messages", [{}], (None, "/v1/chat/completions", "/v1/chat/completions")),
    ("system", "Be brief.", ("role system", "role system", "role system")),
    ("apply_chat_template", True, ("/v1/chat/completions", "/v1/chat/completions", None)),
    ("continue_final_message", True, (None, "/v1/chat/completions", "/v1/chat/completions")),
    ("reasoning_effort", "low", (None, "/v1/chat/completions", "/v1/chat/completions")),
    ("enable_thinking", False, ("chat_template_kwargs",) * 3),
    ("think", True, ("chat_template_kwargs",) * 3),
    ("ignore_eos", True, (None, None, "parameters.ignore_eos_token")),
    ("ignore_eos_token", True, (None, None, None)),
    ("skip_special_tokens", False, (None, None, "leave it out")),
    ("stream_options", {"include_usage": True}, (None, None, "details")),
    ("mirostat", 2, ("leave it out",) * 3),
    ("num_beams", 4, ("leave it out",) * 3),
    ("dry_multiplier", 0.8, ("leave it out",) * 3),
    ("repeat_last_n", 64, ("leave it out",) * 3),
    ("response_format", {"type": "json_object"}, (None, None, None)),
    ("guided_regex", "a", (None, None, "parameters.response_format")),
    ("grammar", {"type": "regex", "value": "a"}, ("response_format", "response_format", None)),
    ("schema", {"type": "object"}, ("response_format", "response_format", "parameters.response_format")),
    ("format", "json", ("response_format", "response_format", "parameters.response_format")),
]


def message_of(error):
    return error["message"] if "message" in error else error["error"]


@pytest.mark.parametrize(("name", "value", "words"), MATRIX, ids=[name for name, _, _ in MATRIX])
@pytest.mark.parametrize("route", BODIES)
def test_every_dialect_refuses_the_others_names_with_its_own_word(live, route, name, value, words):
    word = words[list(BODIES).index(route)]
    path, body, status = BODIES[route]
    places = [{**body, name: value}]
    if route == "native":
        places.append({**body, "parameters": {**body["parameters"], name: value}})
    for i, sent in enumerate(places):
        if word is None:
            dialect = {"chat": CHAT, "completion": COMPLETION, "native": NATIVE}[route]
            assert any(name in names for names in dialect.levels.values())
            continue
        error = assert_canonical_error(live.post(path, sent), status, word)
        said = message_of(error).removeprefix("Input validation error: ")
        assert said.startswith(f"parameters.{name} " if i else f"{name} ")


@pytest.mark.parametrize(
    ("route", "extra", "words"),
    [
        ("native", {"max_new_tokens": 5}, "max_new_tokens has no effect on this route; use parameters.max_new_tokens"),
        ("native", {"temperature": 0.5}, "use parameters.temperature"),
        ("native", {"parameters": {"stream": True}}, "use stream at the top level of the body"),
        ("native", {"parameters": {"inputs": "x"}}, "use inputs at the top level of the body"),
        ("native", {"options": {"num_predict": 5}}, "options.num_predict has no effect"),
        ("native", {"sampling_params": {"max_new_tokens": 5}}, "use parameters.max_new_tokens"),
        ("completion", {"parameters": {"max_new_tokens": 5}}, "use max_tokens at the top level of the body"),
        ("completion", {"extra_body": {"top_k": 5}}, "extra_body.top_k has no effect on /v1/completions; use top_k at"),
        ("chat", {"options": {"num_ctx": 5, "seed": 1}}, "options.num_ctx"),
        ("chat", {"nvext": {"ignore_eos": True}}, "use ignore_eos at the top level"),
        ("chat", {"generationConfig": {"maxOutputTokens": 5}}, "generationConfig.maxOutputTokens"),
        ("chat", {"extra_body": {"guided_json": {"type": "object"}}}, "extra_body.guided_json"),
    ],
    ids=str,
)
def test_a_field_in_the_wrong_object_is_refused_with_the_right_one(live, route, extra, words):
    path, body, status = BODIES[route]
    assert_canonical_error(live.post(path, {**body, **extra}), status, words)


@pytest.mark.parametrize(
    ("route", "foreign"),
    [
        ("native", {"prompt": "Hi"}),
        ("native", {"text": "Hi"}),
        ("native", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("completion", {"inputs": "Hi"}),
        ("chat", {"prompt": "Hi"}),
    ],
    ids=str,
)
def test_a_whole_body_of_another_dialect_gets_the_word_and_not_a_missing_field(live, route, foreign):
    path, _, status = BODIES[route]
    error = assert_canonical_error(live.post(path, foreign), status, f"{next(iter(foreign))} has no effect")
    assert "equired" not in message_of(error)


@pytest.mark.parametrize("route", ["native", "chat"])
def test_a_missing_field_is_named(live, route):
    path, body, status = BODIES[route]
    field = next(iter(body.keys() & {"inputs", "messages"}))
    said = message_of(assert_canonical_error(live.post(path, {}), status, f"{field} is required"))
    assert "got" not in said


@pytest.mark.parametrize(
    ("path", "foreign", "words"),
    [
        ("/v1/responses", {"max_tokens": 5}, "max_tokens has no effect on /v1/responses; use max_output_tokens."),
        ("/v1/responses", {"conversation": "conv_1"}, "use previous_response_id"),
        ("/v1/chat/completions", {"previous_response_id": "resp_1"}, "it is a field of /v1/responses"),
        ("/v1/messages", {"response_format": {"type": "json_object"}}, "use output_format"),
        ("/v1/chat/completions", {"output_format": {"type": "json_object"}}, "use response_format"),
    ],
)
def test_a_field_of_another_api_is_refused_under_the_name_that_was_sent(live, path, foreign, words):
    error = live.post(path, {"input": "Hi", **foreign} if path == "/v1/responses" else foreign).json()["error"]
    assert error["message"].startswith(next(iter(foreign))) and words in error["message"]


@pytest.mark.parametrize("route", BODIES)
def test_values_that_ask_for_nothing_pass_and_are_not_listed(live, route):
    path, body, _ = BODIES[route]
    own = ChatBody.model_fields | CompletionBody.model_fields | dict.fromkeys(NATIVE.levels["parameters."])
    tables = {name: row.no_effect for row in ALIASES for name in row.names} | dict(UNSUPPORTED) | dict(INERT)
    for values in (dict.fromkeys(tables), {name: values[0] for name, values in tables.items() if values}):
        sent = {name: value for name, value in values.items() if name not in own and name not in ("inputs", "messages")}
        response = live.post(path, {**body, **sent})
        ok(response)
        assert "x-truffula-ignored" not in response.headers


@pytest.mark.parametrize(
    "names",
    [
        set(OpenAIChat.__annotations__),
        set(OpenAICompletion.__annotations__),
        set(inspect.signature(InferenceClient.text_generation).parameters),
    ],
    ids=["openai chat", "openai completions", "huggingface_hub"],
)
def test_the_fields_of_real_clients_are_known_on_every_dialect(names):
    """None of them is unknown anywhere: honoured or refused, or inert and listed; adapters have tests of their own."""
    for name in names - {"self", "model", "adapter_id"}:
        for dialect in (CHAT, COMPLETION, NATIVE):
            assert dialect.path_of(name) or not is_ignored(name, "something") or name in INERT, name


# What selects a cache, a compiler or a helper model, or shapes a return value of Python: no effect on the text.
NO_EFFECT = {
    *("_from_model_config", "bos_token_id", "cache_config", "cache_implementation", "compile_config"),
    *("continuous_batching_config", "disable_compile", "is_assistant", "low_memory", "max_cache_len", "pad_token_id"),
    *("prefill_chunk_size", "remove_invalid_values", "return_dict_in_generate", "speculation_type"),
    *("target_lookbehind", "transformers_version", "use_cache", "use_mtp", "max_matching_ngram_size"),
    *("prompt_lookup_num_tokens", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind"),
}


def test_what_changes_an_answer_of_transformers_is_never_ignored():
    for name in set(GenerationConfig().to_dict()) - NO_EFFECT:
        for dialect in (CHAT, COMPLETION, NATIVE):
            assert dialect.path_of(name) or not is_ignored(name, object()), name


def test_keys_that_no_server_knows_stay_accepted_logged_and_listed(live, caplog):
    for path, body, _ in BODIES.values():
        response = live.post(path, {**body, "unheard_of": 1, "x": {"top_k": 2}})
        ok(response)
        assert response.headers["x-truffula-ignored"] == "unheard_of, x"
    listed = live.post(BODIES["chat"][0], {**BODIES["chat"][1], "model": MODEL, "mirostat_tau": 5, "keep_alive": "5m"})
    assert listed.headers["x-truffula-ignored"] == "mirostat_tau, keep_alive"


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("/tokenize", {"tools": [{"type": "function"}]}),
        ("/tokenize", {"chat_template": "{{ 1 }}"}),
        ("/tokenize", {"truncate_prompt_tokens": 2}),
        ("/chat_tokenize", {"tools": [{"type": "function"}]}),
        ("/chat_tokenize", {"chat_template": "{{ 1 }}"}),
        ("/chat_tokenize", {"truncate": 2}),
        ("/chat_tokenize", {"system": "Be brief."}),
        ("/detokenize", {"add_special_tokens": False}),
    ],
    ids=str,
)
def test_what_would_change_tokens_is_refused_where_tokens_are_asked_for(live, path, extra):
    body = {"tokens": [1]} if path == "/detokenize" else {"messages": [{"role": "user", "content": "Hello"}]}
    assert_canonical_error(live.post(path, {**body, **extra}), 422, next(iter(extra)))


def test_how_to_generate_changes_no_token_and_is_listed(live):
    for path in ("/tokenize", "/chat_tokenize"):
        body = BODIES["chat"][1] | {"temperature": 0, "mirostat": 2, "tools": [], "adapter_id": "pirate"}
        response = live.post(path, body)
        ok(response)
        assert response.headers["x-truffula-ignored"] == "max_tokens, temperature, mirostat, adapter_id"


def camel(name):
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


@settings(max_examples=examples(400, 4000))
@given(
    dialect=st.sampled_from([CHAT, COMPLETION, MESSAGES, NATIVE]),
    name=st.sampled_from(sorted({*UNSUPPORTED, *(name for row in ALIASES for name in row.names)})),
    spelled=st.sampled_from([str, camel, str.upper, lambda name: name.replace("_", "-")]),
    path=st.lists(st.sampled_from(sorted(HOLDERS - {"parameters"})), max_size=3),
    inside_parameters=st.booleans(),
)
def test_a_field_of_another_server_never_passes_wherever_it_stands(dialect, name, spelled, path, inside_parameters):
    """Refused with its place, and with the field of this route where there is one."""
    level = "parameters." if inside_parameters and dialect is NATIVE else ""
    written = spelled(name)
    held = {written: "a value that asks for something"}
    for holder in reversed(path):
        held = {holder: held}
    body = {"parameters": held} if level else held
    own = not path and written in dialect.levels[level]
    place = level + ".".join([*path, written])
    if own:
        dialect.check(body, ())
        return
    with pytest.raises(InvalidRequest) as caught:
        dialect.check(body, ())
    assert caught.value.param == place
    assert caught.value.message.startswith(f"{place} ")
    meant = dialect.path_of(name)
    words = f"name the adapter in {dialect.adapter}" if written == "model" and path else f"use {meant}"
    assert name in UNSUPPORTED or meant is None or words in caught.value.message
