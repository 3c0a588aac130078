"""What crosses between the API process and the engine's process, and the only code that encodes it.

A frame is a length (4 bytes, little-endian) and that many bytes of msgpack: one tagged struct. Each side's first frame
is ``Hello``; another version, a malformed frame or one above ``MAX_FRAME_BYTES`` is a ``WireError``, after which no
more is read.

    down   Hello Start (Submit | Abort | Adapter)* Stop
    up     Hello Starting* Ready (Events | Stats | AdapterReply)*    and Died last, when the engine can say why
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

from truffula.config import EngineConfig
from truffula.errors import ErrorInfo, TruffulaError, WireError
from truffula.logs import LogSettings
from truffula.types import AdapterCommand, AdapterState, EngineInfo, EngineRequest, EngineStats, TokenEvent

VERSION = 1
MAX_FRAME_BYTES = 256 * 2**20
_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18


class Frame(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """Base of all: the tag is the class's name in lower case."""


class Hello(Frame, frozen=True):
    """First frame of either side."""

    version: int = VERSION


class Start(Frame, frozen=True):
    """What to serve, and how to log; answered by ``Starting`` frames and then ``Ready`` or ``Died``.

    ``first`` is what this engine's first life said of itself: a later one must be the same, or end.
    """

    config: EngineConfig
    logs: LogSettings | None = None
    first: EngineInfo | None = None


class Submit(Frame, frozen=True):
    requests: list[EngineRequest]


class Abort(Frame, frozen=True):
    request_ids: list[str]


class Adapter(Frame, frozen=True):
    """Answered by an ``AdapterReply`` of the same ticket; for a load, when the adapter is usable."""

    ticket: int
    command: AdapterCommand


class Stop(Frame, frozen=True):
    """End: nothing more is answered."""


class Starting(Frame, frozen=True):
    """How far the start is, and a heartbeat during it. ``total`` None when not known."""

    stage: str
    done: int = 0
    total: int | None = None


class Located(Frame, frozen=True):
    """Where the model's files are, which the engine has opened. ``Ready`` says which files they were."""

    path: str


class Ready(Frame, frozen=True):
    info: EngineInfo


class Events(Frame, frozen=True):
    """All that one step gave."""

    events: list[TokenEvent]


class Stats(Frame, frozen=True):
    """The heartbeat: at least every half second, also while idle or in a long step.

    ``stats`` is as of the last step's end; ``step_since`` (monotonic) is when the step in progress began.
    """

    stats: EngineStats
    step_since: float | None = None


class AdapterReply(Frame, frozen=True):
    ticket: int
    states: list[AdapterState] = []
    error: ErrorInfo | None = None


class Died(Frame, frozen=True):
    """The start failed, or the engine met a fault of its own; the process ends after this."""

    error: ErrorInfo


ToEngine = Hello | Start | Submit | Abort | Adapter | Stop
FromEngine = Hello | Starting | Located | Ready | Events | Stats | AdapterReply | Died
F = TypeVar("F")


class Disconnected(Exception):
    """The peer of a channel is gone, or the channel was closed. Its reason is known to nobody here."""


def _plain(value: Any) -> Any:
    """What msgpack has no form for: paths, numpy's numbers, and whatever an error's ``data`` was given."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return repr(value)


def _unplain(kind: type, value: Any) -> Any:
    if kind is Path or issubclass(kind, Path):
        return Path(value)
    raise NotImplementedError(f"no decoding to {kind}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_REQUEST = msgspec.msgpack.Decoder(EngineRequest)
_HELLO = msgspec.msgpack.Decoder(Hello)
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine, dec_hook=_unplain)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine, dec_hook=_unplain)


def encode(frame: Frame) -> bytes:
    """A frame as bytes.

    Raises:
        WireError: A value that msgpack can't hold (an integer above 64 bits, a lone surrogate), or too many bytes.
    """
    try:
        body = _ENCODER.encode(frame)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"A {type(frame).__name__} frame can't be encoded: {error}.") from error
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"A {type(frame).__name__} frame of {len(body)} bytes is above {MAX_FRAME_BYTES}.")
    return _LENGTH.pack(len(body)) + body


def crosses(request: EngineRequest) -> str | None:
    """None when ``request`` survives the trip; else why not, so that it is refused here and harms no engine."""
    try:
        _REQUEST.decode(_ENCODER.encode(request))
    except (TypeError, ValueError, OverflowError, msgspec.ValidationError) as error:
        return str(error)
    except TruffulaError as error:
        return error.message
    return None


class FrameReader(Generic[F]):
    """Bytes in, frames out, however the bytes are cut. After a ``WireError`` it takes nothing more."""

    def __init__(self, decode: Callable[[bytes], F], limit: int = MAX_FRAME_BYTES) -> None:
        self._decode = decode
        self._limit = limit
        self._buffer = bytearray()
        self._greeted = False
        self._broken = False

    def feed(self, data: bytes) -> list[F]:
        """The frames that ``data`` completes; ``Hello`` is checked and not passed on.

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
                    frames.append(self._parse(self._decode, body))
                else:
                    self._greet(body)
        except WireError:
            self._broken = True
            raise
        del self._buffer[:start]
        return frames

    def end(self) -> None:
        """The stream ended: ``WireError`` when that was within a frame."""
        if self._buffer and not self._broken:
            raise WireError(f"The stream of frames ended within a frame ({len(self._buffer)} bytes of it arrived).")

    def _greet(self, body: bytes) -> None:
        version = self._parse(_HELLO.decode, body).version
        if version != VERSION:
            raise WireError(f"The peer speaks version {version}, this process speaks {VERSION}.", version=version)
        self._greeted = True

    def _parse(self, decode: Callable[[bytes], Any], body: bytes) -> Any:
        try:
            frame = decode(body)
            if self._greeted and isinstance(frame, Hello):
                raise WireError("The peer sent Hello a second time.")
            return frame
        except WireError:
            raise
        except TruffulaError as error:
            raise WireError(f"A frame holds an invalid value: {error.message}") from error
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
            raise WireError(f"A frame is malformed: {error}.") from error


def engine_side() -> FrameReader[ToEngine]:
    """Reader of what the API process sends."""
    return FrameReader(_TO_ENGINE.decode)


def client_side() -> FrameReader[FromEngine]:
    """Reader of what the engine sends."""
    return FrameReader(_FROM_ENGINE.decode)


class Channel(Generic[F]):
    """A socket that carries frames. Any thread sends; one thread receives. ``Hello`` goes ahead of the first frame."""

    def __init__(self, sock: socket.socket, reader: FrameReader[F]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = reader
        self._lock = threading.Lock()
        self._pending = bytearray(encode(Hello()))

    def fileno(self) -> int:
        return self._sock.fileno()

    def post(self, frame: Frame) -> bool:
        """Send without ever blocking; True when bytes are left over, for ``flush`` to send once the socket is writable.

        Raises:
            Disconnected: The peer is gone.
            WireError: As ``encode``.
        """
        data = encode(frame)
        with self._lock:
            self._pending += data
            return self._push()

    def flush(self) -> None:
        """Send what can be sent of what ``post`` left over."""
        with self._lock:
            self._push()

    @property
    def unsent(self) -> bool:
        with self._lock:
            return bool(self._pending)

    def send(self, frame: Frame) -> None:
        """Send, waiting for the peer to read if it must. Raises as ``post``."""
        left = self.post(frame)
        while left:
            # poll, not select: the descriptor's number may be above 1024.
            waiter = select.poll()
            waiter.register(self._sock, select.POLLOUT)
            waiter.poll()
            with self._lock:
                left = self._push()

    def receive(self) -> list[F] | None:
        """The frames that are there now; None when the peer has closed.

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
        """Close the socket; the peer reads to the end of what was sent. Idempotent."""
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
