"""Run in a virtual environment of its own by ``test_lorax_clients_slow.py``: the shipped clients against a live server.

Prints one JSON object of what they read; raises where a client breaks.
"""

import asyncio
import json
import sys

import lorax
import lorax.errors
import text_generation
import text_generation.errors


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
    report = {
        "sync": lorax_sync(url),
        "async": asyncio.run(lorax_async(url)),
        "tgi": tgi(url),
        "errors": errors_of(lorax.Client(url, timeout=60), lorax.errors),
        "tgi_errors": errors_of(text_generation.Client(url, timeout=60), text_generation.errors),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
