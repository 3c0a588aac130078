"""What a grammar costs: throughput with and without one, and the time to the first token.

    python benchmarks/constrained.py                      # smollm2, 32 sequences
    python benchmarks/constrained.py --model PATH --sequences 8 --rounds 5
    python benchmarks/constrained.py --smoke

The grammar is a JSON Schema of ten fields. Rounds with and without it alternate. A round without it generates as many
tokens for each prompt as the answer with the grammar had. The prompts differ from their first token. The time to the
first token is that of one request to an idle engine, for a grammar that was met before. Beside the ratio by the clock
there is one by the processor time of the engine's process, which other load on the machine changes less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
from llguidance import LLMatcher

from start import cpu_of
from truffula.config import EngineConfig
from truffula.engine.client import EngineClient, connect
from truffula.items import Grammar
from truffula.params import EngineParams
from truffula.service.files import load_texts
from truffula.text.tokenizer import Tokenizer
from truffula.types import EngineRequest

TEXT = {"type": "string", "maxLength": 24}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": TEXT,
        "job": TEXT,
        "married": {"type": "boolean"},
        "height": {"type": "number"},
        "color": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": TEXT, "maxItems": 3},
        "note": TEXT,
        "score": {"type": "integer"},
    },
    "additionalProperties": False,
}
SCHEMA["required"] = list(SCHEMA["properties"])


def grammar() -> Grammar:
    source = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides={"whitespace_flexible": False})
    return Grammar(key="schema of ten fields", source=source)


class Bench:
    def __init__(self, client: EngineClient, tokenizer: Tokenizer, sequences: int) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.sequences = sequences
        self.number = 0
        client.set_vocabulary(tokenizer.vocabulary(client.info.eos_token_ids))

    def request(self, given: Grammar | None, seed: int, **params: Any) -> EngineRequest:
        self.number += 1
        text = f"{self.number} people were asked about their lives. Describe number {self.number} of them in JSON, "
        prompt = self.tokenizer.encode(text + "with name, age, city, job, height, colour and some notes.\n")
        return EngineRequest(
            request_id=f"r{self.number}", prompt_ids=prompt, grammar=given, arrival=time.monotonic(),
            params=EngineParams(seed=seed, **{"temperature": 0.7, "max_tokens": 96, **params}),
        )  # fmt: skip

    def run(self, requests: list[EngineRequest]) -> tuple[float, dict[str, int], float]:
        """Seconds from submission to the last token, tokens of each request, and seconds to the first token."""
        began, first = time.perf_counter(), 0.0
        counts = dict.fromkeys((one.request_id for one in requests), 0)
        left = len(requests)
        self.client.submit(requests)
        while left:
            for event in self.client.events(None):
                first = first or time.perf_counter() - began
                counts[event.request_id] += len(event.token_ids)
                if event.finish_reason is not None:
                    left -= 1
                    assert event.finish_reason in ("stop", "length"), event
        return time.perf_counter() - began, counts, first

    def pair(self, given: Grammar) -> tuple[float, float, float]:
        """Tokens a second with the grammar, and without it; the ratio of the processor times without and with it."""
        engine = psutil.Process(self.client.pid)
        with_it = [self.request(given, seed) for seed in range(self.sequences)]
        cpu, (seconds, counts, _) = cpu_of(engine, lambda: self.run(with_it))
        without = [
            self.request(None, seed, max_tokens=max(1, counts[one.request_id]), ignore_eos=True)
            for seed, one in enumerate(with_it)
        ]
        total = sum(counts.values())
        other_cpu, (other, again, _) = cpu_of(engine, lambda: self.run(without))
        assert sum(again.values()) == total
        return total / seconds, total / other, other_cpu / cpu

    def first_token_ms(self, given: Grammar | None) -> float:
        return 1e3 * self.run([self.request(given, 0, max_tokens=1)])[2]


def write_tiny_model(folder: Path) -> None:
    """A random model whose tokens are single bytes."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint

    write_tiny_checkpoint(folder, tiny_llama_config(vocab_size=256, max_position_embeddings=1024))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, for a moment")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.smoke:
            write_tiny_model(Path(folder) / "tiny")
            given.model, given.sequences, given.rounds = str(Path(folder) / "tiny"), 2, 1
        config = EngineConfig(model=given.model, max_running=given.sequences)
        client = connect(config, "process")
        try:
            measure(client, given.sequences, given.rounds)
        finally:
            client.close()


def measure(client: EngineClient, sequences: int, rounds: int) -> None:
    """Print the figures of ``rounds`` rounds."""
    tokenizer = load_texts(Path(client.info.path)).tokenizer
    assert tokenizer is not None, "the model has no tokenizer"
    bench, given = Bench(client, tokenizer, sequences), grammar()
    print(f"first grammar: first token after {bench.first_token_ms(given):.0f} ms (the vocabulary is prepared)")
    other = msgspec.structs.replace(given, key="the same under another key")
    print(f"new grammar: first token after {bench.first_token_ms(other):.0f} ms")
    bench.pair(given)
    ratios, cpu_ratios = [], []
    for _ in range(rounds):
        with_it, without, cpu_ratio = bench.pair(given)
        ratios.append(with_it / without)
        cpu_ratios.append(cpu_ratio)
        print(
            f"{sequences} sequences: {with_it:.0f} tokens/s with the grammar, {without:.0f} without: "
            f"{ratios[-1]:.3f}, by processor time {cpu_ratio:.3f}"
        )
    first = [(bench.first_token_ms(given), bench.first_token_ms(None)) for _ in range(4 * rounds)]
    added = statistics.median(a - b for a, b in first)
    medians = f"{statistics.median(ratios):.3f}, by processor time {statistics.median(cpu_ratios):.3f}"
    print(f"ratio {medians} (medians); first token {added:+.1f} ms with a known grammar (median)")


if __name__ == "__main__":
    main()
