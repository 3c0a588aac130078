"""The frames between the API process and the engine's process. ``frames.py`` encodes them.

    to the engine     Start (SetVocabulary | Submit | Abort | Adapter | Control)* Stop
    from the engine   Starting* ModelPath Starting* Ready (Events | Stats | AdapterReply)*

Instead of any of its frames the engine may send ``Died``, its last one, which says why it ends.

The choices of one prompt share their token ids: a ``Submit`` frame holds them once, encoded once and decoded once.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from truffula.config import EngineConfig
from truffula.errors import ErrorInfo, InvalidRequest, TruffulaError
from truffula.frames import ENCODER, Channel, Frame
from truffula.logs import LogSettings
from truffula.types import (
    AdapterCommand,
    AdapterState,
    EngineAction,
    EngineInfo,
    EngineRequest,
    EngineStats,
    TokenEvent,
    Vocabulary,
)

VERSION = 5


class Start(Frame, frozen=True):
    """What to serve, and how to log; answered by ``Starting`` frames and then ``Ready`` or ``Died``.

    ``first`` is the ``Ready.info`` of the first engine: a restarted one serves the same model in the same way, or ends.
    """

    config: EngineConfig
    logs: LogSettings | None = None
    first: EngineInfo | None = None


class RequestGroup(msgspec.Struct, frozen=True, array_like=True):
    """Requests that differ in request id, choice and resume ids only, in that order in ``choices``.

    ``body`` is the encoded ``EngineRequest`` of the first. It is decoded apart from its frame, so that one that is
    invalid fails its own requests and no other.
    """

    choices: list[tuple[str, int, list[int]]]
    body: msgspec.Raw

    @property
    def request_ids(self) -> list[str]:
        return [request_id for request_id, _, _ in self.choices]


class SetVocabulary(Frame, frozen=True):
    """Comes before the first request with a grammar."""

    vocabulary: Vocabulary


class Submit(Frame, frozen=True):
    groups: list[RequestGroup]


class Abort(Frame, frozen=True):
    request_ids: list[str]


class Adapter(Frame, frozen=True):
    """Answered by an ``AdapterReply`` of the same ticket; a load is answered when the adapter is usable."""

    ticket: int
    command: AdapterCommand


class Control(Frame, frozen=True):
    """Answered by an ``AdapterReply`` of the same ticket, without states, after a ``Stats`` that shows the effect."""

    ticket: int
    action: EngineAction


class Stop(Frame, frozen=True):
    """End; nothing more is answered."""


class Starting(Frame, frozen=True):
    """Progress of the start, and a heartbeat during it. ``total`` None when not known."""

    stage: str
    done: int = 0
    total: int | None = None


class ModelPath(Frame, frozen=True):
    """Where the model's files are, which the engine has opened; ``EngineInfo.files`` says later what they were."""

    path: str


class Ready(Frame, frozen=True):
    info: EngineInfo


class Events(Frame, frozen=True):
    """The events of one step."""

    events: list[TokenEvent]


class Stats(Frame, frozen=True):
    """The heartbeat: at least every half second, also while idle or in a long step.

    ``stats`` is of a recent step's end; ``step_since`` (monotonic seconds) is when the step in progress began.
    """

    stats: EngineStats
    step_since: float | None = None


class AdapterReply(Frame, frozen=True):
    ticket: int
    states: list[AdapterState]
    error: ErrorInfo | None = None


class Died(Frame, frozen=True):
    """The start failed, or the engine cannot continue; its process ends after this."""

    error: ErrorInfo


ToEngine = Start | SetVocabulary | Submit | Abort | Adapter | Control | Stop
FromEngine = Starting | ModelPath | Ready | Events | Stats | AdapterReply | Died


def _to_path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(value)
    raise NotImplementedError(f"no decoding to {kind}")


_REQUEST = msgspec.msgpack.Decoder(EngineRequest)
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine, dec_hook=_to_path)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine, dec_hook=_to_path)


def engine_channel(sock: socket.socket) -> Channel[ToEngine]:
    """The engine's end of ``sock``: it receives what the API process sends."""
    return Channel(sock, _TO_ENGINE.decode, VERSION)


def client_channel(sock: socket.socket) -> Channel[FromEngine]:
    """The API process's end of ``sock``: it receives what the engine sends."""
    return Channel(sock, _FROM_ENGINE.decode, VERSION)


def group_requests(requests: Sequence[EngineRequest]) -> list[list[EngineRequest]]:
    """``requests`` in order, neighbours together that differ in request id, choice and resume ids only.

    Token ids and parameters are compared by identity: the choices of one prompt share both objects.
    """
    return [list(group) for _, group in itertools.groupby(requests, _all_but_the_choice)]


def _all_but_the_choice(one: EngineRequest) -> tuple[object, ...]:
    shared = id(one.prompt_ids), id(one.params)
    return *shared, one.adapter, one.grammar, one.salt, one.arrival, one.queue_deadline, one.deadline


def encode_group(requests: Sequence[EngineRequest]) -> RequestGroup:
    """One element of ``group_requests``, its prompt encoded.

    Raises:
        InvalidRequest: msgpack cannot hold a value (an integer above 64 bits, a lone surrogate).
    """
    try:
        body = msgspec.Raw(ENCODER.encode(requests[0]))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"The request holds an invalid value: {error}.") from error
    return RequestGroup([(one.request_id, one.choice, list(one.resume_ids)) for one in requests], body)


def decode_group(group: RequestGroup) -> list[EngineRequest]:
    """The requests of a group; they share one list of prompt ids.

    Raises:
        InvalidRequest: The body is not an ``EngineRequest``, or one of its values is out of range.
    """
    try:
        request = _REQUEST.decode(group.body)
    except TruffulaError as error:
        raise InvalidRequest(f"The request holds an invalid value: {error.message}", param=error.param) from error
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"The request holds an invalid value: {error}.") from error
    replace = msgspec.structs.replace
    return [replace(request, request_id=one, choice=choice, resume_ids=ids) for one, choice, ids in group.choices]
