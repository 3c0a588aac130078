"""Tokens to text one at a time: never half a character, and joined together exactly the text of all."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# A window of ids without a whole character is given up on after this many: no character needs more than four tokens.
LONGEST_WAIT = 32


class Detokenizer(Protocol):
    """One per running choice. ``push`` ids in order; the text that became certain comes back."""

    def push(self, token_id: int) -> str: ...

    @property
    def pending(self) -> bool:
        """Whether pushed tokens hold the beginning of a character."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, as in a full decode. Once."""


class ByteDetokenizer:
    """For decoders that concatenate bytes (``pieces.byte_rule``): a table and an incremental UTF-8 decoder.

    An ill-formed sequence gives one U+FFFD per maximal subpart (Unicode 15, 3.9), as Rust's ``from_utf8_lossy`` does.
    The library's ``ByteFallback`` instead turns a *whole run* of byte tokens into U+FFFD when any of it is ill-formed;
    that cannot be known before the run ends, so here the well-formed characters of such a run are kept.
    """

    def __init__(self, to_bytes: Callable[[int], bytes], strip: int = 0) -> None:
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip

    def push(self, token_id: int) -> str:
        text = self._decoder.decode(self._to_bytes(token_id))
        return self._stripped(text) if self._strip and text else text

    def _stripped(self, text: str) -> str:
        """The text loses up to ``strip`` leading spaces; its first other character ends that."""
        kept = text.lstrip(" ")
        cut = min(self._strip, len(text) - len(kept))
        self._strip = 0 if cut < len(text) else self._strip - cut
        return text[cut:]

    @property
    def pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other decoder: decode a short window with and without the new token, and give the difference.

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
