"""A tiny model with a tokenizer, a chat template and adapters, and engines that run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_tokenizers import byte_level_json

from truffula.service.aio import AsyncService
from truffula.service.answers import AnswerFormats
from truffula.service.choices import choice_error, collect
from truffula.service.files import LoadedTexts
from truffula.service.text_sets import TextSet
from truffula.testing.adapters import write_tiny_adapter
from truffula.testing.tiny import tiny_llama_config, write_tiny_checkpoint
from truffula.text.chat_template import ChatTemplates
from truffula.text.ends import EndTokens
from truffula.text.tokenizer import Tokenizer
from truffula.types import Completion, EndToken, EngineInfo, EngineStats, GenerateRequest, TextDelta

VOCAB = 430
TEMPLATE = (
    "{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)
OPTIONS = {
    "max_model_len": 128,
    "memory_bytes": 2**28,
    "dtype": "float32",
    "max_running": 8,
    "step_tokens": 64,
    "threads": 1,
}


def write_model(folder: Path, *, tokenizer: bool = True, **config: Any) -> Path:
    """A llama with the byte-level tokenizer; a few ids at the end have no token, as in padded vocabularies."""
    shape = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
    model = write_tiny_checkpoint(folder, tiny_llama_config(**shape | config))
    if tokenizer:
        (model / "tokenizer.json").write_bytes(byte_level_json())
        names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
        (model / "tokenizer_config.json").write_text(json.dumps(names))
    return model


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    return write_tiny_adapter(
        folder, model, rank=2 + seed, alpha=16, targets=["q_proj", "v_proj", "down_proj"], seed=seed
    )


def text_set(tokenizer: Tokenizer | None) -> TextSet:
    """What a base with this tokenizer and no chat template has."""
    templates = ChatTemplates({}, {})
    ends = EndTokens([], [], tokenizer=tokenizer, templates=templates, vocab_size=VOCAB)
    return TextSet(tokenizer, templates, AnswerFormats(templates, tokenizer), ends)


def texts_with(tokenizer: Tokenizer) -> LoadedTexts:
    return LoadedTexts(tokenizer, end_tokens=tokenizer.end_tokens)


def tiny_info(**changes: object) -> EngineInfo:
    """What an engine of that model would say of itself, for tests without one."""
    given = {
        "model": "tiny", "model_type": "llama", "backend": "reference", "device": "cpu", "dtype": "float32",
        "vocab_size": VOCAB, "max_model_len": 64, "block_size": 16, "num_blocks": 64, "kv_tokens": 1024,
        "step_tokens": 64, "max_running": 8,
        "eos_token_ids": [1], "end_tokens": [EndToken(1, "config.json eos_token_id")],
    }  # fmt: skip
    return EngineInfo(**(given | changes))


async def complete(service: AsyncService, request: GenerateRequest) -> Completion:
    """The whole answer. An error of any choice is raised."""
    gathered: list[TextDelta] = []
    async with await service.open(request) as stream:
        async for deltas in stream:
            for error in filter(None, map(choice_error, deltas)):
                raise error
            gathered += deltas
    return collect(gathered)


def stats_of(service: AsyncService) -> EngineStats:
    """The latest heartbeat of an engine that is alive."""
    stats = service.known_stats()
    assert stats is not None
    return stats
