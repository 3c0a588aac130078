"""The fields by which each API's clients constrain an answer: read into one constraint, and in effect."""

import json
import re

import pytest
from live_server import MODEL, assert_canonical_error

from truffula.errors import InvalidRequest
from truffula.items import Constraint
from truffula.server.constraint_fields import constraint_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
BAD = {"type": "object", "properties": {"a": {"not": {}}}}
TAG = {"type": "structural_tag", "structures": [], "triggers": []}


def named(schema, **others):
    """OpenAI's response_format."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **others}}


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({}, None, ""),
        ({"response_format": None, "guided_json": None}, None, ""),
        # OpenAI
        ({"response_format": {"type": "text"}}, None, ""),
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            "json_schema",
            TEXT,
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            "json_schema",
            TEXT,
        ),
        ({"response_format": TAG}, "structural_tag", json.dumps(TAG, separators=(",", ":"))),
        # LoRAX
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", TEXT),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, "json_schema", TEXT),
        # huggingface_hub
        ({"response_format": {"type": "json_object", "value": SCHEMA}}, "json_schema", TEXT),
        # TGI
        ({"response_format": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}}, "json_schema", TEXT),
        ({"grammar": {"type": "json", "value": SCHEMA}}, "json_schema", TEXT),
        ({"grammar": {"type": "json", "value": TEXT}}, "json_schema", TEXT),
        ({"grammar": {"type": "json_object", "value": SCHEMA}}, "json_schema", TEXT),
        ({"grammar": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}}, "json_schema", TEXT),
        ({"grammar": {"type": "regex", "value": "[a-z]+"}}, "regex", "[a-z]+"),
        # vLLM
        ({"structured_outputs": {}}, None, ""),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", TEXT),
        ({"structured_outputs": {"json": TEXT}}, "json_schema", TEXT),
        ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"structured_outputs": {"json_object": False}}, None, ""),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag", "{}"),
        ({"structured_outputs": {"regex": "a", "disable_fallback": True}}, "regex", "a"),
        ({"guided_json": SCHEMA}, "json_schema", TEXT),
        ({"guided_regex": "a|b"}, "regex", "a|b"),
        ({"guided_choice": ["é"]}, "choice", '["é"]'),
        ({"guided_choice": []}, None, ""),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
        # SGLang
        ({"regex": "a"}, "regex", "a"),
        ({"regex": ""}, None, ""),
        ({"ebnf": 'root ::= "a"'}, "lark", 'root ::= "a"'),
        ({"json_schema": TEXT}, "json_schema", TEXT),
        ({"structural_tag": TAG}, "structural_tag", json.dumps(TAG, separators=(",", ":"))),
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_each_apis_form_is_read(fields, kind, value):
    found = constraint_of(fields)
    if kind is None:
        assert found is None
    else:
        (field,) = [name for name, given in fields.items() if given is not None]
        assert found == Constraint(kind=kind, value=value, param=found.param)
        assert found.param.split(".")[0] == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}}, "response_format"),
        ({"grammar": {"type": "json", "value": "{"}}, "grammar"),
        ({"grammar": {"type": "text", "value": "{"}}, "grammar"),
        ({"grammar": {"type": "regex"}}, "grammar"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {"jsonn": {}}}, "structured_outputs.jsonn"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": [5]}, "guided_choice"),
        ({"guided_json": 5}, "guided_json"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "ebnf"),
    ],
    ids=lambda value: json.dumps(value)[:70],
)
def test_wrong_values_and_two_constraints_are_refused_by_name(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        constraint_of(fields)
    assert caught.value.param == param
    assert param.split(".")[0] in caught.value.message


OPENAI = {"model": MODEL, "max_tokens": 60, "temperature": 1.0, "seed": 3}
CASES = [
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, r'\{\s*"a"\s*:\s*(true|false)\s*\}'),
    ({"response_format": named(SCHEMA)}, r'\{\s*"a".*\}'),
    ({"structured_outputs": {"regex": "[0-9]{3}-[a-z]{2}"}}, "[0-9]{3}-[a-z]{2}"),
    ({"structured_outputs": {"choice": ["maple", "truffula"]}}, "maple|truffula"),
    ({"structured_outputs": {"grammar": 'start: "x" "yz"{2}'}}, "xyzyz"),
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"ebnf": 'root ::= [ab] "!" [ab]'}, "[ab]![ab]"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "pattern"), CASES, ids=lambda value: json.dumps(value)[:60])
def test_openai_answers_match(live, fields, pattern, stream):
    for path, body in (
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ):
        response = live.post(path, {**OPENAI, **body, **fields, "stream": stream})
        assert response.status_code == 200, response.text
        texts, reasons = [], []
        lines = (
            [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
            if stream
            else [response.text]
        )
        for line in lines:
            (choice,) = json.loads(line)["choices"]
            part = choice.get("message") or choice.get("delta") or choice
            texts.append(part.get("content") or part.get("text") or "")
            reasons.append(choice["finish_reason"])
        assert reasons[-1] == "stop"
        assert re.fullmatch(pattern, "".join(texts), re.DOTALL), texts


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, r'\{\s*"a"\s*:\s*(true|false)\s*\}'),
        ({"grammar": {"type": "regex", "value": "[0-9]{4}"}}, "[0-9]{4}"),
        ({"grammar": {"type": "json", "value": TEXT}}, r'\{\s*"a"\s*:\s*(true|false)\s*\}'),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_native_answers_match(live, fields, pattern):
    parameters = {"max_new_tokens": 60, "do_sample": True, "seed": 3, "details": True, **fields}
    response = live.post("/generate", {"inputs": "Hello", "parameters": parameters})
    assert response.status_code == 200, response.text
    assert re.fullmatch(pattern, response.json()["generated_text"], re.DOTALL)
    assert response.json()["details"]["finish_reason"] == "eos_token"


def test_the_error_has_the_routes_own_shape_and_names_field_and_keyword(live):
    body = {**OPENAI, "prompt": "a", "response_format": named(BAD)}
    for stream in (False, True):
        response = live.post("/v1/completions", {**body, "stream": stream})
        error = assert_canonical_error(response, 400, "not at #/properties/a/not")
        assert error["param"] == "response_format"
    native = {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": BAD}}}
    for path in ("/generate", "/generate_stream"):
        error = assert_canonical_error(live.post(path, native), 422, "grammar: ")
        assert error["error_type"] == "validation"


def test_a_constraint_in_a_body_that_a_text_worker_reads(live):
    choices = [f"choice number {i:06}" for i in range(5_000)]
    body = {**OPENAI, "prompt": "Hello", "structured_outputs": {"choice": choices}}
    response = live.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] in choices


def test_without_a_constraint_nothing_changes(live):
    body = {**OPENAI, "prompt": "Hello"}
    plain = live.post("/v1/completions", body).json()["choices"]
    for fields in ({"response_format": {"type": "text"}}, {"guided_json": None}, {"structured_outputs": {}}):
        assert live.post("/v1/completions", {**body, **fields}).json()["choices"] == plain


def test_an_unknown_type_of_tgis_grammar_is_answered_with_tgis_types():
    with pytest.raises(InvalidRequest, match="'xml'; it must be json, json_object, json_schema or regex"):
        constraint_of({"grammar": {"type": "xml", "value": "a"}})
