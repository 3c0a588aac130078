"""Where log lines go: stderr, as text for people or as one JSON object a line; in the engine's process too."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True)
class LogSettings:
    """``format`` is ``text`` or ``json``; ``level`` the least severity logged, as the option names it."""

    format: str = "text"
    level: str = "info"


class TextLines(logging.Formatter):
    """``2026-01-31 12:00:00.123 info truffula.access id=… status=200``"""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{stamp}.{int(record.msecs):03d} {record.levelname.lower()} {record.name} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """One object a line; an exception's traceback is its field ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if fields is not None:
            entry |= fields
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def setup_logs(settings: LogSettings) -> None:
    """Sends our log lines, and the HTTP library's warnings, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.format == "json" else TextLines())
    for name, level in (("truffula", settings.level.upper()), ("uvicorn.error", "WARNING"), ("asyncio", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
