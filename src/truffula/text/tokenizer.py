"""A model's tokenizer, from its files, over the ``tokenizers`` library alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import msgspec
from tokenizers import Tokenizer as Library

from truffula.errors import CheckpointError, InvalidRequest, TruffulaError, is_rust_panic
from truffula.text.detokenizer import (
    BYTE_TOKEN,
    REPLACEMENT,
    ByteDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    byte_rule,
    is_utf8,
)
from truffula.text.expansion import check_expansion
from truffula.text.side_files import ADDED, CONFIG, MAP, add_tokens, special_tokens
from truffula.types import EndToken, Vocabulary


@dataclass(frozen=True)
class Encoded:
    """``offsets`` are characters of the text; tokens that the tokenizer added itself have ``added`` True and lie at 0,
    0.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    added: list[bool]


def check_text(text: str, param: str) -> None:
    """Raise ``InvalidRequest`` for text that is not Unicode: a lone surrogate (JSON can say ``"\\ud800"``) has no
    UTF-8.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; "
            "that is half of a UTF-16 pair and not text.",
            param=param,
            at=error.start,
        ) from None


@contextmanager
def _library_errors(kind: type[TruffulaError], what: str, param: str) -> Iterator[None]:
    """Raises ``kind`` where the library fails or panics (a ``BaseException``) within the block."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_rust_panic(error):
            raise
        raise kind(f"{what}: {str(error)[:500]}", param=param) from error


def _request_errors(what: str) -> AbstractContextManager[None]:
    return _library_errors(InvalidRequest, f"The model's tokenizer (tokenizer.json) failed to {what}", "prompt")


class Tokenizer:
    """Text to ids and back. Safe to use from several threads.

    ``special_tokens`` maps ``bos_token``, ``eos_token``, … to their text (what chat templates read). ``special_ids``
    are the ids that ``skip_special_tokens`` leaves out, ``added_ids`` those matched in the text before it is cut.
    ``chat_templates`` maps a name (``default``, ``tool_use``, …) to a Jinja source. ``end_tokens`` are those at which
    the model's files, beside its configuration, end a completion. ``warnings`` are for the operator. ``decoder`` is
    that of tokenizer.json. ``response_template`` describes answers, as transformers reads it.
    """

    def __init__(
        self,
        library: Library,
        config: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        end_tokens: Sequence[EndToken] = (),
        warnings: Sequence[str] = (),
        *,
        decoder: Any = None,
    ) -> None:
        self._library = library
        self.special_tokens = dict(special_tokens)
        self.end_tokens = tuple(end_tokens)
        self.warnings = tuple(warnings)
        added = library.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.added_ids = frozenset(added)
        self.bos_id = self._named("bos_token")
        self.eos_id = self._named("eos_token")
        self.vocab_size: int = library.get_vocab_size(with_added_tokens=True)
        self.chat_templates = _templates(config)
        found = config.get("response_template")
        self.response_template: dict[str, Any] = found if isinstance(found, dict) else {}
        self._rule = byte_rule(decoder)
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def _named(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        found: int | None = None if token is None else self._library.token_to_id(token)
        return found

    def same_as(self, other: Tokenizer) -> bool:
        """Whether both make the same ids and texts, and name the same special tokens."""
        ends = [{token.id for token in one.end_tokens} for one in (self, other)]
        named = self.special_tokens == other.special_tokens and ends[0] == ends[1]
        return named and str(self._library.to_str()) == str(other._library.to_str())

    @property
    def has_byte_rule(self) -> bool:
        """Whether tokens are decoded one by one, without the library."""
        return self._rule is not None

    def rules(self) -> Rules:
        """As the library writes them, whatever the file's version."""
        return msgspec.json.decode(self._library.to_str(), type=Rules)

    @property
    def ids(self) -> list[int]:
        """All ids with a token, ascending."""
        return sorted(self._library.get_vocab(with_added_tokens=True).values())

    @cached_property
    def longest_piece(self) -> int:
        """Characters of the longest vocabulary entry: no token stands for more text than that."""
        return max(map(len, self._library.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``. Special tokens written out in it become their ids. The GIL is free meanwhile."""
        with _request_errors("tokenize this text"):
            # encode_batch_fast is encode without offsets, in half the time.
            encoding = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = encoding.ids
        return ids

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        with _request_errors("tokenize this text"):
            encoding = self._library.encode(text, add_special_tokens=add_special_tokens)
        return Encoded(encoding.ids, encoding.offsets, [mask == 1 for mask in encoding.special_tokens_mask])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``ids``: what a ``detokenizer`` gives piece by piece. Ids without a token add nothing."""
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        if self._rule is None:
            return self._decode(ids)
        machine = self.detokenizer()
        return "".join(map(machine.push, ids)) + machine.flush()

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder. Special tokens to be skipped must not be pushed."""
        if self._rule is None:
            return WindowDetokenizer(self._decode)
        return ByteDetokenizer(self._piece_bytes, self._rule.strip)

    def _decode(self, ids: Sequence[int]) -> str:
        with _request_errors("decode these tokens"):
            text: str = self._library.decode(ids, skip_special_tokens=False)
        return text

    def _piece_bytes(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            assert self._rule is not None
            piece = self.id_to_token(token_id)
            found = self._bytes[token_id] = b"" if piece is None else self._rule.to_bytes(piece)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token (``Ġhello``, ``▁hello``, ``<0xE2>``); None of an id without one."""
        found: str | None = self._library.id_to_token(token_id)
        return found

    def text_of(self, token_id: int) -> str:
        """A token's text by itself, its leading space kept; U+FFFD where it is part of a character."""
        if self._rule is not None:
            return self._piece_bytes(token_id).decode(errors="replace")
        if token_id not in self._texts:
            self._texts[token_id] = self._decode([token_id])
        return self._texts[token_id]

    def bytes_of(self, token_id: int) -> bytes | None:
        """A token's own bytes; those of an id without a token are none. None where the decoder does not tell them."""
        if self._rule is not None:
            return self._piece_bytes(token_id)
        text, piece = self.text_of(token_id), self.id_to_token(token_id) or ""
        if REPLACEMENT not in text or REPLACEMENT in piece:
            return text.encode()
        byte = BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else None

    def vocabulary(self, end_ids: Iterable[int]) -> Vocabulary:
        """The bytes of all tokens, for grammars. ``end_ids`` end a completion.

        Raises ``InvalidRequest`` for a tokenizer whose tokens have no bytes of their own (``byte_rule``).
        """
        rule = self._rule
        if rule is None:
            raise InvalidRequest(
                "Structured output is not possible with this model: the text of a token of its tokenizer depends on "
                "the tokens around it (the decoder in tokenizer.json is neither ByteLevel nor ByteFallback).",
                param="response_format",
            )
        pieces = self._library.get_vocab(with_added_tokens=True)
        tokens = [b""] * (max(pieces.values(), default=-1) + 1)
        for piece, token_id in pieces.items():
            tokens[token_id] = rule.to_bytes(piece)
        return Vocabulary(tokens=tokens, special_ids=sorted(self.special_ids), end_ids=sorted(set(end_ids)))

    def bytes_added(self, token_id: int, text: str) -> bytes | None:
        """The bytes a token added, where ``text`` came out with it: a space that the decoder strips is not among them,
        and of a character that was split over tokens only its own part is.
        """
        own = self.bytes_of(token_id)
        return text.encode() if own is not None and is_utf8(own) and REPLACEMENT not in text else own


def load_tokenizer(files: Mapping[str, bytes], end_tokens: Sequence[EndToken] = ()) -> Tokenizer | None:
    """The tokenizer of a model's files (name → content), or None where there is no tokenizer.json.

    Args:
        files: ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json``,
            ``chat_template.jinja`` or the older ``chat_template.json``, as far as they exist.
        end_tokens: Known otherwise to end a completion; the files' ``eos_token`` is added.

    Raises ``CheckpointError`` naming the file that can't be read. What surrounds a text (BOS, EOS) is tokenizer.json's
    word alone: ``add_bos_token`` of tokenizer_config.json is read only where there is no tokenizer.json, in
    transformers 5 as well. Padding and truncation stored in tokenizer.json are switched off.
    """
    source = files.get("tokenizer.json")
    if source is None:
        return None
    unreadable = "tokenizer.json cannot be read (take the file again from where the model comes from)"
    with _library_errors(CheckpointError, unreadable, "tokenizer.json"):
        library = Library.from_buffer(source)
        rules = msgspec.json.decode(source, type=Rules)
    check_expansion(rules.normalizer, rules.decoder)
    library.no_padding()
    library.no_truncation()
    config = _object(files, CONFIG)
    special = special_tokens(config, _object(files, MAP))
    warnings = add_tokens(library, config, _object(files, ADDED), special)
    if "chat_template.jinja" in files:
        config["chat_template"] = _text(files, "chat_template.jinja")
    elif "chat_template.json" in files:
        config.setdefault("chat_template", _object(files, "chat_template.json").get("chat_template"))
    named = {name: token.content for name, token in special.named.items()}
    ends = list(end_tokens)
    if "eos_token" in named:
        eos = library.token_to_id(named["eos_token"])
        if eos is not None and eos not in {token.id for token in ends}:
            ends.append(EndToken(eos, f"{special.sources['eos_token']} eos_token", named["eos_token"]))
    return Tokenizer(library, config, named, ends, warnings, decoder=rules.decoder)


def digest_of(files: Mapping[str, bytes]) -> str:
    """A checksum of a tokenizer's files (name → content). Other files with the same one cannot be made."""
    return " ".join(f"{name}:{blake2b(files[name], digest_size=16).hexdigest()}" for name in sorted(files))


class Rules(msgspec.Struct):
    """Parts of a tokenizer.json; the vocabulary is skipped."""

    class Model(msgspec.Struct):
        merges: list[Any] = []

    normalizer: Any = None
    decoder: Any = None
    model: Model = msgspec.field(default_factory=Model)


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is not UTF-8: {error}", param=name) from error


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object of an optional file."""
    if name not in files:
        return {}
    try:
        value = json.loads(_text(files, name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}", param=name) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds a {type(value).__name__}, not an object.", param=name)
    return value


def _templates(config: Mapping[str, Any]) -> dict[str, str]:
    """``chat_template`` is one source, or a list of named ones."""
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {
            entry["name"]: entry["template"]
            for entry in found
            if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        }
    return {}
