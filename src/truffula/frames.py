"""Length-prefixed msgpack frames over a socket, for all connections between processes of truffula.

A frame is a length (4 bytes, little-endian) and that many bytes of msgpack. The first frame of each side is ``Hello``
with the version of its protocol. Another version, a malformed frame or one above ``MAX_FRAME_BYTES`` is a
``WireError``, after which no more is read. A protocol is a union of tagged structs: ``engine/wire.py`` defines the
engine's.
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
    """Base class of a protocol's frames. The tag is the name of the class in lower case."""


class Hello(Frame, frozen=True):
    """The first frame of each side."""

    version: int


def _plain(value: Any) -> Any:
    """A path, numpy number or other value that msgpack cannot encode, converted to one that it can."""
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
    """The bytes of one frame, with its length.

    Raises:
        WireError: A value that msgpack cannot encode (an integer above 64 bits, a lone surrogate), or too many bytes.
    """
    try:
        body = ENCODER.encode(frame)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"A {type(frame).__name__} frame can't be encoded: {error}.") from error
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"A {type(frame).__name__} frame of {len(body)} bytes is above {MAX_FRAME_BYTES}.")
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[F]):
    """Decodes a stream of bytes, split anywhere, into frames. After a ``WireError`` it accepts no more bytes.

    Args:
        decode: Decodes the body of a frame, such as ``msgspec.msgpack.Decoder(A | B).decode``.
        version: Version of the protocol, which the peer's ``Hello`` must have too.
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
        """Call at the end of the stream. Raises ``WireError`` when it ended within a frame."""
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
    """A socket for frames. Any thread may send; one thread receives.

    Args:
        sock: One end of a stream socket, which the channel takes over.
        decode, version: As of ``FrameReader``; a ``Hello`` with ``version`` is sent first.
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
        """Send without blocking. Returns True when bytes are left, for ``flush`` when the socket is writable.

        Raises:
            Disconnected: The peer has closed the connection.
            WireError: As ``encode``.
        """
        data = encode(frame)
        with self._lock:
            self._pending += data
            return self._push()

    def flush(self) -> None:
        """Send as many of the bytes left by ``post`` as the socket accepts."""
        with self._lock:
            self._push()

    @property
    def unsent(self) -> bool:
        with self._lock:
            return bool(self._pending)

    def send(self, frame: Frame) -> None:
        """Send, and wait until the socket has accepted all bytes. Raises as ``post``."""
        left = self.post(frame)
        while left:
            # poll, not select: the descriptor may be above 1024.
            waiter = select.poll()
            waiter.register(self._sock, select.POLLOUT)
            waiter.poll()
            with self._lock:
                left = self._push()

    def receive(self) -> list[F] | None:
        """The received frames, or None when the peer has closed the connection.

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
        """Close the socket; the peer can still read the sent frames. Idempotent."""
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
