"""JSON answers, encoded once by msgspec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``value`` as the whole body."""
    return Response(msgspec.json.encode(value), status, headers=headers, media_type="application/json")
