"""Run in a virtual environment of its own by ``test_lorax_clients_slow.py``: the shipped clients against a live server.

Prints one JSON object of what they read; raises where a client breaks.
"""

import asyncio
import json
import re
import sys

import lorax
import lorax.errors
import text_generation
import text_generation.errors
from hub_client_script import SCHEMA, TALK, TOOL, arguments_of_first, holds_age


def lorax_sync(url: str) -> dict:
    client = lorax.Client(url, timeout=60)
    found = {}
    for name in (None, "pirate", "org/poet"):
        whole = client.generate(
            "Hello 東京", adapter_id=name, max_new_tokens=8, decoder_input_details=True, return_k_alternatives=2
        )
        assert whole.details.generated_tokens == len(whole.details.tokens)
        assert len(whole.details.prefill) == whole.details.prompt_tokens
        streamed = list(client.generate_stream("Hello 東京", adapter_id=name, max_new_tokens=8))
        assert [s.token.id for s in streamed] == [t.id for t in whole.details.tokens]
        assert streamed[-1].generated_text == whole.generated_text
        assert streamed[-1].details.generated_tokens == whole.details.generated_tokens
        found[str(name)] = whole.generated_text
    sampled = client.generate("Hello", do_sample=True, best_of=2, max_new_tokens=4)
    assert len(sampled.details.best_of_sequences) == 1
    stopped = client.generate("Hello", max_new_tokens=16, stop_sequences=[found["None"][2:4]], ignore_eos_token=True)
    assert stopped.details.finish_reason.value in ("stop_sequence", "length")
    assert client.generate("Hello", seed=2**63 + 1, temperature=0.7, max_new_tokens=2).details.seed == 2**63 + 1
    return found


def lorax_constrained(url: str) -> None:
    form = {"type": "json_object", "schema": SCHEMA}
    client = lorax.Client(url, timeout=60)
    assert holds_age(client.generate("Hello", max_new_tokens=100, response_format=form).generated_text)
    *_, last = client.generate_stream("Hello", max_new_tokens=100, response_format=form, adapter_id="pirate")
    assert holds_age(last.generated_text)
    whole = asyncio.run(lorax.AsyncClient(url, timeout=60).generate("Hello", max_new_tokens=100, response_format=form))
    assert holds_age(whole.generated_text)


def merged_of(ids: list[str], strategy: str | None, density: float) -> lorax.types.MergedAdapters:
    weights = [1.0 / len(ids)] * len(ids)
    return lorax.types.MergedAdapters(ids=ids, weights=weights, merge_strategy=strategy, density=density)


def lorax_merged(url: str) -> None:
    client = lorax.Client(url, timeout=60)
    pirate = client.generate("Hello", adapter_id="pirate", max_new_tokens=8).generated_text
    for merged in (
        merged_of(["pirate", "pirate"], None, 0.0),
        merged_of(["pirate"], "linear", 0.5),
        merged_of(["pirate"], "ties", 1.0),
        merged_of(["pirate"], "dare_linear", 1.0),
    ):
        assert client.generate("Hello", merged_adapters=merged, max_new_tokens=8).generated_text == pirate
    for strategy in ("linear", "ties", "dare_linear", "dare_ties"):
        merged = merged_of(["pirate", "org/poet"] if strategy == "linear" else ["pirate"] * 3, strategy, 0.5)
        whole = client.generate("Hello", merged_adapters=merged, max_new_tokens=8).generated_text
        *_, last = client.generate_stream("Hello", merged_adapters=merged, max_new_tokens=8)
        assert last.generated_text == whole
        assert whole != client.generate("Hello", max_new_tokens=8).generated_text


def refused(url: str) -> dict:
    """What this server does not do: the classes that clients raise, by call."""
    client, found = lorax.Client(url, timeout=60), {}
    calls = {
        "embed": lambda: client.embed("Hello"),
        "classify": lambda: client.classify("Hello"),
        "classify_batch": lambda: client.classify_batch(["Hello"]),
        "async embed": lambda: asyncio.run(lorax.AsyncClient(url, timeout=60).embed("Hello")),
        "async classify": lambda: asyncio.run(lorax.AsyncClient(url, timeout=60).classify("Hello")),
        "merged": lambda: client.generate("Hello", merged_adapters=merged_of(["pirate", "org/poet"], "ties", 0.5)),
        "watermark": lambda: client.generate("Hello", watermark=True),
        "adapter_source": lambda: client.generate("Hello", adapter_id="pirate", adapter_source="pbase"),
        "unknown adapter": lambda: list(client.generate_stream("Hello", adapter_id="nobody")),
    }
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # noqa: BLE001
            found[name] = [type(error).__name__, str(error)]
        else:
            raise AssertionError(f"{name} was not refused")
    return found


def errors_of(client: object, kinds: object) -> list[str]:
    """The classes clients raise, streaming or not, by fault."""
    names = []
    for kind, call in (
        (kinds.ValidationError, {"prompt": "", "max_new_tokens": 2}),
        (kinds.ValidationError, {"prompt": "x " * 5000, "max_new_tokens": 2}),
        (kinds.ValidationError, {"prompt": "a", "max_new_tokens": 10**6}),
    ):
        for run in (lambda c: client.generate(**c), lambda c: list(client.generate_stream(**c))):
            try:
                run(call)
            except kind as error:
                assert str(error), "an error without words"
                names.append(type(error).__name__)
            else:
                raise AssertionError(f"no {kind.__name__} for {str(call)[:60]}")
    return names


async def lorax_async(url: str) -> dict:
    client = lorax.AsyncClient(url, timeout=60)

    async def one(name: str | None) -> str:
        whole = await client.generate("Hello 東京", adapter_id=name, max_new_tokens=8)
        streamed = [s async for s in client.generate_stream("Hello 東京", adapter_id=name, max_new_tokens=8)]
        assert streamed[-1].generated_text == whole.generated_text
        assert len(streamed) == whole.details.generated_tokens
        return whole.generated_text

    names = [None, "pirate", "org/poet"] * 4
    texts = await asyncio.gather(*(one(name) for name in names))
    found = {}
    for name, text in zip(names, texts, strict=True):
        assert found.setdefault(str(name), text) == text
    try:
        await client.generate("Hello", adapter_id="nobody", max_new_tokens=2)
    except lorax.errors.GenerationError as error:
        assert "nobody" in str(error)
    else:
        raise AssertionError("an unknown adapter was served")
    return found


def tgi_constrained(url: str) -> None:
    client = text_generation.Client(url, timeout=60)
    types = text_generation.types
    regex = types.Grammar(type=types.GrammarType.Regex, value="[ab]{3}c")
    assert re.fullmatch("[ab]{3}c", client.generate("Hello", max_new_tokens=60, grammar=regex).generated_text)
    for value in (SCHEMA, json.dumps(SCHEMA)):
        schema = types.Grammar(type=types.GrammarType.Json, value=value)
        *_, last = client.generate_stream("Hello", max_new_tokens=100, grammar=schema)
        assert holds_age(last.generated_text)


def tgi_tools(url: str) -> None:
    client = text_generation.Client(url, timeout=60)
    asked = {"messages": TALK, "tools": [TOOL], "tool_choice": "remember", "max_tokens": 400, "seed": 1}
    call, *_ = client.chat(**asked).choices[0].message.tool_calls
    assert call["function"]["name"] == "remember" and holds_age(call["function"]["arguments"])
    parts = []
    try:
        for chunk in client.chat(stream=True, **asked):
            parts += filter(None, [chunk.choices[0].delta.tool_calls])
    except json.JSONDecodeError:
        pass  # its own error: it parses [DONE]
    assert holds_age(arguments_of_first(parts))


def tgi(url: str) -> dict:
    client = text_generation.Client(url, timeout=60)
    whole = client.generate("Hello", max_new_tokens=6, top_n_tokens=2, decoder_input_details=True)
    streamed = list(client.generate_stream("Hello", max_new_tokens=6))
    assert streamed[-1].generated_text == whole.generated_text
    assert len(whole.details.top_tokens) == whole.details.generated_tokens
    talk = [{"role": "user", "content": "Hello"}]
    chat = client.chat(messages=talk, max_tokens=4, seed=1)
    assert chat.choices[0].message.role == "assistant"
    chunks = []
    try:
        for chunk in client.chat(messages=talk, max_tokens=4, seed=1, stream=True):
            chunks.append(chunk)
    except json.JSONDecodeError:
        pass  # its own fault: it parses [DONE], after the last chunk
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == chat.choices[0].message.content
    return {"text": whole.generated_text}


def main() -> None:
    url = sys.argv[1]
    lorax_constrained(url)
    lorax_merged(url)
    tgi_constrained(url)
    tgi_tools(url)
    report = {
        "sync": lorax_sync(url),
        "async": asyncio.run(lorax_async(url)),
        "tgi": tgi(url),
        "refused": refused(url),
        "errors": errors_of(lorax.Client(url, timeout=60), lorax.errors),
        "tgi_errors": errors_of(text_generation.Client(url, timeout=60), text_generation.errors),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
