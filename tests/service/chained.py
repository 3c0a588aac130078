"""A model whose next token is a function of the last one, so that a test says what it writes, special tokens too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from served import VOCAB
from tiny_tokenizers import byte_level, byte_level_json

from truffula.testing.tiny import tiny_llama_config, tiny_tensors, write_tiny_checkpoint


def ids_of(text: str) -> list[int]:
    return byte_level().encode(text)


def write_chained_model(folder: Path, ids: Sequence[int], *, eos: int, **tokenizer_config: Any) -> Path:
    """A llama that answers ``ids[0]`` with ``ids[1]`` and so on; each id at most once."""
    assert len(set(ids)) == len(ids)
    shape = {"vocab_size": VOCAB, "hidden_size": VOCAB, "intermediate_size": 8, "num_hidden_layers": 1}
    config = tiny_llama_config(
        **shape, num_attention_heads=2, num_key_value_heads=1, head_dim=8, bos_token_id=None, eos_token_id=eos,
        tie_word_embeddings=False,
    )  # fmt: skip
    tensors = {name: np.zeros_like(array) for name, array in tiny_tensors(config).items()}
    tensors["model.embed_tokens.weight"] = np.eye(VOCAB, dtype=np.float32)
    tensors["model.norm.weight"] = np.ones(VOCAB, np.float32)
    head = tensors["lm_head.weight"]
    for last, following in pairwise(ids):
        head[following, last] = 1.0
    write_tiny_checkpoint(folder, config, extra=tensors)
    (folder / "tokenizer.json").write_bytes(byte_level_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder
