"""Frames of msgpack over a socket, for all connections between processes of truffula.

A frame is the version of its protocol (2 bytes, little-endian), a length (4 bytes) and that many bytes of msgpack. A
frame of another version, a malformed one or one above ``MAX_FRAME_BYTES`` is a ``WireError``. A protocol is a union of
tagged structs: ``engine/wire.py`` defines the engine's.
"""

from __future__ import annotations

import contextlib
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
_HEADER = struct.Struct("<HI")
_READ_BYTES = 1 << 18
F = TypeVar("F")


class Disconnected(Exception):
    """The peer of a channel has closed the connection, or the channel was closed here."""


class Frame(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """Base class of a protocol's frames. The tag is the name of the class in lower case."""


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


def encode(frame: Any, version: int) -> bytes:
    """The bytes of one frame, with its header.

    Raises:
        WireError: A value that msgpack cannot encode (an integer above 64 bits, a lone surrogate), or too many bytes.
    """
    try:
        body = ENCODER.encode(frame)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"A {type(frame).__name__} frame can't be encoded: {error}.") from error
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"A {type(frame).__name__} frame of {len(body)} bytes is above {MAX_FRAME_BYTES}.")
    return _HEADER.pack(version, len(body)) + body


class FrameReader(Generic[F]):
    """Decodes a stream of bytes, split anywhere, into frames.

    Args:
        decode: Decodes the body of a frame, such as ``msgspec.msgpack.Decoder(A | B).decode``.
        version: Version of the protocol, which each frame must have.
    """

    def __init__(self, decode: Callable[[bytes], F], version: int) -> None:
        self._decode = decode
        self._version = version
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[F]:
        """The frames that ``data`` completes.

        Raises:
            WireError: Malformed, above the limit, or of another version. No later frame can be read.
        """
        self._buffer += data
        frames: list[F] = []
        while len(self._buffer) >= _HEADER.size:
            version, length = _HEADER.unpack_from(self._buffer)
            if version != self._version:
                raise WireError(
                    f"The peer speaks version {version}, this process speaks {self._version}.", version=version
                )
            if not 0 < length <= MAX_FRAME_BYTES:
                raise WireError(f"A frame says it has {length} bytes; 1 to {MAX_FRAME_BYTES} are allowed.")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append(self._parse(bytes(memoryview(self._buffer)[_HEADER.size : end])))
            del self._buffer[:end]
        return frames

    def end(self) -> None:
        """The stream has ended. Raises ``WireError`` within a frame."""
        if self._buffer:
            raise WireError(f"The stream of frames ended within a frame ({len(self._buffer)} bytes of it arrived).")

    def _parse(self, body: bytes) -> F:
        try:
            return self._decode(body)
        except TruffulaError as error:
            raise WireError(f"A frame holds an invalid value: {error.message}") from error
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
            raise WireError(f"A frame is malformed: {error}.") from error


class Channel(Generic[F]):
    """A socket for frames. Any thread may send; one thread receives.

    Args:
        sock: One end of a stream socket, which the channel takes over.
        decode, version: As of ``FrameReader``.
    """

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], F], version: int) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._version = version
        self._reader = FrameReader(decode, version)
        self._lock = threading.Lock()
        self._pending = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    def post(self, frame: Frame) -> bool:
        """Send without blocking. Returns True when bytes are left, for ``flush`` when the socket is writable.

        Raises:
            Disconnected: The peer has closed the connection.
            WireError: As ``encode``.
        """
        data = encode(frame, self._version)
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
        """Close the socket, and copies of its descriptor; the peer can still read the sent frames. Idempotent."""
        with self._lock:
            with contextlib.suppress(OSError):  # the peer or this process has closed it
                self._sock.shutdown(socket.SHUT_RDWR)
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
