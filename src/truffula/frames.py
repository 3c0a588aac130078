"""Length-prefixed msgpack frames over a socket: the codec of every wire between processes of truffula.

A frame is a length (4 bytes, little-endian) and that many bytes of msgpack. Each side's first frame is ``Hello`` with
the version of its protocol; another version, a malformed frame or one above ``MAX_FRAME_BYTES`` is a ``WireError``,
after which nothing more is read. A protocol is a union of tagged structs: ``engine/wire.py`` defines the engine's.
"""

from __future__ import annotations

import numbers
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from truffula.errors import TruffulaError, WireError

MAX_FRAME_BYTES = 256 * 2**20
_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
F = TypeVar("F")


class Disconnected(Exception):
    """The peer of a channel has closed the connection, or the channel was closed here."""


class Frame(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """Base of a protocol's frames: the tag is the class's name in lower case."""


class Hello(Frame, frozen=True):
    """First frame of either side."""

    version: int


def _plain(value: Any) -> Any:
    """Paths, numpy numbers and other values that msgpack has no form for, as ones that it has."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return repr(value)


ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_HELLO = msgspec.msgpack.Decoder(Hello)


def encode(frame: Any) -> bytes:
    """The bytes of one frame, its length first.

    Raises:
        WireError: A value that msgpack cannot hold (an integer above 64 bits, a lone surrogate), or too many bytes.
    """
    try:
        body = ENCODER.encode(frame)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"A {type(frame).__name__} frame can't be encoded: {error}.") from error
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"A {type(frame).__name__} frame of {len(body)} bytes is above {MAX_FRAME_BYTES}.")
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[F]):
    """Decodes a stream of bytes, cut anywhere, into frames. After a ``WireError`` it accepts nothing more.

    Args:
        decode: Of a frame's body, such as ``msgspec.msgpack.Decoder(A | B).decode``.
        version: Of the protocol; the peer's ``Hello`` must have the same.
    """

    def __init__(self, decode: Callable[[bytes], F], version: int, limit: int = MAX_FRAME_BYTES) -> None:
        self._decode = decode
        self._version = version
        self._limit = limit
        self._buffer = bytearray()
        self._greeted = False
        self._broken = False

    def feed(self, data: bytes) -> list[F]:
        """The frames that ``data`` completes; ``Hello`` is checked and not returned.

        Raises:
            WireError: Malformed, above the limit, or of another version.
        """
        if self._broken:
            raise WireError("The stream of frames is broken; no more is read from it.")
        self._buffer += data
        frames: list[F] = []
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if not 0 < length <= self._limit:
                    raise WireError(f"A frame says it has {length} bytes; 1 to {self._limit} are allowed.")
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(memoryview(self._buffer)[start + _LENGTH.size : end])
                start = end
                if self._greeted:
                    frames.append(_parse(self._decode, body))
                else:
                    self._greet(body)
        except WireError:
            self._broken = True
            raise
        del self._buffer[:start]
        return frames

    def end(self) -> None:
        """The stream has ended. Raises ``WireError`` when that was within a frame."""
        if self._buffer and not self._broken:
            raise WireError(f"The stream of frames ended within a frame ({len(self._buffer)} bytes of it arrived).")

    def _greet(self, body: bytes) -> None:
        version = _parse(_HELLO.decode, body).version
        if version != self._version:
            raise WireError(f"The peer speaks version {version}, this process speaks {self._version}.", version=version)
        self._greeted = True


def _parse(decode: Callable[[bytes], Any], body: bytes) -> Any:
    try:
        return decode(body)
    except TruffulaError as error:
        raise WireError(f"A frame holds an invalid value: {error.message}") from error
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise WireError(f"A frame is malformed: {error}.") from error


class Channel(Generic[F]):
    """A socket that carries frames. Any thread sends; one thread receives.

    Args:
        sock: One end of a stream socket, which the channel owns from here on.
        decode, version: As of ``FrameReader``; ``Hello`` with ``version`` is sent before the first frame.
    """

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], F], version: int) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = FrameReader(decode, version)
        self._lock = threading.Lock()
        self._pending = bytearray(encode(Hello(version)))

    def fileno(self) -> int:
        return self._sock.fileno()

    def post(self, frame: Frame) -> bool:
        """Send without blocking. True when bytes are left, for ``flush`` to send once the socket is writable.

        Raises:
            Disconnected: The peer has closed the connection.
            WireError: As ``encode``.
        """
        data = encode(frame)
        with self._lock:
            self._pending += data
            return self._push()

    def flush(self) -> None:
        """Send as much as the socket accepts of what ``post`` left."""
        with self._lock:
            self._push()

    @property
    def unsent(self) -> bool:
        with self._lock:
            return bool(self._pending)

    def send(self, frame: Frame) -> None:
        """Send, waiting until the peer has read enough. Raises as ``post``."""
        left = self.post(frame)
        while left:
            # poll, not select: the descriptor's number may be above 1024.
            waiter = select.poll()
            waiter.register(self._sock, select.POLLOUT)
            waiter.poll()
            with self._lock:
                left = self._push()

    def receive(self) -> list[F] | None:
        """The frames that have arrived; None when the peer has closed the connection.

        Raises:
            WireError: As ``FrameReader.feed`` and ``FrameReader.end``.
        """
        frames: list[F] = []
        while True:
            try:
                data = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                return frames
            except OSError:
                data = b""
            if not data:
                if frames:
                    return frames
                self._reader.end()
                return None
            frames += self._reader.feed(data)
            if len(data) < _READ_BYTES:
                return frames

    def close(self) -> None:
        """Close the socket; the peer still reads what was sent. Idempotent."""
        with self._lock:
            self._sock.close()

    def _push(self) -> bool:
        while self._pending:
            try:
                sent = self._sock.send(memoryview(self._pending)[:_READ_BYTES])
            except BlockingIOError:
                return True
            except OSError as error:
                raise Disconnected(str(error)) from error
            del self._pending[:sent]
        return False
