"""Run in virtual environments of its own by ``test_lorax_clients_slow.py``: ``huggingface_hub.InferenceClient``.

Prints one JSON object of what it read; raises where the client breaks.
"""

import asyncio
import json
import re
import sys

import huggingface_hub
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, ValidationError

TALK = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "remember", "description": "Stores an age", "parameters": SCHEMA}}


def holds_age(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"age"} and 0 <= found["age"] <= 99


def completions(client: InferenceClient) -> str:
    plain = client.text_generation("Hello", max_new_tokens=6)
    whole = client.text_generation(
        "Hello", max_new_tokens=6, details=True, decoder_input_details=True, top_n_tokens=3, return_full_text=True
    )
    details = whole.details
    assert whole.generated_text == "Hello" + plain
    assert len(details.tokens) == details.generated_tokens == len(details.top_tokens)
    assert all(len(top) == 3 for top in details.top_tokens) and details.prefill
    events = list(client.text_generation("Hello", max_new_tokens=6, details=True, stream=True, top_n_tokens=2))
    assert [e.token.id for e in events] == [t.id for t in details.tokens]
    assert [e.index for e in events] == list(range(1, len(events) + 1))
    assert events[-1].generated_text == plain and events[-1].details.input_length > 0
    assert all(len(e.top_tokens) == 2 for e in events)
    assert "".join(client.text_generation("Hello", max_new_tokens=6, stream=True)) == plain
    two = client.text_generation("Hello", max_new_tokens=4, do_sample=True, best_of=2, details=True)
    assert len(two.details.best_of_sequences) == 1
    assert client.text_generation("Hello " * 100, truncate=3, max_new_tokens=1, details=True).details.prefill == []
    return plain


def constrained(client: InferenceClient) -> None:
    regex = {"type": "regex", "value": "[ab]{3}c"}
    assert re.fullmatch("[ab]{3}c", client.text_generation("Hello", max_new_tokens=60, grammar=regex))
    grammar = {"type": "json", "value": SCHEMA}
    assert holds_age(client.text_generation("Hello", max_new_tokens=100, grammar=grammar))
    assert holds_age("".join(client.text_generation("Hello", max_new_tokens=100, grammar=grammar, stream=True)))
    form = {"type": "json_schema", "json_schema": {"name": "age", "schema": SCHEMA, "strict": True}}
    answer = client.chat_completion(TALK, max_tokens=100, response_format=form)
    assert holds_age(answer.choices[0].message.content)


def tools(client: InferenceClient) -> None:
    asked = {"max_tokens": 400, "tools": [TOOL], "tool_choice": {"function": {"name": "remember"}}}
    call, *_ = client.chat_completion(TALK, **asked).choices[0].message.tool_calls
    assert call.function.name == "remember" and holds_age(call.function.arguments)
    parts = [
        part
        for chunk in client.chat_completion(TALK, stream=True, **asked)
        for part in (chunk.choices and chunk.choices[0].delta.tool_calls) or ()
    ]
    assert holds_age(arguments_of_first(parts))


def arguments_of_first(parts: list) -> str:
    """The arguments of the first call that was streamed in ``parts``. ``max_tokens`` may cut the last one."""
    return "".join(part.function.arguments or "" for part in parts if part.index == 0)


def chat(client: InferenceClient) -> None:
    answer = client.chat_completion(TALK, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2)
    text = answer.choices[0].message.content
    assert "".join(one.token for one in answer.choices[0].logprobs.content) == text
    chunks = list(client.chat_completion(TALK, max_tokens=5, temperature=0, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text


def errors(client: InferenceClient) -> list[str]:
    names = []
    for stream in (False, True):
        for kind, fields in (
            (ValidationError, {"max_new_tokens": 10**6}),
            (GenerationError, {"max_new_tokens": 2, "adapter_id": "nobody"}),
        ):
            try:
                found = client.text_generation("Hello", stream=stream, details=True, **fields)
                list(found) if stream else found
            except kind as error:
                names.append(type(error).__name__)
            else:
                raise AssertionError(f"no {kind.__name__} for {fields}")
    return names


def probes(url: str) -> str:
    client = InferenceClient(url, provider="hf-inference", timeout=60)
    assert client.health_check()
    return client.get_endpoint_info()["model_id"]


async def asynchronous(url: str) -> str:
    client = AsyncInferenceClient(url, timeout=60)
    parts = [part async for part in await client.text_generation("Hello", max_new_tokens=6, stream=True)]
    return "".join(parts)


def main() -> None:
    client = InferenceClient(sys.argv[1], timeout=60)
    report = {"version": huggingface_hub.__version__, "text": completions(client), "errors": errors(client)}
    chat(client)
    constrained(client)
    tools(client)
    report["model"] = probes(sys.argv[1])
    report["async"] = asyncio.run(asynchronous(sys.argv[1]))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
