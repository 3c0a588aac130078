"""The vocabulary of a GGUF file: consistency of its lists, the type of each token, the end tokens.

Follows llama.cpp's vocabulary loader (``llama-vocab.cpp``). A vocabulary that this loader rejects or that the
``tokenizers`` library cannot express is an error that names the metadata key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, TypeGuard

from truffula.errors import some
from truffula.types import EndToken

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
BY_TEXT = "recognised by its text"
PREFIX = "tokenizer.ggml."
# Tokens with these texts end a completion, even when no key names them.
_ENDS_BY_TEXT = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT>
_<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[
"""
# Marks of fill-in-the-middle prompts: the id under the key, else the token of one of these texts. The last three end a
# completion, because padding or another file follows them.
_FIM: Mapping[str, str] = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
_FIM_ENDS = ("fim_pad", "fim_rep", "fim_sep")
# Always part of the text, because they structure the answer.
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
# llama.cpp's converter gives tokens of this form the type CONTROL; files of older versions have them as NORMAL.
_LOOKS_LIKE_CONTROL = re.compile(r"<\|[\w▁:./ -]+\|>|<｜[\w▁:./ -]+｜>|<start_of_turn>")
# For files that name none. (llama.cpp's default for gpt2, 11, is a comma in most vocabularies and is not used.)
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}
_OTHER_IDS = ("eot", "eom", "padding", "seperator", "mask", "cls", "prefix", "suffix", "middle")
_IDS = ("bos", "eos", "unknown", *_OTHER_IDS, *_FIM)
_READ = frozenset(
    [f"{PREFIX}{name}_token_id" for name in _IDS]
    + [f"{PREFIX}{name}" for name in ("model", "pre", "tokens", "token_type", "scores", "merges")]
    + [f"{PREFIX}{name}" for name in ("add_bos_token", "add_eos_token", "add_space_prefix")]
    # read by llama.cpp for other kinds of tokenizers; without effect on the supported ones
    + [f"{PREFIX}{name}" for name in ("add_sep_token", "token_type_count", "remove_extra_whitespaces")]
    + [f"{PREFIX}{name}" for name in ("precompiled_charsmap", "normalizer.lowercase", "normalizer.strip_accents")]
    # the same vocabulary in another form, or a list of names
    + ["tokenizer.huggingface.json", "tokenizer.rwkv.world", "tokenizer.chat_template", "tokenizer.chat_templates"]
)
TEMPLATE = "tokenizer.chat_template"


class UnreadableVocabulary(Exception):
    """The tokenizer of the file cannot be rebuilt exactly; the message names the metadata key."""


def unread_keys(metadata: Mapping[str, Any]) -> list[str]:
    """Keys under ``tokenizer.`` that are not read."""
    tokenizer = [key for key in metadata if key.startswith("tokenizer.") and not key.startswith(f"{TEMPLATE}.")]
    return [key for key in tokenizer if key not in _READ]


def named_ends(metadata: Mapping[str, Any]) -> dict[int, str]:
    """The end tokens that the file names (of the text, of a turn, of a message): id → key."""
    found: dict[int, str] = {}
    for name in ("eos", "eot", "eom"):
        value = metadata.get(key := f"{PREFIX}{name}_token_id")
        if _is_id(value):
            found.setdefault(value, key)
    return found


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


class Vocabulary:
    """The lists of a file; ``types`` holds the file format's type number of each token.

    Raises ``UnreadableVocabulary``.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.kind = metadata.get(f"{PREFIX}model")
        self.tokens = _tokens(metadata.get(f"{PREFIX}tokens"))
        self.warnings: list[str] = []
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self._ids[token] != index)
            raise UnreadableVocabulary(f"{PREFIX}tokens lists {twice!r} twice")
        self.types = self._types()
        not_ends = {self._ids[text] for text in _not_ends(self._ids)}
        self.ends = tuple(token for token in self._ends() if token.id not in not_ends)
        self._override_types(not_ends)
        self._check_ids()

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"{PREFIX}{name}", default)
        if not isinstance(value, bool):
            raise UnreadableVocabulary(f"{PREFIX}{name} is {value!r}, not true or false")
        return value

    def token(self, name: str) -> tuple[int, str] | None:
        """Id and text of the ``bos``, ``eos``, ``unknown``, … token that the key names, else of the kind's default."""
        default = _DEFAULT_IDS.get(str(self.kind), {}).get(name)
        for index in (self.metadata.get(f"{PREFIX}{name}_token_id"), default):
            if _is_id(index) and 0 <= index < len(self.tokens):
                return index, self.tokens[index]
        return None

    def needed(self, name: str) -> tuple[int, str]:
        """The token that ``add_<name>_token`` adds."""
        found = self.token(name)
        if found is None:
            raise UnreadableVocabulary(f"{PREFIX}add_{name}_token is true, but no {PREFIX}{name}_token_id names one")
        return found

    def scores(self) -> list[float]:
        """One score per token; empty when the file has none."""
        return self._list("scores", (int, float))

    def merges(self) -> tuple[list[tuple[str, str]] | None, list[str]]:
        """The merges of known tokens (None when the file has no list), and the other entries of the list.

        A pair is written with one space between; the first may itself begin with one.
        """
        written = self.metadata.get(f"{PREFIX}merges")
        if written is None:
            return None, []
        if not isinstance(written, list) or not set(map(type, written)) <= {str}:
            raise UnreadableVocabulary(f"{PREFIX}merges is not a list of texts")
        if len(set(written)) < len(written):
            written = list(dict.fromkeys(written))  # of duplicates, the first counts
        known, found, foreign = self._ids, [], []
        for merge in written:  # about as many as tokens, and a server start waits for it
            at = merge.find(" ", 1)
            left, right = (merge[:at], merge[at + 1 :]) if at > 0 else ("", merge)
            if left in known and right in known and left + right in known:
                found.append((left, right))
            else:
                foreign.append(merge)
        return found, foreign

    def added(self, spelled: list[str]) -> list[dict[str, Any]]:
        """``added_tokens`` of tokenizer.json, matched before the text is split: control and user-defined tokens.

        ``spelled`` are the tokens as they occur in text, "" for those that cannot.
        """
        name = str(self.metadata.get("general.name", "")).lower()
        strips = "phi-3" in name or "phi3" in name  # these models were trained without the space after a mark
        return [
            {
                "id": index,
                "content": spelled[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": strips and kind == CONTROL and spelled[index] not in ("<s>", "<|endoftext|>"),
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for index, kind in enumerate(self.types)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and spelled[index]
        ]

    def _list(self, name: str, kinds: tuple[type, ...]) -> list[Any]:
        """A list with one item per token, or an empty one; a longer list is truncated, as llama.cpp does."""
        found = self.metadata.get(f"{PREFIX}{name}")
        if found is None:
            return []
        if not isinstance(found, list) or not set(map(type, found)) <= set(kinds):
            raise UnreadableVocabulary(f"{PREFIX}{name} is not a list of numbers")
        if len(found) < len(self.tokens):
            raise UnreadableVocabulary(f"{PREFIX}{name} has {len(found)} entries for {len(self.tokens)} tokens")
        if float in kinds and any(map(math.isnan, found)):
            raise UnreadableVocabulary(f"{PREFIX}{name} holds a NaN")
        return found[: len(self.tokens)]

    def _types(self) -> list[int]:
        types = self._list("token_type", (int,))
        if not types:
            self.warnings.append(
                f"{PREFIX}token_type is missing: only tokens that look like control tokens are treated as such."
            )
        return types or [NORMAL] * len(self.tokens)

    def _marks(self, names: Iterable[str]) -> dict[int, str]:
        """Ids of fill-in-the-middle marks, each with its source."""
        found: dict[int, str] = {}
        for name in names:
            written = self.token(name)
            if written is not None:
                found.setdefault(written[0], f"{PREFIX}{name}_token_id")
            elif text := next((text for text in _FIM[name].split() if text in self._ids), ""):
                found.setdefault(self._ids[text], BY_TEXT)
        return found

    def _ends(self) -> list[EndToken]:
        """Tokens that end a completion: those that the file names, then those recognised by their text."""
        found = {index: key for index, key in named_ends(self.metadata).items() if 0 <= index < len(self.tokens)}
        default = self.token("eos")
        if default is not None and self.types[default[0]] != NORMAL:
            found.setdefault(default[0], f"the default eos_token_id of {PREFIX}model {self.kind}")
        for text in _ENDS_BY_TEXT.split():
            if text in self._ids:
                found.setdefault(self._ids[text], BY_TEXT)
        for index, source in self._marks(_FIM_ENDS).items():
            found.setdefault(index, source)
        return [EndToken(index, source, self.tokens[index]) for index, source in found.items()]

    def _override_types(self, not_ends: set[int]) -> None:
        """Change the types of end tokens and marks, which are matched in prompts whatever type the file gives them."""
        control = {token.id for token in self.ends} | self._marks(_FIM).keys()
        looks = _LOOKS_LIKE_CONTROL.fullmatch
        angled = [i for i, token in enumerate(self.tokens) if token[0] == "<"]
        control |= {i for i in angled if self.types[i] == NORMAL and looks(self.tokens[i])}
        shown = {self._ids[text] for text in _SHOWN if text in self._ids} | not_ends
        wrong = [index for index in sorted(control - shown) if self.types[index] == NORMAL]
        if wrong:
            names = some([f"{self.tokens[index]!r} ({index})" for index in wrong], 5)
            self.warnings.append(f"{PREFIX}token_type has {names} as normal tokens; they are control tokens.")
        for index in control:
            self.types[index] = CONTROL
        for index in shown:
            self.types[index] = USER_DEFINED

    def _check_ids(self) -> None:
        for name in _IDS:
            value = self.metadata.get(key := f"{PREFIX}{name}_token_id")
            if value is not None and not (_is_id(value) and 0 <= value < len(self.tokens)):
                self.warnings.append(f"{key} is {value!r}, not one of the {len(self.tokens)} tokens; it is not used.")


def _not_ends(texts: Container[str]) -> list[str]:
    """Texts of ``_ENDS_BY_TEXT`` that do not end a completion when certain other tokens exist: they end a part of an
    answer (harmony, solar) or have no special meaning (gemma 4).
    """
    harmony = "<|return|>" in texts and "<|call|>" in texts
    solar = "<|flush|>" in texts and ("<|call|>" in texts or "<|calls|>" in texts)
    gemma = "<|tool_response>" in texts
    return [text for text, found in (("<|end|>", harmony or solar), ("</s>", gemma)) if found and text in texts]


def _tokens(listed: Any) -> list[str]:
    if not isinstance(listed, list) or set(map(type, listed)) != {str}:
        raise UnreadableVocabulary(f"{PREFIX}tokens is not a vocabulary, a list of texts")
    try:
        "".join(listed).encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 were decoded to lone surrogates
        raise UnreadableVocabulary(f"{PREFIX}tokens is a vocabulary with a text that is not UTF-8") from None
    if "" not in listed:
        return listed
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(listed)]
