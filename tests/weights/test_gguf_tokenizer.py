"""A vocabulary in a GGUF file encodes and decodes as the tokenizer that it was made from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

from truffula.weights.gguf.tokenizer import read_tokenizer, recover_merges

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock; they'll say 1234567 times: don't!",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A(B):\n\tpass\r\n",
    "Ein Überfall, déjà vu, naïve café — “quoted” … 漢字かな交じり文 русский текст 🦙🦙",
    "    indented   text  with   runs of      spaces\n\n\n\n12 34 5678 ½ ² ③",
] * 4
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
DEFINED = ["<think>", "</think>"]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# As tokenization_kimi.py joins it.
KIMI = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+{_ENDS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*{_ENDS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def bytes_only() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def theirs(name: str) -> str:
    """How transformers cuts text for a pre-tokenizer's name."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return GGUF_PRE_TOKENIZER_SPLITS[name]


# As the tokenizer.json of models with these names has it.
ORIGINALS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence([split(theirs("llama-bpe")), bytes_only()]),
    "qwen2": lambda: pre_tokenizers.Sequence([split(theirs("qwen2")), bytes_only()]),
    "qwen35": lambda: pre_tokenizers.Sequence([split(PRETOKENIZE_REGEX), bytes_only()]),
    "tekken": lambda: pre_tokenizers.Sequence([split(theirs("tekken")), bytes_only()]),
    "gpt-4o": lambda: pre_tokenizers.Sequence([split(theirs("gpt-4o")), bytes_only()]),
    "falcon": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            split("[0-9][0-9][0-9]"),
        ]
    ),
    "bloom": lambda: pre_tokenizers.Sequence([split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), bytes_only()]),
    "exaone4": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "glm4": lambda: pre_tokenizers.Sequence([split(theirs("llama-bpe")), bytes_only()]),
    "deepseek-v3": lambda: pre_tokenizers.Sequence([*map(split, DEEPSEEK3), bytes_only()]),
    "deepseek-coder": lambda: pre_tokenizers.Sequence(
        [
            *map(split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")),
            pre_tokenizers.Digits(individual_digits=True),
            bytes_only(),
        ]
    ),
    "hunyuan": lambda: pre_tokenizers.Sequence([split(theirs("qwen2")), bytes_only()]),
    "kimi-k2": lambda: pre_tokenizers.Sequence([split(KIMI), bytes_only()]),
    "cohere2moe": lambda: pre_tokenizers.Sequence(
        [split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(theirs("gpt-4o")), bytes_only()]
    ),
    "default": lambda: pre_tokenizers.Sequence(
        [split(r"[\p{P}$+<=>^~|]+"), split(GPT2), split(r"\p{N}+"), split("[0-9]{3}"), bytes_only()]
    ),
}


@cache
def original(pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in {"llama-bpe", "tekken", "glm4", "hunyuan", "kimi-k2"}))
    tokenizer.normalizer = normalizers.NFC() if pre in {"qwen2", "qwen35", "hunyuan"} else None
    tokenizer.pre_tokenizer = ORIGINALS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in DEFINED])
    return tokenizer


def as_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    types = [3 if token in SPECIAL else 4 if token in DEFINED else 1 for token in vocab]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": vocab.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": vocab.index("<|im_end|>"),
        "tokenizer.ggml.add_bos_token": False,
    }


def rebuilt(metadata: dict[str, Any]) -> Tokenizer:
    files = read_tokenizer(metadata).tokenizer
    return Tokenizer.from_str(files["tokenizer.json"].decode())


@cache
def from_gguf(pre: str) -> Tokenizer:
    return rebuilt(as_metadata(original(pre), pre))


PIECES = st.sampled_from(
    [
        "It's",
        " don't",
        "1234",
        "  12",
        "a  123",
        "\n\n",
        "\r\n",
        "\t",
        "   ",
        " ",
        "½²",
        "é",
        "漢字",
        "🦙",
        "русский",
        "<|im_start|>",
        "<think>",
        "<|im",
        "x**2",
        "—“”",
        "Ünï",
        "'LL",
        "\x00",
        "\u2009",
        "camelCaseX",
        "/path/",
    ]
)
TEXTS = st.lists(PIECES | st.text(st.characters(codec="utf-8"), max_size=6), max_size=12).map("".join)


@pytest.mark.parametrize("pre", ORIGINALS)
@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_byte_level_vocabularies(pre: str, text: str) -> None:
    wanted, found = original(pre), from_gguf(pre)
    ids = wanted.encode(text).ids
    assert found.encode(text).ids == ids
    for skip in (True, False):
        assert found.decode(ids, skip_special_tokens=skip) == wanted.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("pre", ORIGINALS)
def test_every_text_of_the_corpus_comes_back(pre: str) -> None:
    for text in CORPUS[:4]:
        assert from_gguf(pre).decode(from_gguf(pre).encode(text).ids) == text


def pieces(pre: str, text: str) -> list[str]:
    """The texts that are merged apart from each other."""
    cuts = json.loads(read_tokenizer(as_metadata(original("gpt-2"), pre)).tokenizer["tokenizer.json"])["pre_tokenizer"]
    made = pre_tokenizers.Sequence([split(cut["pattern"]["Regex"]) for cut in cuts["pretokenizers"][:-1]])
    return [piece for piece, _ in made.pre_tokenize_str(text)]


@given(text=st.lists(PIECES | st.text("aZéÀǅ漢字かな々12½ ,;'s\u0301\n…/", max_size=6), max_size=12).map("".join))
@settings(max_examples=100, deadline=None)
def test_classes_without_han_letters(text: str) -> None:
    """Another regex engine cuts Kimi's texts alike."""
    assert pieces("kimi-k2", text) == regex.findall(KIMI, text, regex.V1)


@pytest.mark.parametrize(
    ("pre", "text", "wanted"),
    [
        ("afmoe", "x 1234567 12 ½²", ["x", " ", "1", "234", "567", " ", "12", " ", "½²"]),
        ("cohere2moe", "1234567 12", ["1", "234", "567", " ", "12"]),
        ("deepseek-v3", "1234567;it", ["123", "456", "7", ";it"]),
        ("deepseek-llm", "a 12你好!?", ["a", " ", "1", "2", "你好", "!?"]),
        ("exaone-moe", "two words 12", ["two words", " ", "1", "2"]),
        ("laguna", "a\n\nb 12", ["a", "\n\n", "b", " ", "1", "2"]),
        ("youtu", "你好、a camelCase", ["你好", "、", "a", " camel", "Case"]),
    ],
)
def test_how_text_is_cut(pre: str, text: str, wanted: list[str]) -> None:
    assert pieces(pre, text) == wanted


def test_the_frame_of_a_text() -> None:
    metadata = as_metadata(original("gpt-2"), "gpt-2")
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    plain = original("gpt-2").encode("hi").ids
    for add_bos, add_eos in ((True, False), (False, True), (True, True)):
        both = {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}
        tokenizer = rebuilt(metadata | both)
        assert tokenizer.encode("hi").ids == [bos] * add_bos + plain + [eos] * add_eos
        assert tokenizer.encode("hi", add_special_tokens=False).ids == plain
        config = json.loads(read_tokenizer(metadata | both).tokenizer["tokenizer_config.json"])
        assert (config["add_bos_token"], config["add_eos_token"]) == (add_bos, add_eos)
    silent = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.add_bos_token"}
    assert rebuilt(silent).encode("hi").ids == plain
    assert rebuilt(silent | {"tokenizer.ggml.pre": "llama-bpe"}).encode("hi").ids[0] == bos


def test_tokenizer_config() -> None:
    metadata = as_metadata(original("gpt-2"), "gpt-2") | {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.padding_token_id": 10**6,
    }
    config = json.loads(read_tokenizer(metadata).tokenizer["tokenizer_config.json"])
    assert config["bos_token"] == "<|im_start|>"
    assert config["eos_token"] == "<|im_end|>"
    assert config["chat_template"] == "{{ messages }}"
    assert "pad_token" not in config
    named = json.loads(
        read_tokenizer(metadata | {"tokenizer.chat_template.tool": "T"}).tokenizer["tokenizer_config.json"]
    )
    assert named["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool", "template": "T"},
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokenizer.ggml.pre": "nobody-bpe"}, "nobody-bpe"),
        ({"tokenizer.ggml.model": "t5"}, "t5"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}, "llama"),
        ({"tokenizer.ggml.tokens": None}, "vocabulary"),
        ({"tokenizer.ggml.tokens": ["a", "\udc80"]}, "vocabulary"),
    ],
)
def test_a_vocabulary_that_is_not_read_leaves_token_ids(changed: dict[str, Any], words: str) -> None:
    found = read_tokenizer(as_metadata(original("gpt-2"), "gpt-2") | changed)
    assert found.tokenizer == {}
    assert words in found.no_tokenizer


# --- SentencePiece
# ------------------------------------------------------------------------------------------------------

MARK = "\u2581"


@cache
def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Learned as SentencePiece learns a BPE vocabulary: the most frequent pair becomes the next piece, worth one
    less.
    """
    text = " ".join(CORPUS[:3]).replace(" ", MARK)
    symbols = list(text)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    merged: list[str] = []
    while len(merged) < 120:
        pairs: dict[str, int] = {}
        for left, right in itertools.pairwise(symbols):
            if MARK not in right:
                pairs[left + right] = pairs.get(left + right, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged += [best] if best not in merged else []
        joined, at = [], 0
        while at < len(symbols):
            pair = "".join(symbols[at : at + 2])
            step = 2 if pair == best and at + 1 < len(symbols) else 1
            joined.append(pair if step == 2 else symbols[at])
            at += step
        symbols = joined
    tokens += [*merged, "[INST]"]
    scores += [-float(rank) for rank in range(len(merged))] + [0.0]
    types += [1] * len(merged) + [4]
    joinable = set("".join(merged))
    spare = [letter for letter in sorted(set(text)) if letter not in joinable]
    letters = sorted(joinable) + spare[:-6]  # the last ones are left to their bytes
    tokens += letters
    scores += [-1000.0 - rank for rank in range(len(letters))]
    return tokens, scores, types + [1] * len(letters)


def by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """llama.cpp's way: join the neighbours whose joint piece scores best, leftmost first; what is unknown goes as
    bytes.
    """
    place = {token: index for index, token in enumerate(tokens)}
    symbols = list(text.replace(" ", MARK))
    while True:
        found = [
            (-scores[place[pair]], at)
            for at, pair in enumerate(map("".join, itertools.pairwise(symbols)))
            if pair in place
        ]
        if not found:
            break
        _, at = min(found)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    ids: list[int] = []
    for symbol in symbols:
        ids += [place[symbol]] if symbol in place else [place[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


@cache
def sentencepiece(prefix: bool) -> Tokenizer:
    tokens, scores, types = sentencepiece_vocabulary()
    return rebuilt(
        {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    )


@given(
    text=st.lists(PIECES.filter(lambda piece: "<" not in piece) | st.sampled_from([" the", "quick", "  "])).map("".join)
)
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_vocabularies(prefix: bool, text: str) -> None:
    tokens, scores, _ = sentencepiece_vocabulary()
    wanted = by_score((" " if prefix and text else "") + text, tokens, scores)
    found = sentencepiece(prefix)
    assert found.encode(text, add_special_tokens=False).ids == wanted
    assert found.encode(text).ids == [1, *wanted]
    assert found.decode(wanted) == text


def test_sentencepiece_tokens_in_the_text() -> None:
    tokens, scores, _ = sentencepiece_vocabulary()
    found = sentencepiece(False).encode("the [INST]quick</s>", add_special_tokens=False).ids
    place = {token: index for index, token in enumerate(tokens)}
    assert found == [*by_score("the ", tokens, scores), place["[INST]"], *by_score("quick", tokens, scores), 2]


@cache
def gemma4() -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer of Gemma's kind with merges of its own, and the one of its GGUF file."""
    wanted = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    wanted.normalizer = normalizers.Replace(" ", MARK)
    wanted.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "<turn|>"]
    # Learned of words: merges do not cross spaces.
    words = [piece for text in CORPUS[:4] for piece in text.replace(" ", f" {MARK}").split(" ")]
    learned = Tokenizer(models.BPE())
    learned.train_from_iterator(words, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    made = json.loads(wanted.to_str())
    made["model"] |= {key: json.loads(learned.to_str())["model"][key] for key in ("vocab", "merges")}
    wanted = Tokenizer.from_str(json.dumps(made))
    wanted.add_special_tokens([AddedToken("<turn|>", normalized=False)])
    vocab = sorted(wanted.get_vocab(), key=wanted.token_to_id)
    kinds = {"<unk>": 2, "<pad>": 3, "<eos>": 3, "<bos>": 3, "<turn|>": 3}
    metadata = {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.scores": [-1000.0] * len(vocab),
        "tokenizer.ggml.token_type": [kinds.get(token, 6 if token.startswith("<0x") else 1) for token in vocab],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in made["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert "merges is missing" in read_tokenizer({**metadata, "tokenizer.ggml.merges": None}).no_tokenizer
    return wanted, rebuilt(metadata)


@given(text=TEXTS.map(lambda text: text.replace("<", "")))
@settings(max_examples=80, deadline=None)
def test_gemma4_vocabularies(text: str) -> None:
    """BOS is added whatever the flag says, as in llama.cpp."""
    wanted, found = gemma4()
    ids = wanted.encode(text).ids
    assert found.encode(text, add_special_tokens=False).ids == ids
    assert found.encode(f"{text}<turn|>").ids == [2, *ids, wanted.token_to_id("<turn|>")]
    assert found.decode(ids) == wanted.decode(ids)


def test_merges_are_recovered_best_first() -> None:
    tokens = ["a", "b", "ab", "abb", "bb"]
    assert recover_merges(tokens, [0, 0, -1, -3, -2]) == [("a", "b"), ("b", "b"), ("ab", "b"), ("a", "bb")]
    assert recover_merges(tokens, None) == [("a", "b"), ("a", "bb"), ("ab", "b"), ("b", "b")]
