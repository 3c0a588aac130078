"""JSON answers, encoded once by msgspec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE_BYTES = 2**18


class Reply(Response):
    """A JSON answer of ``parts``. A long one is sent in pieces, each when the client has taken most of those before: a
    transport copies what it cannot send.
    """

    def __init__(self, parts: Sequence[bytes], headers: Mapping[str, str] | None = None) -> None:
        self.parts = parts
        length = {"content-length": str(sum(map(len, parts)))}
        super().__init__(None, 200, {**(headers or {}), **length}, "application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = [piece for part in self.parts for piece in split(part)] or [b""]
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in pieces[:-1]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": pieces[-1]})


def split(part: bytes) -> Iterator[bytes]:
    """``part`` in pieces of at most ``PIECE_BYTES``."""
    for at in range(0, len(part), PIECE_BYTES):
        yield part[at : at + PIECE_BYTES] if len(part) > PIECE_BYTES else part


def encoded(value: Any) -> msgspec.Raw:
    """``value`` as JSON, a part of a larger reply. Other threads wait during an encoding, so that parts are encoded."""
    return msgspec.Raw(msgspec.json.encode(value))


def json_reply(value: Any, headers: Mapping[str, str] | None = None) -> Reply:
    """``value`` as the whole body."""
    return Reply([msgspec.json.encode(value)], headers)
