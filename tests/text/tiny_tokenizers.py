"""Real tokenizers of the kinds models have, made in the test with the ``tokenizers`` library."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from truffula.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The Truffula trees were bright, and the Lorax spoke for them.",
    "Ünïcödé wörds, naïve café, 東京の空, привет мир, 👍🏽 emoji 🌲🌳",
    "def f(x):\n    return {'a': [1, 2, 3]}\n",
    "hello hello world   with   many    spaces",
]


@cache
def byte_level_json() -> bytes:
    """GPT-2's kind: byte alphabet, no normaliser (llama 3, qwen, smollm)."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|begin|>", "<|end|>", "<|role|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS * 4, trainer)
    library.add_tokens(["née token"])
    return library.to_str().encode()


@cache
def sentence_piece_json(strip: bool = True) -> bytes:
    """SentencePiece's kind as converted from llama 2 (``strip``) or gemma: ``▁``, byte fallback."""
    special = ["<unk>", "<s>", "</s>"]
    vocab = {token: index for index, token in enumerate(special)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in sorted(set("▁abcdefghijklmnopqrstuvwxyzTL.,!éü東京")):
        vocab[char] = len(vocab)
    merges = []
    for left, right in [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("l", "l"),
        ("▁", "▁"),
        ("▁▁", "▁▁"),
        ("o", "r"),
        ("▁", "w"),
    ]:
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    library = Library(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    library.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence(steps + ([decoders.Strip(content=" ", left=1)] if strip else []))
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.add_special_tokens(special)
    return library.to_str().encode()


@cache
def word_piece_json() -> bytes:
    """BERT's kind: neither family of byte rules, so decoded through a window."""
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    return library.to_str().encode()


@cache
def metaspace_json() -> bytes:
    """T5's kind: a Metaspace decoder."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    library.decoder = decoders.Metaspace(prepend_scheme="always")
    library.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>"], show_progress=False)
    )
    return library.to_str().encode()


def load(tokenizer_json: bytes, **config: object) -> Tokenizer:
    tokenizer = load_tokenizer({"tokenizer.json": tokenizer_json, "tokenizer_config.json": json.dumps(config).encode()})
    assert tokenizer is not None
    return tokenizer


@cache
def byte_level() -> Tokenizer:
    return load(byte_level_json(), bos_token="<|begin|>", eos_token="<|end|>")


@cache
def sentence_piece(strip: bool = True) -> Tokenizer:
    return load(sentence_piece_json(strip), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def word_piece() -> Tokenizer:
    return load(word_piece_json())


@cache
def metaspace() -> Tokenizer:
    return load(metaspace_json())
