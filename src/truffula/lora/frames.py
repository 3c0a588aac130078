"""Frames between the engine and a loading worker: four bytes of length, little endian, then msgpack."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from truffula.errors import WireError

MAX_FRAME_BYTES = 64 << 20
F = TypeVar("F")


def encode(frame: Any) -> bytes:
    """A frame's bytes."""
    body = msgspec.msgpack.encode(frame)
    return len(body).to_bytes(4, "little") + body


class Frames(Generic[F]):
    """Bytes in, frames out, however the bytes are cut."""

    def __init__(self, kinds: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kinds)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[F]:
        """The frames that ``data`` completes; ``WireError`` for one that is too long or malformed."""
        self._buffer += data
        frames: list[F] = []
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "little")
            if length > MAX_FRAME_BYTES:
                raise WireError(f"A frame has {length} bytes; the limit is {MAX_FRAME_BYTES}.")
            if len(self._buffer) < 4 + length:
                break
            try:
                frames.append(self._decoder.decode(bytes(self._buffer[4 : 4 + length])))
            except (msgspec.MsgspecError, ValueError) as error:
                raise WireError(f"A frame is malformed: {error}.") from error
            del self._buffer[: 4 + length]
        return frames
