"""A served model that answers each question with a text of its test: a question is one token, which starts a chain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from truffula.testing.tiny import tiny_llama_config, tiny_tensors, write_tiny_checkpoint

BEGIN, END, ROLE = "<|begin|>", "<|end|>", "<|role|>"
# As Qwen's: tools and calls in Hermes' form, reasoning between think tags. The question is written last, so that its
# token begins the answer.
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|role|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|end|>"
    "{% endfor %}{% if enable_thinking is defined %}thinking={{ enable_thinking }}{% endif %}"
    "{% if false %}<think></think>{% endif %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{{ messages[-1].content }}{% endif %}"
)


def write_scripted_model(
    folder: Path, scripts: Mapping[str, Sequence[str]], template: str = TEMPLATE, length: int = 2048
) -> Path:
    """A llama that answers the text ``key`` with ``scripts[key]``, one piece a token, at temperature 0.

    No piece may be in two places.
    """
    pieces = [text for key, answer in scripts.items() for text in (key, *answer)]
    assert len(set(pieces)) == len(pieces)
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in (BEGIN, END, ROLE)])
    made.add_tokens([AddedToken(text, normalized=False) for text in pieces])
    size = made.get_vocab_size()
    end = made.token_to_id(END)
    size += size % 2
    config = tiny_llama_config(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=None, eos_token_id=end, tie_word_embeddings=False,
        max_position_embeddings=length,
    )  # fmt: skip
    tensors = {name: np.zeros_like(array) for name, array in tiny_tensors(config).items()}
    tensors["model.embed_tokens.weight"] = np.eye(size, dtype=np.float32)
    tensors["model.norm.weight"] = np.ones(size, np.float32)
    head = tensors["lm_head.weight"]
    for key, answer in scripts.items():
        for last, following in pairwise([key, *answer, END]):
            head[made.token_to_id(following), made.token_to_id(last)] = 1.0
    write_tiny_checkpoint(folder, config, extra=tensors)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BEGIN, "eos_token": END, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
