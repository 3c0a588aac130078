"""A GGUF file's vocabulary written as tokenizer.json and tokenizer_config.json, for the ``tokenizers`` library.

Two kinds are read. ``gpt2``: byte-level BPE with the file's merges; how text is cut before merging is named by
``tokenizer.ggml.pre``. ``llama``: SentencePiece BPE with byte fallback, whose merges are recovered from the vocabulary.
Sources: llama.cpp's tokenizers (which text a file is meant to be read as) and the tokenizer.json of the same models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import msgspec

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"
_TEMPLATE = "tokenizer.chat_template"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Text is cut by the first pattern, the pieces by the next.
_SPLITS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais", "trillion", "phi-2"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
}
# A piece that is a token as a whole is taken without merging, and text begins with BOS unless the file says otherwise.
_LLAMA3_LIKE = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "tekken"})
_NFC = frozenset({"qwen2", "deepseek-r1-qwen", "megrez", "kormo"})


def tokenizer_files(metadata: Mapping[str, Any]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """tokenizer.json and tokenizer_config.json by name, and warnings.

    A vocabulary of a kind that is not read gives no tokenizer.json and a warning naming it: token ids can still be
    served.
    """
    warnings: list[str] = []
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not _is_text(tokens):
        return {}, ("the GGUF file holds no usable vocabulary; only token ids can be served.",)
    vocabulary = _Vocabulary(metadata, tokens)
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and pre in _SPLITS:
        if pre == "default":
            warnings.append("the GGUF file does not say how its tokenizer cuts text; llama.cpp's default was taken.")
        made = _byte_level(vocabulary, pre)
    elif kind == "llama" and vocabulary.mergeable():
        made = _sentencepiece(vocabulary)
    else:
        what = f"tokenizer.ggml.model {kind!r}" + (f" with tokenizer.ggml.pre {pre!r}" if kind == "gpt2" else "")
        return {}, (f"{what} is not read; only token ids can be served.",)
    files = {
        "tokenizer.json": msgspec.json.encode(made),
        "tokenizer_config.json": msgspec.json.encode(_tokenizer_config(vocabulary, made)),
    }
    return files, tuple(warnings)


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """End-of-sequence ids: a file may name one that ends the text, one that ends a turn and one that ends a message."""
    found = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(value for value in found if isinstance(value, int)))
    return {"eos_token_id": ids} if ids else {}


def _is_text(tokens: Any) -> TypeGuard[list[str]]:
    if not isinstance(tokens, list) or set(map(type, tokens)) != {str}:
        return False
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:  # bytes that were no UTF-8 come as lone surrogates
        return False
    return True


class _Vocabulary:
    """The lists of the file under names. ``types`` are llama.cpp's: 1 normal, 3 control, 4 user-defined, 6 byte."""

    def __init__(self, metadata: Mapping[str, Any], tokens: list[str]) -> None:
        self.metadata = metadata
        self.tokens = tokens
        types = metadata.get("tokenizer.ggml.token_type")
        self.types: list[int] = types if isinstance(types, list) and len(types) == len(tokens) else []
        merges = metadata.get("tokenizer.ggml.merges")
        # a merge is two tokens with one space between; the first may itself begin with one
        self.merges = self._usable(merges) if isinstance(merges, list) else None

    def _usable(self, merges: list[Any]) -> list[tuple[str, str]]:
        """One whose parts or result the vocabulary lacks can never apply, and the library refuses it."""
        known, found = set(self.tokens), []
        for merge in map(str, merges):  # as many as tokens, while a server starts
            left, _, right = merge.partition(" ")
            if not left:
                left, right = _halves(merge)
            if left in known and right in known and left + right in known:
                found.append((left, right))
        return found

    def token(self, name: str) -> tuple[int, str] | None:
        """Id and text of the ``bos``, ``eos``, ``unknown`` or ``padding`` token."""
        index = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return (index, self.tokens[index]) if isinstance(index, int) and 0 <= index < len(self.tokens) else None

    def mergeable(self) -> bool:
        scores = self.metadata.get("tokenizer.ggml.scores")
        scored = isinstance(scores, list) and len(scores) == len(self.tokens)
        return bool(self.types) and (scored or bool(self.merges))

    def added(self, spelled: list[str]) -> list[dict[str, Any]]:
        """Tokens matched in the text before it is cut: control tokens, which are special, and those the author
        defined.
        """
        return [
            {
                "id": index,
                "content": spelled[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for index, kind in enumerate(self.types)
            if kind != _NORMAL and kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and spelled[index]
        ]


def _halves(merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    return (merge[:at], merge[at + 1 :]) if at > 0 else (merge, "")


def _byte_level(vocabulary: _Vocabulary, pre: str) -> dict[str, Any]:
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in _SPLITS[pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = _bpe(vocabulary.tokens, vocabulary.merges or [], ignore_merges=pre in _LLAMA3_LIKE)
    return _assemble(
        vocabulary,
        vocabulary.added(vocabulary.tokens),
        model,
        normalizer={"type": "NFC"} if pre in _NFC else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        decoder=byte_level,
        add_bos=bool(vocabulary.metadata.get("tokenizer.ggml.add_bos_token", pre in _LLAMA3_LIKE)),
    )


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    gemma = str(vocabulary.metadata.get("general.architecture", "")).startswith("gemma")
    # A run of spaces is a token of its own; the file spells it with spaces, the normalised text with the mark.
    tokens = [_SPACE * len(t) if len(t) > 1 and not t.strip(" ") else t for t in vocabulary.tokens]
    same = [token if token == spelled else "" for token, spelled in zip(vocabulary.tokens, tokens, strict=True)]
    # Gemma's scores don't follow the order of its merges; the order of its vocabulary does.
    scores = None if gemma else vocabulary.metadata.get("tokenizer.ggml.scores")
    merges = vocabulary.merges or recover_merges(tokens, scores)
    prefix = bool(vocabulary.metadata.get("tokenizer.ggml.add_space_prefix", not gemma))
    unknown = vocabulary.token("unknown")
    model = _bpe(tokens, merges, unk_token=unknown[1] if unknown else None, fuse_unk=True, byte_fallback=True)
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if prefix:
        # SentencePiece's dummy prefix: one space before the text, whether or not it begins with one.
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, normalizer]}
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _assemble(
        vocabulary,
        vocabulary.added(same),
        model,
        normalizer=normalizer,
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": steps},
        add_bos=bool(vocabulary.metadata.get("tokenizer.ggml.add_bos_token", True)),
    )


def recover_merges(tokens: list[str], scores: list[float] | None) -> list[tuple[str, str]]:
    """The merges a SentencePiece BPE vocabulary implies, best first: every cut of a token into two tokens.

    By score, highest first, or by place in the vocabulary where ``scores`` is None; of one token's cuts, by the length
    of their halves.
    """
    place = {token: index for index, token in enumerate(tokens)}
    if scores is None:
        return [
            (left, right)
            for token in tokens
            for at in range(1, len(token))
            if (left := token[:at]) in place and (right := token[at:]) in place
        ]
    found = [
        (-scores[index], -at, at - len(token), token)
        for token, index in place.items()
        for at in range(1, len(token))
        if token[:at] in place and token[at:] in place
    ]
    found.sort(key=lambda cut: cut[:3])
    return [(token[:right], token[right:]) for *_, right, token in found]  # ``right`` counts from the end


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": dict(zip(tokens, range(len(tokens)), strict=True)),
        "merges": merges,
    }


def _assemble(
    vocabulary: _Vocabulary, added: list[dict[str, Any]], model: dict[str, Any], *, add_bos: bool, **parts: Any
) -> dict[str, Any]:
    before = vocabulary.token("bos") if add_bos else None
    after = vocabulary.token("eos") if vocabulary.metadata.get("tokenizer.ggml.add_eos_token") else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "post_processor": _frame(before, after) if before or after else None,
        "model": model,
    }


def _frame(before: tuple[int, str] | None, after: tuple[int, str] | None) -> dict[str, Any]:
    """The post-processor that puts BOS before a text and EOS behind it."""

    def around(*sequences: tuple[str, int]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for name, kind in sequences:
            made += [{"SpecialToken": {"id": before[1], "type_id": kind}}] if before else []
            made += [{"Sequence": {"id": name, "type_id": kind}}]
            made += [{"SpecialToken": {"id": after[1], "type_id": kind}}] if after else []
        return made

    return {
        "type": "TemplateProcessing",
        "single": around(("A", 0)),
        "pair": around(("A", 0), ("B", 1)),
        "special_tokens": {
            text: {"id": text, "ids": [index], "tokens": [text]} for index, text in filter(None, (before, after))
        },
    }


def _tokenizer_config(vocabulary: _Vocabulary, made: dict[str, Any]) -> dict[str, Any]:
    frame = made["post_processor"] or {"single": []}
    framed = [item["SpecialToken"]["id"] for item in frame["single"] if "SpecialToken" in item]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, ggml in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = vocabulary.token(ggml)
        if token is not None:
            config[f"{name}_token"] = token[1]
    config["add_bos_token"] = bool(framed) and framed[0] == config.get("bos_token")
    config["add_eos_token"] = (
        bool(framed)
        and framed[-1] == config.get("eos_token")
        and bool(vocabulary.metadata.get("tokenizer.ggml.add_eos_token"))
    )
    template = vocabulary.metadata.get(_TEMPLATE)
    if isinstance(template, str):
        config["chat_template"] = template
    named = {
        key.removeprefix(f"{_TEMPLATE}."): value
        for key in vocabulary.metadata
        if key.startswith(f"{_TEMPLATE}.") and isinstance(value := vocabulary.metadata[key], str)
    }
    if named:
        every = {"default": template, **named} if isinstance(template, str) else named
        config["chat_template"] = [{"name": name, "template": text} for name, text in every.items()]
    return config
