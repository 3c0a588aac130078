"""Tools and schemas over ``/v1/responses`` with the openai client: a random model whose calls are constrained."""

import json

import openai
import pytest
from live_server import MODEL, serving
from pydantic import BaseModel

TEMPLATE = (
    "{% if tools %}<|role|>system\n# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>\n"
    'For each call, return <tool_call>\n{"name": <name>, "arguments": <args>}\n</tool_call><|end|>{% endif %}'
    "{% for m in messages %}<|role|>{% if m.role == 'tool' %}user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)
YES = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}
FUNCTION = {"type": "function", "name": "answer", "parameters": YES, "strict": True}
CUSTOM = {
    "type": "custom",
    "name": "note",
    "format": {"type": "grammar", "syntax": "regex", "definition": "(ab|ba){2}"},
}
SPACE = {"type": "namespace", "name": "agents", "description": "", "tools": [{**FUNCTION, "name": "spawn"}]}


class Verdict(BaseModel):
    yes: bool


@pytest.fixture(scope="module")
def client(tmp_path_factory, long_model_folder):
    template = tmp_path_factory.mktemp("template") / "hermes.jinja"
    template.write_text(TEMPLATE)
    with (
        serving(long_model_folder, backend="auto", chat_template=template) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="EMPTY", max_retries=0) as made,
    ):
        yield made


def call(client, tools, **more):
    body = {"model": MODEL, "input": "Is it?", "max_output_tokens": 200, "tool_choice": "required", "tools": tools}
    return client.responses.create(**{**body, **more})


def test_a_demanded_function_is_called_and_its_result_continues(client):
    found = call(client, [FUNCTION], parallel_tool_calls=False)
    assert found.status == "completed"
    (item,) = [one for one in found.output if one.type == "function_call"]
    assert isinstance(json.loads(item.arguments)["yes"], bool)
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "indeed"}
    short = {"tool_choice": "auto", "max_output_tokens": 4, "temperature": 0}
    by_id = call(client, [FUNCTION], input=[result], previous_response_id=found.id, **short)
    talk = [{"role": "user", "content": "Is it?"}, *found.output, result]
    by_items = call(client, [FUNCTION], input=talk, **short)
    assert by_id.output_text == by_items.output_text
    assert by_id.usage.input_tokens == by_items.usage.input_tokens > found.usage.input_tokens


def test_the_stream_of_a_call(client):
    with client.responses.stream(
        model=MODEL, input="Is it?", tools=[FUNCTION], tool_choice={"type": "function", "name": "answer"},
        parallel_tool_calls=False, max_output_tokens=200,
    ) as stream:  # fmt: skip
        events = list(stream)
    whole = events[-1].response
    (item,) = [one for one in whole.output if one.type == "function_call"]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == item.arguments and len(deltas) > 1
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == item.arguments


def test_a_custom_tool_s_regex_binds(client):
    found = call(client, [CUSTOM], parallel_tool_calls=False)
    (item,) = [one for one in found.output if one.type == "custom_tool_call"]
    assert item.input in ("abab", "abba", "baab", "baba")


def test_a_namespace_is_in_the_call(client):
    found = call(client, [SPACE], parallel_tool_calls=False)
    (item,) = [one for one in found.output if one.type == "function_call"]
    assert (item.namespace, item.name) == ("agents", "spawn")


def test_parse_with_pydantic(client):
    found = client.responses.parse(model=MODEL, input="Is it?", text_format=Verdict, max_output_tokens=200)
    assert isinstance(found.output_parsed, Verdict)


def test_a_stream_with_pydantic(client):
    with client.responses.stream(model=MODEL, input="Is it?", text_format=Verdict, max_output_tokens=200) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed, Verdict)


def test_json_object(client):
    found = call(client, [], tool_choice="auto", text={"format": {"type": "json_object"}}, max_output_tokens=2000)
    if found.status == "completed":
        assert isinstance(json.loads(found.output_text), dict)


@pytest.mark.parametrize("schema", [{"type": "object", "$ref": "#/nowhere"}, {"type": "nonsense"}], ids=str)
def test_a_schema_that_cannot_bind_is_refused_by_its_field(client, schema):
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    with pytest.raises(openai.BadRequestError) as caught:
        call(client, [], tool_choice="auto", text={"format": form})
    assert caught.value.param.startswith("text.format")


def test_reasoning_is_an_item_before_the_message(tmp_path, long_model_folder):
    template = tmp_path / "think.jinja"
    template.write_text(
        "{% for m in messages %}<|role|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
        "</think>\n\n{% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|role|>assistant\n<think>\n{% endif %}"
    )
    with (
        serving(long_model_folder, backend="auto", chat_template=template) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="EMPTY", max_retries=0) as client,
    ):
        form = {"text": {"format": {"type": "json_schema", "name": "n", "schema": YES, "strict": True}}}
        events = list(
            client.responses.create(
                model=MODEL, input="Is it?", max_output_tokens=300, stream=True,
                extra_body={"thinking_token_budget": 12, **form},
            )
        )  # fmt: skip
        whole = events[-1].response
        assert [item.type for item in whole.output] == ["reasoning", "message"], whole.output
        thought, message = whole.output
        deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(deltas) == thought.content[0].text and thought.summary == []
        assert isinstance(json.loads(message.content[0].text)["yes"], bool)
        assert 0 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
        talk = [{"role": "user", "content": "Is it?"}, *whole.output, {"role": "user", "content": "Sure?"}]
        again = client.responses.create(model=MODEL, input=talk, max_output_tokens=2)
        assert again.usage.input_tokens > whole.usage.input_tokens
