"""A GGUF file's vocabulary written as tokenizer.json and tokenizer_config.json, for the ``tokenizers`` library.

Three kinds are supported. ``gpt2``: byte-level BPE with the file's merges; ``tokenizer.ggml.pre`` names the rule by
which text is split before merging. ``llama``: SentencePiece BPE with byte fallback; its merges are recovered from the
vocabulary. ``gemma4``: the same with the file's merges.
Sources: llama.cpp's tokenizers, which define what a file means, and the tokenizer.json of the same models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from truffula.types import EndToken
from truffula.weights.gguf.vocabulary import (
    NORMAL,
    PREFIX,
    TEMPLATE,
    UnreadableVocabulary,
    Vocabulary,
    named_ends,
    unread_keys,
)
from truffula.weights.text_files import ModelTexts

_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+[", r"[^\s\p{L}\p{M}\p{N}]+[")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_LETTERS_OF_DEEPSEEK = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-"
    r"ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_CJK = r"[一-龥ࠀ-一가-퟿]+"
_GROUPS_OF_DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # of three, counted from the right
_AFMOE = r"[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"
_KIMI = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXAONE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_YOUTU = r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"
# Text is split by the first pattern, the pieces by the next.
_SPLITS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "jais", "trillion", "phi-2", "exaone4", "gigachat"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), (_LLAMA3,)),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe", "glm4", "glm5"), (_LLAMA3,)),
    **dict.fromkeys(("bloom", "gpt3-finnish"), (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    "deepseek-llm": (r"[\r\n]", _LETTERS_OF_DEEPSEEK, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "kimi-k2": (_KIMI,),
    "afmoe": (_GROUPS_OF_DIGITS, _AFMOE, _DEEPSEEK3[2]),
    "exaone-moe": (_EXAONE,),
    "laguna": (r"[^\n]+|[\n]+", _QWEN2),
    "youtu": (_YOUTU, _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}")),
    **dict.fromkeys(("cohere2moe", "tiny_aya"), (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan", "solar-open"), (_QWEN2,)),
    "qwen35": (_QWEN35,),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2", "kanana2"), (_GPT4O,)),
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# Falcon cuts digits after bytes have become characters, some of which are digits (², ¼).
_OTHERS: Mapping[str, list[dict[str, Any]]] = {
    "falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {**_BYTE_LEVEL, "use_regex": True},
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
    ]
}
# BOS is added unless the file says otherwise.
_LLAMA3_LIKE = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "tekken"})
# A piece that is a whole token is not merged of parts. The last two are of tiktoken, which llama.cpp does not imitate.
_WHOLE = _LLAMA3_LIKE | {"glm4", "glm5", "youtu", "hunyuan", "kimi-k2"}
# Keys under ``general.sampling.`` that generation_config.json has too.
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_NFC = frozenset({"qwen2", "qwen35", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan"})


def read_tokenizer(metadata: Mapping[str, Any]) -> ModelTexts:
    """The tokenizer of a file. One that cannot be rebuilt exactly is left out; token ids can then still be served."""
    warnings = [
        f"the GGUF metadata key {key} ({str(metadata[key])[:40]}) is not read." for key in unread_keys(metadata)
    ]
    generation = generation_config(metadata)
    ends: tuple[EndToken, ...] = ()
    try:
        vocabulary = Vocabulary(metadata)
        ends = vocabulary.ends
        made = _tokenizer(vocabulary)
        config = _tokenizer_config(vocabulary, made)
    except UnreadableVocabulary as error:
        reason = f"The tokenizer of the GGUF file is not read: {error}."
        return ModelTexts({}, generation, ends, tuple(warnings), reason)
    files = {"tokenizer.json": msgspec.json.encode(made), "tokenizer_config.json": msgspec.json.encode(config)}
    return ModelTexts(files, generation, ends, (*warnings, *vocabulary.warnings))


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The file's default sampling parameters and its end token ids, under the names of generation_config.json."""
    found: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if value is not None:
            # Stored as float32: 0.7 is read as 0.699999988.
            found[name] = float(f"{value:.7g}") if isinstance(value, float) else value
    ids = list(named_ends(metadata))
    return found | ({"eos_token_id": ids} if ids else {})


def _tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    if vocabulary.kind in ("llama", "gemma4"):
        return _sentencepiece(vocabulary)
    if vocabulary.kind != "gpt2":
        raise UnreadableVocabulary(f"{PREFIX}model is {vocabulary.kind!r}; supported are gpt2, llama and gemma4")
    pre = vocabulary.metadata.get(f"{PREFIX}pre", "default")
    if not isinstance(pre, str) or pre not in {*_SPLITS, *_OTHERS}:
        raise UnreadableVocabulary(f"{PREFIX}pre is {pre!r}; supported are {', '.join(sorted({*_SPLITS, *_OTHERS}))}")
    if pre == "default":
        vocabulary.warnings.append(f"{PREFIX}pre names no rule for splitting text; llama.cpp's default is used.")
    return _byte_level(vocabulary, pre)


def _byte_level(vocabulary: Vocabulary, pre: str) -> dict[str, Any]:
    merges, foreign = vocabulary.merges()
    if merges is None:
        raise UnreadableVocabulary(f"{PREFIX}merges is missing")
    if foreign:
        count = len(merges) + len(foreign)
        what = f"{len(foreign)} of {count} entries of {PREFIX}merges, the first {foreign[0]!r}, join unknown tokens"
        if len(foreign) * 2 > count > 1:
            raise UnreadableVocabulary(f"{what}: they belong to another vocabulary")
        vocabulary.warnings.append(f"{what}; they are left out.")
    cuts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in _SPLITS.get(pre, ())
    ]
    model = _bpe(vocabulary.tokens, merges, ignore_merges=pre in _WHOLE)
    return _assemble(
        vocabulary,
        vocabulary.added(vocabulary.tokens),
        model,
        normalizer={"type": "NFC"} if pre in _NFC else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": _OTHERS.get(pre) or [*cuts, _BYTE_LEVEL]},
        decoder=_BYTE_LEVEL,
        add_bos=vocabulary.flag("add_bos_token", pre in _LLAMA3_LIKE),
    )


def _sentencepiece(vocabulary: Vocabulary) -> dict[str, Any]:
    gemma = str(vocabulary.metadata.get("general.architecture", "")).startswith("gemma")
    # A run of spaces is one token; the file spells it with spaces, the normalised text with the mark.
    tokens = [_SPACE * len(t) if len(t) > 1 and not t.strip(" ") else t for t in vocabulary.tokens]
    same = [token if token == spelled else "" for token, spelled in zip(vocabulary.tokens, tokens, strict=True)]
    merges, foreign = vocabulary.merges()
    scores = vocabulary.scores()
    if vocabulary.kind == "gemma4" and not merges:
        raise UnreadableVocabulary(f"{PREFIX}merges is missing")
    if not merges or foreign:  # llama.cpp reads the scores alone
        if not scores:
            raise UnreadableVocabulary(
                f"{PREFIX}scores is missing; a tokenizer of {PREFIX}model llama needs it to merge tokens"
            )
        # Gemma's scores don't follow the order of its merges; the order of its vocabulary does.
        merges = recover_merges(tokens, None if gemma else scores)
        if not gemma and not _are_ranked(tokens, scores, merges):
            raise UnreadableVocabulary(
                f"{PREFIX}scores are all equal; a tokenizer of {PREFIX}model llama needs them to merge tokens"
            )
    prefix = vocabulary.flag("add_space_prefix", not gemma)
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
        # llama.cpp adds it to gemma4's whatever the flag says.
        add_bos=vocabulary.flag("add_bos_token", True) or vocabulary.kind == "gemma4",
    )


def _are_ranked(tokens: list[str], scores: list[float], merges: list[tuple[str, str]]) -> bool:
    """Whether the scores order the merges. Some converters write the same placeholder for all tokens."""
    score = dict(zip(tokens, scores, strict=True))
    made = {left + right for left, right in merges}
    return len(made) < 2 or len({score[token] for token in made}) > 1


def recover_merges(tokens: list[str], scores: list[float] | None) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary implies, best first: every split of a token into two tokens.

    By score, highest first, or by position in the vocabulary where ``scores`` is None; of one token's splits, by the
    length of their halves.
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
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    return {"type": "BPE", **options, "vocab": vocab, "merges": merges}


def _assemble(
    vocabulary: Vocabulary, added: list[dict[str, Any]], model: dict[str, Any], *, add_bos: bool, **parts: Any
) -> dict[str, Any]:
    before = vocabulary.needed("bos") if add_bos else None
    after = vocabulary.needed("eos") if vocabulary.flag("add_eos_token", False) else None
    return {
        "version": "1.0",
        "added_tokens": added,
        **parts,
        "post_processor": _frame(before, after) if before or after else None,
        "model": model,
    }


def _frame(before: tuple[int, str] | None, after: tuple[int, str] | None) -> dict[str, Any]:
    """The post-processor that adds BOS before a text and EOS after it."""

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        first, last = ([{"SpecialToken": {"id": token[1], "type_id": kind}}] if token else [] for token in added)
        return [*first, {"Sequence": {"id": name, "type_id": kind}}, *last]

    added = (before, after)
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]} for index, text in filter(None, added)},
    }


def _tokenizer_config(vocabulary: Vocabulary, made: dict[str, Any]) -> dict[str, Any]:
    frame = made["post_processor"] or {"single": []}
    framed = [item["SpecialToken"]["id"] for item in frame["single"] if "SpecialToken" in item]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, ggml in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = vocabulary.token(ggml)
        # A normal token is not special; some files name a comma as BOS.
        if token is not None and (vocabulary.types[token[0]] != NORMAL or token[1] in framed):
            config[f"{name}_token"] = token[1]
    config["add_bos_token"] = bool(framed) and framed[0] == config.get("bos_token")
    ends = bool(framed) and framed[-1] == config.get("eos_token")
    config["add_eos_token"] = ends and vocabulary.flag("add_eos_token", False)
    templates = {
        key.removeprefix(TEMPLATE).removeprefix(".") or "default": value
        for key in sorted(vocabulary.metadata)
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
        if isinstance(value := vocabulary.metadata[key], str)
    }
    if templates.keys() == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return config
