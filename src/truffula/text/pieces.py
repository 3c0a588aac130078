"""From a vocabulary piece to the bytes it adds to a text, for the two families of decoders that work byte by byte.

Almost every language model's tokenizer decodes in one of two ways: GPT-2's byte alphabet (``ByteLevel``), or
SentencePiece's ``▁`` for a space with ``<0xE2>`` for bytes outside the vocabulary (``Replace``, ``ByteFallback``,
``Fuse``, ``Strip``). In both, a text is the concatenation of what each piece stands for, decoded as UTF-8. That makes
incremental decoding exact and O(1) per token. Any other decoder is left to the library
(``detokenizer.WindowDetokenizer``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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
