"""Every field by which a client may name an adapter: honoured, or refused by name; the base never answers for it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import MODEL, assert_canonical_error, ok

from examples import examples
from truffula.server.foreign_fields import ADAPTER_FIELDS, HOLDERS, is_adapter_field

TALK = [{"role": "user", "content": "Hello"}]
# Route → (a body without an adapter, the status of a refusal, the field that names an adapter).
NATIVE = {"inputs": "Hello", "parameters": {"max_new_tokens": 8}}
ROUTES = {
    "/v1/completions": ({"prompt": "Hello", "max_tokens": 8, "temperature": 0}, 400, "model"),
    "/v1/chat/completions": ({"messages": TALK, "max_tokens": 8, "temperature": 0}, 400, "model"),
    **dict.fromkeys(("/", "/generate", "/generate_stream", "/invocations"), (NATIVE, 422, "parameters.adapter_id")),
}
NAMES = sorted(ADAPTER_FIELDS["name"])
VALUES = [
    *("pirate", "org/poet", "nobody", "", MODEL, "/etc/passwd", "line\nbreak", None),
    *([], {}, ["pirate"], ["pirate", "org/poet"], [{"id": 0, "scale": 1.0}], {"name": "pirate"}),
    *(0, 7, 1.5, True),
]
OTHERS = sorted([*ADAPTER_FIELDS["other"], *ADAPTER_FIELDS["scale"], *ADAPTER_FIELDS["merged"]])


def answer(response):
    """The text, of whatever dialect; an error is no text."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        return response.text
    body = response.json()
    body = body[0] if isinstance(body, list) else body
    if "generated_text" in body:
        return body["generated_text"]
    (choice,) = body["choices"]
    return choice.get("text") or choice["message"]["content"]


def with_field(path, place, field, value):
    """The route's body with ``field``: at the top, among the parameters, or inside an object without a meaning here."""
    body, status, word = ROUTES[path]
    if place == "parameters" and "inputs" in body:
        return {**body, "parameters": {**body["parameters"], field: value}}, status, word
    return {**body, **({field: value} if place == "top" else {place: {field: value}})}, status, word


@pytest.fixture(scope="module")
def texts(live):
    """Route → the base's answer and the adapter's."""
    found = {}
    for path, (body, _, word) in ROUTES.items():
        place = "top" if word == "model" else "parameters"
        adapted = with_field(path, place, word.split(".")[-1], "pirate")[0]
        found[path] = (answer(live.post(path, body)), answer(live.post(path, adapted)))
        assert found[path][0] != found[path][1]
    return found


def test_what_is_known_of_other_servers():
    """The spellings that were tried on this server, and any other name with such a word in it."""
    asked = {"adapter_id", "adapter_name", "adapter", "adapters", "adapter_path", "lora", "loras", "lora_adapters"}
    asked |= {"lora_modules", "lora_id", "lora_name", "lora_path", "peft", "peft_model", "lora_request", "lora_int_id"}
    assert asked <= {*NAMES, *OTHERS}
    for name in ("loraName", "adapter-id", "Adapter", "my_lora", "useLoRA", "QLoRA", "pirate_adapter", "LORA_PATH"):
        assert is_adapter_field(name)
    for name in ("flora", "explorations", "adaptive", "model", "adapter_source", "temperature", "loran"):
        assert not is_adapter_field(name)


@settings(max_examples=examples(120, 1200))
@given(
    path=st.sampled_from(sorted(ROUTES)),
    place=st.sampled_from(["top", "parameters", *sorted(HOLDERS - {"parameters"}), "unheard_of"]),
    field=st.sampled_from([*NAMES, *OTHERS, "model", "my_lora", "loraName", "Adapter-Id"]),
    value=st.sampled_from(VALUES),
)
def test_the_base_answers_only_where_no_adapter_is_named(live, texts, path, place, field, value):
    """Spelling × dialect × nesting × value: the adapter's answer, an error that names the field or the value, or, where
    the value names nothing or the base, the base's own answer."""
    body, status, _ = with_field(path, place, field, value)
    response = live.post(path, body)
    base, pirate = texts[path]
    if response.status_code != 200:
        error = response.json()
        message = error["error"]["message"] if isinstance(error["error"], dict) else error["error"]
        assert response.status_code in (status, 404, 424), response.text
        assert field in message or str(value)[:8] in message or "in model" in message, message
        assert value not in ("", None), "an empty value names nothing"
        return
    text = answer(response)
    if text == base:
        named_nothing = value in ("", None, MODEL, [], {}) or (field, place) == ("model", "unheard_of")
        weight = field in OTHERS and value == 1
        unread = field == "model" and not isinstance(value, str)
        assert named_nothing or weight or unread, (path, place, field, value)
    elif value in ("pirate", ["pirate"]):
        assert text == pirate
    else:
        assert value == "org/poet"


# Which values name nothing depends on no field's spelling: some in the fast suite, all in the slow one.
SOME = [pytest.param(field, marks=[pytest.mark.slow] * (place % 8 > 0)) for place, field in enumerate(NAMES)]


@pytest.mark.parametrize("field", SOME)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_a_value_that_names_nothing_is_the_base(live, texts, path, field):
    for place in ("top", "parameters") if path == "/generate" else ("top",):
        for nothing in ("", None, [], {}, False, MODEL):
            response = live.post(path, with_field(path, place, field, nothing)[0])
            assert answer(response) == texts[path][0]
            assert "x-truffula-ignored" not in response.headers


@pytest.mark.parametrize("field", NAMES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_a_name_is_honoured(live, texts, path, field):
    pirate = texts[path][1]
    for place in ("top", "parameters") if path == "/generate" else ("top",):
        for value in ("pirate", ["pirate"]):
            response = live.post(path, with_field(path, place, field, value)[0])
            assert answer(response) == pirate
            assert "x-truffula-ignored" not in response.headers
        error = assert_canonical_error(
            live.post(path, with_field(path, place, field, "nobody")[0]), 424 if path == "/generate" else 404, "nobody"
        )
        assert error.get("code", "model_not_found") == "model_not_found"


@pytest.mark.parametrize("field", [*OTHERS, "lora_foo", "use_lora"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_ids_weights_and_several_adapters_are_refused_with_the_word_to_use(live, path, field):
    for place in ("top", "parameters") if path == "/generate" else ("top",):
        for value in ([{"id": 0, "scale": 1.0}], {"lora_name": "pirate"}, 7, True, ["pirate", "org/poet"]):
            body, status, word = with_field(path, place, field, value)
            error = assert_canonical_error(
                live.post(path, body), status, "" if field == "merged_adapters" else f"in {word}"
            )
            message = error.get("message") or error["error"]
            assert field in message


@pytest.mark.parametrize(
    ("path", "extra", "param"),
    [
        ("/v1/completions", {"extra_body": {"adapter_id": "pirate"}}, "extra_body.adapter_id"),
        ("/v1/completions", {"nvext": {"lora": "pirate"}}, "nvext.lora"),
        ("/v1/completions", {"options": {"deep": {"adapter": "pirate"}}}, "options.deep.adapter"),
        ("/v1/completions", {"parameters": {"model": "pirate"}}, "parameters.model"),
        ("/v1/completions", {"unheard_of": {"lora_path": "pirate"}}, "unheard_of.lora_path"),
        ("/v1/completions", {"model": "org/poet", "adapter": "pirate"}, "adapter"),
        ("/v1/completions", {"lora": "pirate", "adapter": "org/poet"}, "adapter"),
    ],
    ids=str,
)
def test_where_it_has_no_effect_or_contradicts(live, path, extra, param):
    body = ROUTES[path][0]
    assert assert_canonical_error(live.post(path, {**body, **extra}), 400)["param"] == param


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"adapter": "pirate", "parameters": {"adapter_id": "org/poet"}}, "parameters.adapter_id"),
        ({"model": "pirate", "parameters": {"model": "org/poet"}}, "model"),
        ({"model": "pirate", "parameters": {"adapter_id": "org/poet"}}, "parameters.adapter_id"),
        ({"extra_body": {"adapter_id": "pirate"}}, "extra_body.adapter_id"),
        ({"parameters": {"extra_body": {"adapter_id": "pirate"}}}, "parameters.extra_body.adapter_id"),
        ({"adapter_source": "hub"}, "parameters.adapter_source"),
    ],
    ids=str,
)
def test_native_contradictions(live, extra, words):
    assert_canonical_error(live.post("/generate", {"inputs": "Hello", **extra}), 422, words)


def test_what_is_the_clients_own_is_not_searched(live):
    """Metadata, and variables of a chat template, are data."""
    body = {"messages": TALK, "max_tokens": 1, "metadata": {"adapter": "pirate"}}
    ok(live.post("/v1/chat/completions", {**body, "chat_template_kwargs": {"adapter": "pirate"}}))
    response = live.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "unheard_of": {"model": "x", "text": "y"}})
    ok(response)
    assert response.headers["x-truffula-ignored"] == "unheard_of"


@pytest.mark.parametrize("name", [MODEL, "", "tgi", "dummy", None])
def test_the_bases_own_names_pass_as_model_on_the_native_side(live, name):
    for body in (
        {"model": name, "parameters": {"max_new_tokens": 1}},
        {"parameters": {"max_new_tokens": 1, "model": name}},
    ):
        response = live.post("/generate", {"inputs": "Hello", **body})
        ok(response)
        assert "x-truffula-ignored" not in response.headers
