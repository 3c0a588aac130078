"""JSON answers, encoded once by msgspec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response


def encoded(value: Any) -> msgspec.Raw:
    """``value`` as JSON, a part of a larger reply. Other threads wait during an encoding, so that parts are encoded."""
    return msgspec.Raw(msgspec.json.encode(value))


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``value`` as the whole body."""
    return Response(msgspec.json.encode(value), status, headers=headers, media_type="application/json")
