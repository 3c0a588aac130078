"""Tokens to text one at a time: never half a character, and joined together exactly the text of all.

Almost every language model's tokenizer decodes in one of two ways: GPT-2's byte alphabet (``ByteLevel``), or
SentencePiece's ``▁`` for a space with ``<0xE2>`` for bytes outside the vocabulary (``Replace``, ``ByteFallback``,
``Fuse``, ``Strip``). In both, a text is the concatenation of what each piece stands for, decoded as UTF-8. That makes
incremental decoding exact and O(1) per token (``ByteRule``, ``ByteDetokenizer``). Any other decoder is left to the
library (``WindowDetokenizer``).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\ufffd"
# A window of ids without a whole character is given up on after this many: no character needs more than four tokens.
LONGEST_WAIT = 32


@dataclass(frozen=True)
class ByteRule:
    """``to_bytes`` of one piece; ``strip`` is how many leading spaces the whole text loses."""

    to_bytes: Callable[[str], bytes]
    strip: int = 0


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, character → byte (Radford et al. 2019, ``bytes_to_unicode``)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in kept}
    others = (byte for byte in range(256) if byte not in set(kept))
    return table | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def is_utf8(raw: bytes) -> bool:
    """Whether ``raw`` is whole characters; a part of one is not."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def byte_level(piece: str) -> bytes:
    """A piece of the byte alphabet; one with any other character (an added token) is its own text."""
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[char] for char in piece])
    except KeyError:
        return piece.encode()


def sentence_piece(space: str) -> Callable[[str], bytes]:
    """Pieces that write a blank as ``space`` and a foreign byte as ``<0xE2>``."""

    def to_bytes(piece: str) -> bytes:
        byte = BYTE_TOKEN.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(space, " ").encode()

    return to_bytes


def byte_rule(decoder: Any) -> ByteRule | None:
    """The rule equal to the ``decoder`` of a tokenizer.json, or None when it is of neither family."""
    if not isinstance(decoder, dict):
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteRule(byte_level)
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    space, to = steps[0]["pattern"].get("String"), steps[0]["content"]
    strip: dict[str, Any] = steps[3] if kinds[3:] else {"content": " ", "start": 0, "stop": 0}
    if space is None or to != " " or strip["content"] != " " or strip["stop"]:
        return None
    return ByteRule(sentence_piece(space), strip["start"])


class ByteDetokenizer:
    """For decoders that concatenate bytes (``byte_rule``): a table and an incremental UTF-8 decoder. One per choice.

    An ill-formed sequence gives one U+FFFD per maximal subpart (Unicode 15, 3.9), as Rust's ``from_utf8_lossy`` does.
    The library's ``ByteFallback`` instead turns a *whole run* of byte tokens into U+FFFD when any of it is ill-formed;
    that cannot be known before the run ends, so here the well-formed characters of such a run are kept.
    """

    def __init__(self, to_bytes: Callable[[int], bytes], strip: int = 0) -> None:
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip
        self.pending = False
        """Whether pushed tokens hold the beginning of a character."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        raw = self._to_bytes(token_id)
        try:
            text = self._decoded(raw) if self.pending else raw.decode()
        except UnicodeDecodeError:
            text = self._decoded(raw)
        return self._stripped(text) if self._strip and text else text

    def _stripped(self, text: str) -> str:
        """The text loses up to ``strip`` leading spaces; its first other character ends that."""
        kept = text.lstrip(" ")
        cut = min(self._strip, len(text) - len(kept))
        self._strip = 0 if cut < len(text) else self._strip - cut
        return text[cut:]

    def _decoded(self, raw: bytes) -> str:
        text = self._decoder.decode(raw)
        self.pending = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, as in a full decode. Once."""
        self.pending = False
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """As ``ByteDetokenizer`` for any other decoder: the difference of a short window with and without the new token.

    The window starts at the last token whose text is out, so that what a decoder does at the *start* of a text (strip a
    space, join a ``##`` piece) happens to both texts alike. Each push decodes a handful of tokens, however long the
    text is.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # how many ids of the window have their text out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[: self._shown])
        now = self._decode(self._ids)
        waits = now.endswith(REPLACEMENT) or len(now) <= len(before)
        if waits and len(self._ids) < LONGEST_WAIT:
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return now[len(before) :]

    @property
    def pending(self) -> bool:
        return len(self._ids) > self._shown

    def flush(self) -> str:
        text = self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]
        self._shown = len(self._ids)
        return text


Detokenizer = ByteDetokenizer | WindowDetokenizer
